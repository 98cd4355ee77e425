"""What is measured of a block: the one place where statistics are defined.

A statistic is one line in `STATISTICS`, a function of what was observed of all blocks. What it needs of a tensor
besides what there is, is one field of `Moments` and one line in `moments`. Profiles, tables, files and quantiles
follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Blocks of which the branch makes up less than this share of the output's variance are the identity, as far as a
# signal goes. A hundred pre-normalized blocks, each of which adds as much as the first, still have ten times that.
IDENTITY = 1e-3
_UNKNOWN = -1.0  # of a share: a NaN would stop a program under JAX's debugging switch
EXAMPLES = 16  # of which the likeness is measured
_NO_COSINE = 2.0  # likewise, of a cosine


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Of one tensor [..., C], float32 scalars on the device; of several, float64 [n] on the host (`on_host`).

    All but the scale are of the tensor divided by it: squares then neither overflow nor vanish where the tensor does
    not.

    Attributes:
        reached: 1; 0 where no tensor came.
        scale: The largest magnitude.
        sq_mean: The squared mean of each channel, averaged.
        between: The variance of the channels' means.
        within: The variance within each channel, averaged.
    """

    reached: Any
    scale: Any
    sq_mean: Any
    between: Any
    within: Any

    @property
    def var(self) -> np.ndarray:
        """The variance of the whole tensor."""
        return (self.within + self.between) * self.scale**2

    @property
    def channel_sq_mean(self) -> np.ndarray:
        """The squared mean of each channel, averaged over channels."""
        return self.sq_mean * self.scale**2

    @property
    def channel_var(self) -> np.ndarray:
        """The variance within each channel, averaged over channels."""
        return self.within * self.scale**2


NOTHING = Moments(*[np.float32(0)] * len(dataclasses.fields(Moments)))


def moments(x: jax.Array) -> Moments:
    """The population moments of a tensor [..., C], accumulated in float32."""
    axes = tuple(range(x.ndim - 1))
    largest = jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    # Behind each barrier x is read anew: XLA would otherwise store x / scale, which takes three times as long.
    x, scale = jax.lax.optimization_barrier((x, scale))
    means = (x.astype(jnp.float32) / scale).mean(axis=axes, keepdims=True)
    x, scale, means = jax.lax.optimization_barrier((x, scale, means))
    variances = jnp.square(x.astype(jnp.float32) / scale - means).mean(axis=axes)
    return Moments(
        reached=jnp.float32(1),
        scale=scale,
        sq_mean=jnp.square(means).mean(),
        between=jnp.var(means),
        within=variances.mean(),
    )


def change(given: Sequence[jax.Array], out: jax.Array, measured: Moments) -> jax.Array:
    """How little a block changes what it is given.

    Args:
        given: The arrays given to the block that have its output's shape.
        out: Its output.
        measured: The moments of the output.

    Returns:
        Var[out - x] / Var[out], a float32 scalar, for the array x that lies closest to the output; negative where there
        is none, or the output has no variance.
    """
    variances = []
    for x in given:
        difference = out.astype(jnp.float32) / measured.scale - x.astype(jnp.float32) / measured.scale
        variances.append(jnp.maximum(jnp.square(difference).mean() - jnp.square(difference.mean()), 0.0))
    if not variances:
        return jnp.float32(_UNKNOWN)
    total = measured.between + measured.within
    share = functools.reduce(jnp.fmin, variances) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, share, _UNKNOWN)


def similarity(out: jax.Array, measured: Moments) -> jax.Array:
    """How much alike the activations of different examples are.

    Args:
        out: Of a block, [B, ...].
        measured: Its moments.

    Returns:
        The cosine between the activations of two examples, without taking off a mean, averaged over all pairs of the
        first EXAMPLES: a float32 scalar, larger than 1 where there are no two that are not zero. Its course over the
        depth is the "C map" (Poole et al. 2016; Martens et al. 2021).
    """
    if out.ndim < 2 or out.shape[0] < 2 or not out.size:
        return jnp.float32(_NO_COSINE)
    flat = out[:EXAMPLES].astype(jnp.float32) / measured.scale
    flat = flat.reshape(flat.shape[0], -1)
    products = jnp.dot(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sqrt(jnp.diagonal(products))
    both = norms[:, None] * norms[None, :]
    pairs = (both > 0) & ~jnp.eye(len(flat), dtype=bool)
    cosines = jnp.where(pairs, products / jnp.where(pairs, both, 1.0), 0.0)
    number = pairs.sum(dtype=jnp.float32)
    return jnp.where(number > 0, cosines.sum() / jnp.maximum(number, 1.0), _NO_COSINE)


# ---------------------------------------------------------------- on the host


@dataclasses.dataclass(frozen=True)
class Observed:
    """What was observed of all blocks of a network in one pass, in execution order.

    Attributes:
        output: Moments of the blocks' outputs.
        gradient: Of the gradient there.
        branch: Of the residual branches before they are added; NaN where a block has none.
        has_branch: Whether it has one, [blocks].
        change: By `change`, [blocks]; NaN where it is not known.
        similarity: By `similarity`, likewise.
        dead: By `_activations.by_block`, likewise.
        saturated: Likewise.
    """

    output: Moments
    gradient: Moments
    branch: Moments
    has_branch: np.ndarray
    change: np.ndarray
    similarity: np.ndarray
    dead: np.ndarray
    saturated: np.ndarray


def on_host(stacked: Moments) -> Moments:
    """Moments of n tensors, [n], as float64."""
    return jax.tree.map(lambda field: np.asarray(field, np.float64), stacked)


def changes_on_host(changes: Any) -> np.ndarray:
    """What `change` gave for n blocks, [n], as float64; NaN where it is not known."""
    known = np.asarray(changes, np.float64)
    return np.where(known == _UNKNOWN, np.nan, known)


def observed(
    forward: Moments,
    changes: Any,
    similarities: Any,
    idle: tuple[np.ndarray, np.ndarray],
    gradient: Moments,
    blocks: Sequence[int],
    branches: Sequence[int],
) -> Observed:
    """From what a pass computed.

    Args:
        forward: Moments of blocks and branches together, [n].
        changes: By `change`, [blocks].
        similarities: By `similarity`, [blocks].
        idle: Dead and saturated shares, by `_activations.by_block`.
        gradient: Moments of the gradient at the blocks, [blocks].
        blocks: Where in `forward` each block stands.
        branches: Where each block's branch does, -1 for none.
    """
    forward = on_host(forward)
    similarities = np.asarray(similarities, np.float64)
    has_branch = np.array(branches) >= 0
    return Observed(
        output=jax.tree.map(lambda field: field[list(blocks)], forward),
        gradient=on_host(gradient),
        branch=jax.tree.map(lambda field: np.where(has_branch, field[list(branches)], np.nan), forward),
        has_branch=has_branch,
        change=changes_on_host(changes),
        similarity=np.where(similarities == _NO_COSINE, np.nan, similarities),
        dead=idle[0],
        saturated=idle[1],
    )


def _branch_share(seen: Observed) -> np.ndarray:
    """Var[branch] / Var[x_l]."""
    share = np.where(seen.has_branch, seen.branch.var / seen.output.var, seen.change)
    # What is called a branch may be scaled where it is added: an output that equals the input decides.
    return np.where(seen.change < IDENTITY, np.fmin(share, seen.change), share)


# name -> function of what was observed, float64 [blocks]. A profile has an attribute of each name; the order is that of
# the columns.
STATISTICS: dict[str, Callable[[Observed], np.ndarray]] = {
    "forward_var": lambda seen: seen.output.var,
    "backward_var": lambda seen: seen.gradient.var,
    "channel_sq_mean": lambda seen: seen.output.channel_sq_mean,
    "channel_var": lambda seen: seen.output.channel_var,
    "branch_var": lambda seen: seen.branch.channel_var,
    "branch_share": _branch_share,
    "similarity": lambda seen: seen.similarity,
    "dead": lambda seen: seen.dead,
    "saturated": lambda seen: seen.saturated,
}


def compute(seen: Observed) -> dict[str, np.ndarray]:
    """Every statistic by name, float64 [blocks]."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return {name: np.asarray(function(seen), np.float64) for name, function in STATISTICS.items()}
