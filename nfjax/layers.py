"""The layers of our networks: convolutions, pooling, norms and what stands in for them, and the activation that stands
before a convolution.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfjax import _convolution, initializers

ConvFactory = Callable[..., nnx.Module]
Norm = Callable[..., nnx.Module]
Elementwise = Callable[[jax.Array], jax.Array]

_WITHOUT_BIAS = functools.partial(nnx.Conv, use_bias=False)


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
    layer: Callable[..., nnx.Conv] = _WITHOUT_BIAS,
) -> nnx.Conv:
    """A square 2-D convolution that pads k // 2 zeros on every side, as PyTorch's ResNets do.

    Args:
        in_features: Channels of its input.
        out_features: Channels of its output.
        kernel_size: k, height and width.
        stride: Along both.
        spatial_size: Height and width of its input in pixels, for initializers that depend on them.
        init: Draws the kernel [k, k, in_features, out_features].
        dtype: Of the arithmetic; the kernel is float32.
        rngs: Of the kernel.
        layer: What is built, called as `nnx.Conv` is; that without bias if left out.
    """
    padding = ((kernel_size // 2, kernel_size // 2),) * 2
    return layer(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        kernel_init=initializers.at_layer(init, stride, padding, spatial_size),
        conv_general_dilated=_convolution.conv_general_dilated,
        rngs=rngs,
    )


class StandardizedConv(nnx.Conv):
    """A convolution that standardizes its kernel whenever it is used: each output channel gets mean 0 and variance 1.

    Qiao et al. 2019. With `scaled`, the variance is gain^2 / n_in with a learned gain per channel that starts at 1, and
    there is a bias per channel that starts at 0 (Brock et al. 2021a, "scaled weight standardization").

    The constants that keep the division finite are those of the authors' programs: Kolesnikov et al. 2020 add 1e-10 to
    a variance, Brock et al. take 1e-4 for n_in times the variance where it is smaller.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        strides: int,
        padding: tuple[tuple[int, int], tuple[int, int]],
        dtype: Any,
        kernel_init: initializers.Initializer,
        conv_general_dilated: Callable[..., jax.Array],
        scaled: bool,
        rngs: nnx.Rngs,
    ):
        """As `nnx.Conv`, of whose arguments it has those that `convolution` gives."""
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            use_bias=scaled,
            dtype=dtype,
            kernel_init=kernel_init,
            conv_general_dilated=conv_general_dilated,
            rngs=rngs,
        )
        self.gain = nnx.Param(jnp.ones(out_features, jnp.float32)) if scaled else None

    def standardized(self) -> jax.Array:
        """The kernel with which it convolves, float32 [k, k, c_in, c_out]."""
        kernel = self.kernel[...].astype(jnp.float32)
        n_in, axes = math.prod(kernel.shape[:-1]), (0, 1, 2)
        kernel -= kernel.mean(axes, keepdims=True)
        variance = (kernel**2).mean(axes)
        if self.gain is None:
            return kernel * jax.lax.rsqrt(variance + 1e-10)[None, None, None]
        return kernel * (self.gain[...] * jax.lax.rsqrt(jnp.maximum(n_in * variance, 1e-4)))[None, None, None]

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, self.standardized(), bias), dtype=self.dtype)
        y = self.conv_general_dilated(
            x, kernel, (self.strides,) * 2, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if bias is None else y + bias[None, None, None]


# As `convolution`, with kernels that are standardized whenever they are used, without and with a gain and a bias.
standardized_convolution = functools.partial(convolution, layer=functools.partial(StandardizedConv, scaled=False))
scaled_standardized_convolution = functools.partial(convolution, layer=functools.partial(StandardizedConv, scaled=True))


class MeanPooledConvolution(nnx.Module):
    """2x2 mean-pooling with stride 2, then a 1x1 convolution, [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C']: the
    shortcut of ResNet-D (He et al. 2019). At an odd border the mean is that of the pixels there are.
    """

    def __init__(self, conv: nnx.Module):
        self.conv = conv

    def __call__(self, x: jax.Array) -> jax.Array:
        odd = [(0, n % 2) for n in x.shape[1:3]]
        return self.conv(nnx.avg_pool(x, (2, 2), (2, 2), odd, count_include_pad=False))


def with_mean_pooled_shortcuts(
    in_features: int,
    out_features: int,
    kernel_size: int,
    stride: int,
    spatial_size: tuple[int, int],
    *,
    conv: ConvFactory = scaled_standardized_convolution,
    **settings: Any,
) -> nnx.Module:
    """`conv`, but a 1x1 convolution with stride 2, the shortcut of a transition, stands behind mean-pooling instead, as
    in the NF-ResNets of timm.
    """
    if (kernel_size, stride) != (1, 2):
        return conv(in_features, out_features, kernel_size, stride, spatial_size, **settings)
    pooled = strided(spatial_size, 2)
    return MeanPooledConvolution(conv(in_features, out_features, 1, 1, pooled, **settings))


def strided(spatial_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width behind a convolution with this stride that pads k // 2."""
    return tuple((n - 1) // stride + 1 for n in spatial_size)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling with stride 2 and a border of 1, [B, H, W, C] -> [B, H', W', C], H' = ceil(H / 2).

    For the gradient of a window XLA adds values up one by one, which takes four times as long on a CPU (in bfloat16
    twelve times), and on an H200 5 % of the step of a ResNet-50. On both of them every pixel asks the windows in which
    it lies instead. Where values of a window are equal, these share the gradient that the first one would get.
    """

    def window(x: jax.Array) -> jax.Array:
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    return jax.lax.platform_dependent(x, cpu=_pooled, cuda=_pooled, default=window)


@jax.custom_jvp
def _pooled(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _shifted(x))


@_pooled.defjvp
def _pooled_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = _pooled(x)

    def of_tangent(x: jax.Array, y: jax.Array, dx: jax.Array) -> jax.Array:
        """The transpose of the gradient that is meant, whose transpose is then that gradient."""
        return jax.linear_transpose(lambda dy: _pool_gradient(dy, x, y), y)(dx)[0]

    # Between forward and backward x and y are kept, not what is made of them.
    return y, jax.checkpoint(of_tangent, prevent_cse=False)(x, y, dx)


def _shifted(x: jax.Array) -> list[jax.Array]:
    """The nine values of every window, each [B, H', W', C]."""
    height, width = ((n + 1) // 2 for n in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    shifts = [(i, j) for i in range(3) for j in range(3)]
    # Slices and not indices: of a batch of any size, the latter become gathers.
    ends = [(x.shape[0], i + 2 * height - 1, j + 2 * width - 1, x.shape[3]) for i, j in shifts]
    return [jax.lax.slice(padded, (0, i, j, 0), end, (1, 2, 2, 1)) for (i, j), end in zip(shifts, ends, strict=True)]


def _pool_gradient(dy: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """A pixel lies in the window of its own 2x2 pixels, and in those to the right and below on which it borders."""
    (b, height, width, c), size = y.shape, x.shape
    ties = functools.reduce(jnp.add, [(value == y).astype(y.dtype) for value in _shifted(x)])
    share = dy / ties
    cells = jnp.pad(x, ((0, 0), (0, 2 * height - size[1]), (0, 2 * width - size[2]), (0, 0)))
    cells = cells.reshape(b, height, 2, width, 2, c)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, cells.shape, axis) for axis in (2, 4))

    def window(of_windows: jax.Array, down: int, right: int) -> jax.Array:
        """For each pixel the value of its window, or of one that is further `down` and `right`."""
        if down or right:
            shifts = ((0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0))
            of_windows = jax.lax.pad(of_windows, jnp.zeros((), of_windows.dtype), shifts)
        return jnp.broadcast_to(of_windows[:, :, None, :, None], cells.shape)

    total = jnp.zeros_like(cells)
    for there in ((0, 0), (0, 1), (1, 0), (1, 1)):
        reached = (cells == window(y, *there)) & (row >= there[0]) & (column >= there[1])
        total += jnp.where(reached, window(share, *there), 0)
    return total.reshape(b, 2 * height, 2 * width, c)[:, : size[1], : size[2]]


class DynamicTanh(nnx.Module):
    """gamma tanh(alpha x) + beta, [..., C] -> [..., C] (Zhu et al. 2025): in place of a norm, without any statistic.

    alpha is one number, from 0.5; gamma and beta are of each channel, from 1 and 0.
    """

    def __init__(self, features: int, *, dtype: Any = None, rngs: nnx.Rngs | None = None):
        """Builds it. rngs: Of other norms; nothing is drawn."""
        del rngs
        self.alpha = nnx.Param(jnp.full((), 0.5, jnp.float32))
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.dtype = dtype

    def squashed(self, x: jax.Array) -> jax.Array:
        """Every element, between -1 and 1."""
        return jnp.tanh(self.alpha[...].astype(x.dtype) * x)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        over = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (value[...].astype(x.dtype).reshape(over) for value in (self.scale, self.bias))
        return scale * self.squashed(x) + bias


class DynamicErf(DynamicTanh):
    """gamma erf(alpha x + s) + beta, [..., C] -> [..., C] (Chen et al. 2025), with one learned s that starts at 0."""

    def __init__(self, features: int, *, dtype: Any = None, rngs: nnx.Rngs | None = None):
        super().__init__(features, dtype=dtype, rngs=rngs)
        self.shift = nnx.Param(jnp.zeros((), jnp.float32))

    def squashed(self, x: jax.Array) -> jax.Array:
        return jax.lax.erf(self.alpha[...].astype(x.dtype) * x + self.shift[...].astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class NormWithConvolution:
    """A norm that goes with another convolution: `(features, dtype=, rngs=) -> layer`, and a `ConvFactory`."""

    norm: Norm
    conv: ConvFactory

    def __call__(self, features: int, **settings: Any) -> nnx.Module:
        return self.norm(features, **settings)


def _group_norm(features: int, **settings: Any) -> nnx.GroupNorm:
    """32 groups, or as many of them as divide the channels."""
    return nnx.GroupNorm(features, num_groups=math.gcd(32, features), epsilon=1e-5, **settings)


NORMS: dict[str, Norm] = {
    # PyTorch's defaults, whose momentum of 0.1 counts the other way; not stated by the paper.
    "batch": functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5),
    "group": NormWithConvolution(_group_norm, standardized_convolution),  # Kolesnikov et al. 2020
    "dyt": DynamicTanh,
    "derf": DynamicErf,
}


@dataclasses.dataclass(frozen=True)
class Scaled:
    """factor * function(x), elementwise."""

    function: Elementwise
    factor: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.factor * self.function(x)


class Activation(nnx.Module):
    """(Norm and) activation, [..., C] -> [..., C]."""

    def __init__(
        self,
        features: int,
        norm: Norm | None,
        function: Elementwise = jax.nn.relu,
        biases: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        """Builds it.

        Args:
            features: Channels.
            norm: `(features, rngs=) -> layer`, or None.
            function: The activation, elementwise.
            biases: Whether a learned number is added before the activation, and another one behind it, for what comes
                next; both start at 0 (Zhang et al. 2019).
            rngs: Of the norm.
        """
        self.norm = norm(features, rngs=rngs) if norm else None
        self.function = function
        self.before, self.behind = (nnx.Param(jnp.zeros((), jnp.float32)) if biases else None for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if self.norm is None else self.norm(x)
        if self.before is None or self.behind is None:
            return self.function(x)
        return self.function(x + self.before[...].astype(x.dtype)) + self.behind[...].astype(x.dtype)
