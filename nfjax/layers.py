"""The layers of our networks: convolution, pooling, norms, and the activation that stands before a convolution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from nfjax import _convolution, initializers

Norm = Callable[..., nnx.Module]
Elementwise = Callable[[jax.Array], jax.Array]

# PyTorch's defaults, whose momentum of 0.1 counts the other way; not stated by the paper.
NORMS: dict[str, Norm] = {
    "batch": functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5),
}


def convolution(
    in_features: int,
    out_features: int,
    kernel_size: int,
    stride: int,
    spatial_size: tuple[int, int],
    *,
    init: initializers.Initializer,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square 2-D convolution without bias that pads k // 2 zeros on every side, as PyTorch's ResNets do.

    Args:
        in_features: Channels of its input.
        out_features: Channels of its output.
        kernel_size: k, height and width.
        stride: Along both.
        spatial_size: Height and width of its input in pixels, for initializers that depend on them.
        init: Draws the kernel [k, k, in_features, out_features].
        dtype: Of the arithmetic; the kernel is float32.
        rngs: Of the kernel.
    """
    padding = ((kernel_size // 2, kernel_size // 2),) * 2
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=initializers.at_layer(init, stride, padding, spatial_size),
        conv_general_dilated=_convolution.conv_general_dilated,
        rngs=rngs,
    )


def strided(spatial_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width behind a convolution with this stride that pads k // 2."""
    return tuple((n - 1) // stride + 1 for n in spatial_size)


class Activation(nnx.Module):
    """(Norm and) activation, [..., C] -> [..., C]."""

    def __init__(self, features: int, norm: Norm | None, function: Elementwise = jax.nn.relu, *, rngs: nnx.Rngs):
        """Builds it.

        Args:
            features: Channels.
            norm: `(features, rngs=) -> layer`, or None.
            function: The activation, elementwise.
            rngs: Of the norm.
        """
        self.norm = norm(features, rngs=rngs) if norm else None
        self.function = function

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x if self.norm is None else self.norm(x))
