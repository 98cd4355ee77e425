"""Residual rules: how a block joins its shortcut and its branch.

Every rule is x_l = a h(x_{l-1}) + b f_l(x_{l-1} / beta), and states its own a, b and beta: numbers that depend on where
the block stands in the network, or scalars that are learned. The paper's rules (eq. 5) have a = b = c and beta = 1.
Where a block changes resolution or width, the shortcut h is a strided 1x1 convolution under every rule (the paper's
footnote 2).

The shortcut convolution reads z = ReLU(x / beta) (with batch norm ReLU(BN(x))), as in the pre-activation ResNet of He
et al. 2016b. The paper writes W_s x, but only behind a ReLU does He's fan-out initialization give Var[dh/dx] = 1:
reading x itself, it would be 2, and the gradient would grow by 3/2 in every block.

A new rule is one function `position -> Rule` and one line in `RESIDUALS`; networks, training, closed forms and plots
read its coefficients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfjax import _names

ConvFactory = Callable[..., nnx.Module]
SQRT_HALF = math.sqrt(0.5)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a block stands in its network: all that a rule may depend on.

    Attributes:
        stage_sizes: Blocks in each stage of the network.
        stage: Of the block, counted from 0.
        index_in_stage: Of the block, counted from 0.
        num_convolutions: Of its branch.
        in_features: Channels of its input.
        out_features: Channels of its output.
        stride: Of the block.
        spatial_size: Height and width of its input in pixels.
    """

    stage_sizes: tuple[int, ...]
    stage: int
    index_in_stage: int
    num_convolutions: int
    in_features: int
    out_features: int
    stride: int
    spatial_size: tuple[int, int]

    @property
    def index(self) -> int:
        """The number of the block in the network, counted from 0."""
        return sum(self.stage_sizes[: self.stage]) + self.index_in_stage

    @property
    def num_blocks(self) -> int:
        """L, the residual blocks of the network."""
        return sum(self.stage_sizes)

    @property
    def transition(self) -> bool:
        """Whether the block changes resolution or width."""
        return self.stride != 1 or self.in_features != self.out_features


@dataclasses.dataclass(frozen=True)
class Learned:
    """A coefficient that is learned: `factor` times a scalar parameter of this name, which starts at `start`."""

    name: str
    start: float
    factor: float = 1.0


Coefficient = float | Learned


@dataclasses.dataclass(frozen=True)
class Rule:
    """x_l = a h(x_{l-1}) + b f(x_{l-1} / beta), for one block.

    Attributes:
        a: Of the shortcut, a number or `Learned`.
        b: Of the branch, likewise.
        beta: By which the branch's input is divided, likewise; that of a shortcut convolution, too.
        convolution: Whether the shortcut is a 1x1 convolution where the block changes nothing; a transition always has
            one.
        branch_scales: By which the initializer's kernels in the branch are multiplied, from the first to the last; 1
            for all of them if it is left out.
    """

    a: Coefficient = 1.0
    b: Coefficient = 1.0
    beta: Coefficient = 1.0
    convolution: bool = False
    branch_scales: tuple[float, ...] | None = None


RuleFunction = Callable[[Position], Rule]


def identity(position: Position) -> Rule:
    """x + f(x): the classical rule (eq. 4)."""
    del position
    return Rule()


def idshort(position: Position) -> Rule:
    """sqrt(1/2) (x + f(x)): scaled identity shortcut (section 3.3)."""
    del position
    return Rule(SQRT_HALF, SQRT_HALF)


def learnscalar(position: Position) -> Rule:
    """sqrt(1/2) (alpha x + f(x)), alpha a learned scalar per block that starts at 1 (section 3.3)."""
    return Rule(SQRT_HALF if position.transition else Learned("alpha", 1.0, SQRT_HALF), SQRT_HALF)


def convshort(position: Position) -> Rule:
    """sqrt(1/2) (W_s ReLU(x) + f(x)), a 1x1 convolution in every block (section 3.3)."""
    del position
    return Rule(SQRT_HALF, SQRT_HALF, convolution=True)


def conv(position: Position) -> Rule:
    """W_s ReLU(x) + f(x): the classical sum with a convolution in every block, as the BatchNorm rows of the paper's
    tables count it.
    """
    del position
    return Rule(convolution=True)


RESIDUALS: dict[str, RuleFunction] = {
    "identity": identity,
    "idshort": idshort,
    "learnscalar": learnscalar,
    "convshort": convshort,
    "conv": conv,
}


def get(residual: str | RuleFunction) -> RuleFunction:
    """The rule of that name in `RESIDUALS`, or `residual` itself if it is a function `position -> Rule`.

    Raises:
        ValueError: It is neither.
        TypeError: It is a class.
    """
    if isinstance(residual, type):
        raise TypeError(f"residual={residual.__name__} is a class: expected a function position -> residual.Rule")
    return _names.lookup("residual", residual, RESIDUALS)


class Residual(nnx.Module):
    """What a rule adds to a block: the shortcut convolution, if there is one, and the scalars that are learned."""

    def __init__(self, rule: Rule, position: Position, conv: ConvFactory, rngs: nnx.Rngs):
        """Builds it.

        Args:
            rule: Of this block.
            position: Where the block stands.
            conv: `(in_features, out_features, kernel_size, stride, spatial_size, rngs=) -> layer`, set up by the
                network.
            rngs: Of the kernel.
        """
        self.rule = rule
        self.shortcut = (
            conv(position.in_features, position.out_features, 1, position.stride, position.spatial_size, rngs=rngs)
            if position.transition or rule.convolution
            else None
        )
        for coefficient in (rule.a, rule.b, rule.beta):
            if isinstance(coefficient, Learned):
                setattr(self, coefficient.name, nnx.Param(jnp.full((), coefficient.start, jnp.float32)))

    def coefficients(self, dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
        """(a, b, beta) as they are now: Python numbers, and arrays [] of this dtype where they are learned."""

        def now(coefficient: Coefficient) -> float | jax.Array:
            if not isinstance(coefficient, Learned):
                return coefficient
            return (coefficient.factor * getattr(self, coefficient.name)[...]).astype(dtype)

        return now(self.rule.a), now(self.rule.b), now(self.rule.beta)
