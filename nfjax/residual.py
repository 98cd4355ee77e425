"""Residual rules: how a block joins its shortcut and its branch.

Every rule is x_l = a h(x_{l-1}) + b f_l(x_{l-1} / beta), and states its own a, b and beta: numbers that depend on where
the block stands in the network, or scalars that are learned. The paper's rules (eq. 5) have a = b = c and beta = 1.
Where a block changes resolution or width, the shortcut h is a strided 1x1 convolution under every rule (the paper's
footnote 2).

The rules of others are here in the same form. Some of them also change what is not a coefficient, such as the
convolutions or the head, and are a `Scheme`: a rule and these parts. Where a transition of theirs has another shortcut
than ours, ours is taken.

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

from nfjax import _names, initializers, layers
from nfjax.layers import ConvFactory

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


# ---------------------------------------------------------------- the rules of others


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A rule, `position -> Rule`, and what its authors change in the network besides.

    Attributes:
        rule: Of the blocks.
        conv: In place of the network's convolution, None for that one.
        scaled_activation: Whether the activation is multiplied by the square root of its channel gain, so that its
            output has variance 1 for an input from N(0, 1).
        biases: Whether a learned number is added before every activation and before what follows it.
        head_init: Draws the kernel of the dense layer, None for the network's own.
    """

    rule: RuleFunction
    conv: ConvFactory | None = None
    scaled_activation: bool = False
    biases: bool = False
    head_init: initializers.Initializer | None = None

    def __call__(self, position: Position) -> Rule:
        return self.rule(position)


def skipinit(position: Position) -> Rule:
    """x + alpha f(x), alpha a learned scalar per block that starts at 0 (De and Smith 2020).

    For pre-activation blocks it is also ReZero (Bachlechner et al. 2021).
    """
    del position
    return Rule(b=Learned("alpha", 0.0))


def rescalenet(position: Position) -> Rule:
    """sqrt((l - 1 + k) / (l + k)) x + sqrt(1 / (l + k)) f(x) in the l-th of L blocks, k = L - 1: a^2 + b^2 = 1 (Shao et
    al. 2020, with k as in their program).
    """
    l, k = position.index + 1, position.num_blocks - 1  # noqa: E741 - as in the formula
    return Rule(math.sqrt((l - 1 + k) / (l + k)), math.sqrt(1 / (l + k)))


def depthscale(position: Position) -> Rule:
    """x + f(x) / sqrt(L), of L blocks (Hayou et al. 2021, Stable ResNet; Yang et al. 2024, depth-muP)."""
    return Rule(b=position.num_blocks**-0.5)


def mpsum(position: Position, t: float = 0.3) -> Rule:
    """((1 - t) x + t f(x)) / sqrt((1 - t)^2 + t^2), the magnitude-preserving sum (Karras et al. 2024).

    Its square keeps a^2 + b^2 = 1; t = 1/2 is `idshort`.
    """
    del position
    norm = math.hypot(1 - t, t)
    return Rule((1 - t) / norm, t / norm)


def _fixup(position: Position) -> Rule:
    scale = position.num_blocks ** (-1 / (2 * position.num_convolutions - 2))
    return Rule(b=Learned("scale", 1.0), branch_scales=(scale,) * (position.num_convolutions - 1) + (0.0,))


def _nf(position: Position, alpha: float = 0.2) -> Rule:
    """beta^2 is the expected variance of the block's input. A transition's shortcut reads what was divided by it, so
    that the variance is 1 + alpha^2 behind it, and grows by alpha^2 in every other block.
    """
    stages, stage, index = position.stage_sizes, position.stage, position.index_in_stage
    grown = index if index > 0 or stage == 0 else stages[stage - 1]
    return Rule(b=alpha, beta=math.sqrt(1 + grown * alpha**2))


# x + scale f(x). The branch's last kernel and the classifier start at 0, its other kernels at L^(-1/(2m-2)) times the
# initializer's, for L blocks of m convolutions; scale is learned, from 1, and so is a number before every convolution,
# activation and the classifier, from 0 (Zhang et al. 2019, who train these numbers at a tenth of the learning rate).
fixup = Scheme(_fixup, biases=True, head_init=jax.nn.initializers.zeros)

# x + 0.2 f(x / beta), beta^2 the expected variance of x, with kernels that are standardized at every use and
# activations that are scaled by their gain (Brock et al. 2021a, NF-ResNet; the head as in their program).
nf = Scheme(
    _nf,
    conv=layers.scaled_standardized_convolution,
    scaled_activation=True,
    head_init=jax.nn.initializers.normal(0.01),
)


RESIDUALS: dict[str, RuleFunction] = {
    "identity": identity,
    "idshort": idshort,
    "learnscalar": learnscalar,
    "convshort": convshort,
    "conv": conv,
    "skipinit": skipinit,
    "fixup": fixup,
    "rescalenet": rescalenet,
    "nf": nf,
    "depthscale": depthscale,
    "mpsum": mpsum,
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
