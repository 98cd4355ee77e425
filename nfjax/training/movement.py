"""What every n-th step tells of itself besides its loss: how far it moves the weights of each group, the gradients, and
the gradient's noise where the batch is computed in parts.

It comes out of the step that is taken, by a branch of its program, and costs the other steps nothing but, in parts, one
look at the gradient of each. Where nobody asks for it, the program has no such branch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from nfjax import spp

if TYPE_CHECKING:
    from nfjax.training.state import TrainState
    from nfjax.training.step import Sums, Task

NOISE = ("gradient_noise/variance", "gradient_noise/square_norm", "gradient_noise/scale")


def measure(state: TrainState, params: Any, grads: Any, sums: Sums, batch_size: int, task: Task) -> jax.Array:
    """What a step tells, float32 [n], by `names`; zeros if it is not one of those that do.

    Args:
        state: Before the step.
        params: After it.
        grads: Of the batch, before anything is clipped.
        sums: Of the batch; "part_square" is taken out of it.
        batch_size: Its examples.
        task: What is trained.
    """
    parts, part_squares = _parts(task), sums.pop("part_square", None)

    def tell(before: Any, after: Any, grads: Any) -> jax.Array:
        found = [*spp.update_ratios(before, after).values(), *spp.gradient_norms(grads).values()]
        if part_squares is not None:
            found += spp.gradient_noise(part_squares / parts, square(grads), parts, batch_size)
        return jnp.stack(found)

    length = jax.eval_shape(tell, state.params, params, grads).shape
    due = (state.step + 1) % task.signal_every == 0
    return jax.lax.cond(due, tell, lambda *_: jnp.zeros(length, jnp.float32), state.params, params, grads)


def names(params: Any, task: Task) -> list[str]:
    """Of what `measure` tells, in its order."""
    groups = list(jax.eval_shape(spp.gradient_norms, params))
    own = [f"{what}/{group}" for what in ("update_ratio", "gradient_norm") for group in groups]
    return [*own, *(NOISE if has_noise(task) else ())]


def scalars(params: Any, task: Task, told: np.ndarray) -> dict[str, float]:
    """By name, what of it is finite: weights that were all zero have no ratio, and a gradient that drowns in its noise
    has no scale.
    """
    by_name = zip(names(params, task), map(float, told), strict=True)
    return {name: value for name, value in by_name if math.isfinite(value)}


def has_noise(task: Task) -> bool:
    """Whether there are gradients of parts of the batch, to be compared with that of the whole."""
    return task.signal_every is not None and _parts(task) > 1


def _parts(task: Task) -> int:
    return task.parts * task.mesh.size


def square(tree: Any) -> jax.Array:
    """The squared L2 norm. As products with themselves, in full precision, leaves are read once and nothing is written:
    XLA's sums of squares take five times as long on a CPU.
    """

    def of(leaf: jax.Array) -> jax.Array:
        axes = tuple(range(leaf.ndim))
        return jax.lax.dot_general(leaf, leaf, ((axes, axes), ((), ())), precision="highest")

    return sum(map(of, jax.tree.leaves(tree)))
