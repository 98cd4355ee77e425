"""What every n-th step tells of itself besides its loss: how far it moves the weights of each group, the gradients, and
the gradient's noise where the batch is computed in parts.

It comes out of the step that is taken, by a branch of its program, and costs the other steps nothing but, in parts, one
look at the gradient of each. Where nobody asks for it, the program has no such branch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfjax import spp

NOISE = ("gradient_noise/variance", "gradient_noise/square_norm", "gradient_noise/scale")


@dataclasses.dataclass(frozen=True)
class Parts:
    """Of a batch, whose gradients can be compared with that of the whole.

    Attributes:
        square: Mean over the parts of the squared norm of a part's mean gradient; float32 [].
        count: How many there are, two or more.
        batch_size: Examples in the whole batch.
    """

    square: Any
    count: int
    batch_size: int


def measure(due: jax.Array, before: Any, after: Any, grads: Any, parts: Parts | None) -> jax.Array:
    """What a step tells, float32 [n], by `names`; zeros if it is not one of those that do.

    Args:
        due: Whether it is; bool [].
        before: Parameters before the step.
        after: And after it.
        grads: Of the batch, before anything is clipped.
        parts: None where the batch is computed as one.
    """

    def tell(before: Any, after: Any, grads: Any) -> jax.Array:
        found = [*spp.update_ratios(before, after).values(), *spp.gradient_norms(grads).values()]
        if parts is not None:
            found += spp.gradient_noise(parts.square, square(grads), parts.count, parts.batch_size)
        return jnp.stack(found)

    shape = jax.eval_shape(tell, before, after, grads).shape
    return jax.lax.cond(due, tell, lambda *_: jnp.zeros(shape, jnp.float32), before, after, grads)


def names(params: Any, has_parts: bool) -> list[str]:
    """Of what `measure` tells, in its order."""
    groups = list(jax.eval_shape(spp.gradient_norms, params))
    own = [f"{what}/{group}" for what in ("update_ratio", "gradient_norm") for group in groups]
    return [*own, *(NOISE if has_parts else ())]


def scalars(params: Any, has_parts: bool, told: np.ndarray) -> dict[str, float]:
    """By name, what of it is finite: weights that were all zero have no ratio, and a gradient that drowns in its noise
    has no scale.
    """
    by_name = zip(names(params, has_parts), map(float, told), strict=True)
    return {name: value for name, value in by_name if math.isfinite(value)}


def square(tree: Any) -> jax.Array:
    """The squared L2 norm. As products with themselves, in full precision, leaves are read once and nothing is written:
    XLA's sums of squares take five times as long on a CPU.
    """

    def of(leaf: jax.Array) -> jax.Array:
        axes = tuple(range(leaf.ndim))
        return jax.lax.dot_general(leaf, leaf, ((axes, axes), ((), ())), precision="highest")

    return sum(map(of, jax.tree.leaves(tree)))
