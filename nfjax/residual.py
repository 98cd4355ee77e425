"""Residual rules: how a block joins its skip path and its residual branch.

Every rule is x_l = c (h(x_{l-1}) + f_l(x_{l-1})) (eq. 5 of the paper) and states its own c and h. Where a block changes
resolution or width, h is a strided 1x1 convolution under every rule (the paper's footnote 2), and c multiplies these
blocks too.

The shortcut convolution reads z = ReLU(x) (with batch norm ReLU(BN(x))), as in the pre-activation ResNet of He et al.
2016b. The paper writes W_s x, but only behind a ReLU does He's fan-out initialization give Var[dh/dx] = 1: reading x
itself, it would be 2, and the gradient would grow by 3/2 in every block.

A new rule is one subclass of `Residual` and one line in `RESIDUALS`. It may use another h (`skip`), call the branch on
something else than x (`__call__`), and wrap or re-initialize the branch's convolutions (`branch_convolution`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from nfjax import initializers

ConvFactory = Callable[..., nnx.Module]
Layer = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a block stands in its network: all that a rule may depend on.

    index: 0 for the first block of `num_blocks`. stage, index_in_stage: from 0. num_convolutions: of the branch.
    in_features, out_features, stride: of the block. spatial_size: height and width of its input in pixels.
    """

    index: int
    num_blocks: int
    stage: int
    index_in_stage: int
    num_convolutions: int
    in_features: int
    out_features: int
    stride: int
    spatial_size: tuple[int, int]

    @property
    def transition(self) -> bool:
        """Whether the block changes resolution or width."""
        return self.stride != 1 or self.in_features != self.out_features


class Residual(nnx.Module):
    """The classical rule x + f(x) (eq. 4), and the base of the others."""

    c: float = 1.0
    convolutional_skip: bool = False  # in every block; a transition always has it

    def __init__(self, position: Position, conv: ConvFactory, rngs: nnx.Rngs):
        """conv: `(in_features, out_features, kernel_size, stride, spatial_size, rngs=) -> layer`, set up by the
        network.
        """
        self.shortcut = (
            conv(position.in_features, position.out_features, 1, position.stride, position.spatial_size, rngs=rngs)
            if position.transition or self.convolutional_skip
            else None
        )

    def skip(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """h: of the block's input x [B, H, W, C] and its activation z = ReLU(x)."""
        return x if self.shortcut is None else self.shortcut(z)

    def branch_convolution(self, index: int, layer: nnx.Module) -> nnx.Module:
        """What stands in the branch for its convolution number `index`, counted from 0; the convolution itself by
        default.
        """
        del index
        return layer

    def __call__(self, x: jax.Array, activate: Layer, branch: Layer) -> jax.Array:
        """x_l from x_{l-1}, the block's first (norm and) ReLU, and the branch that continues from it."""
        z = activate(x)
        total = self.skip(x, z) + branch(z)
        return total if self.c == 1.0 else self.c * total


class IdShort(Residual):
    """sqrt(1/2) (x + f(x)): scaled identity shortcut (section 3.3)."""

    c = math.sqrt(0.5)


class LearnScalar(Residual):
    """sqrt(1/2) (alpha x + f(x)), alpha a learned scalar per block that starts at 1 (section 3.3)."""

    c = math.sqrt(0.5)

    def __init__(self, position: Position, conv: ConvFactory, rngs: nnx.Rngs):
        super().__init__(position, conv, rngs)
        self.alpha = nnx.Param(jnp.ones((), jnp.float32)) if self.shortcut is None else None

    def skip(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return super().skip(x, z) if self.alpha is None else self.alpha[...].astype(x.dtype) * x


class ConvShort(Residual):
    """sqrt(1/2) (W_s ReLU(x) + f(x)), a 1x1 convolution in every block (section 3.3)."""

    c = math.sqrt(0.5)
    convolutional_skip = True


class Conv(Residual):
    """W_s ReLU(x) + f(x): the classical sum with a convolution in every block, as the BatchNorm rows of the paper's
    tables count it.
    """

    convolutional_skip = True


RESIDUALS: dict[str, type[Residual]] = {
    "identity": Residual,
    "idshort": IdShort,
    "learnscalar": LearnScalar,
    "convshort": ConvShort,
    "conv": Conv,
}


def get(residual: str | Callable[..., Residual]) -> Callable[..., Residual]:
    """The rule of that name in `RESIDUALS`, or `residual` itself if it is a class or callable `(position, conv, rngs)
    -> Residual`.
    """
    return initializers.lookup("residual", residual, RESIDUALS)
