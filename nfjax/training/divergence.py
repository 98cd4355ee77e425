"""Where a step stopped being finite: the first layer whose output did, or else whose gradient did.

The state is still that from before the step, and the batch follows from the step's number: both are had again exactly,
and measured layer by layer, in the parts in which they were computed. It is for a message: it never raises, and what
it takes is bounded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfjax import spp
from nfjax.runs.progress import say
from nfjax.training import losses, rng, sharding, step
from nfjax.training.loader import Loader
from nfjax.training.state import Batch, TrainState
from nfjax.training.step import Examples, Task

LONGEST = 60.0  # seconds after which no further part of the batch is begun
PARTS = 32  # of the batch that are looked at, at most
NETWORK = "network"  # the attribute that holds it, below


class Loss(nnx.Module):
    """A network with its loss behind it: targets are inputs then, and serve any part of a batch without compiling."""

    def __init__(self, network: nnx.Module, smoothing: float):
        self.network, self.smoothing = network, smoothing

    def __call__(self, images: jax.Array, targets: Any, mask: jax.Array, count: jax.Array) -> jax.Array:
        """The part's share of the mean loss over `count` examples, as a training step has it."""
        logits = self.network(images).astype(jnp.float32)
        each = sum(weights * losses.cross_entropy(logits, labels, self.smoothing) for labels, weights in targets)
        return (each * mask).sum() / count


def holds_parameters(path: str, module: Any) -> bool:
    """Every layer that is trained, and what is made of such: where a sum overflows, the block that makes it is named.

    The predicate of the modules that are measured.
    """
    del path
    return bool(jax.tree.leaves(nnx.state(module, nnx.Param))) if isinstance(module, nnx.Module) else True


@dataclasses.dataclass(frozen=True)
class Place:
    """A step that was not finite, and what is needed to compute it once more.

    Attributes:
        number: Of the step.
        state: From before it.
        task: What is trained.
        loader: Has its images.
        key: Of the run's stream "training".
        hurried: Tells whether somebody wants the run to end.
    """

    number: int
    state: TrainState
    task: Task
    loader: Loader
    key: jax.Array
    hurried: Callable[[], bool]


def explain(place: Place, loss: float, grad_norm: float) -> str:
    """In half a sentence, what stopped being finite, "; ..."; empty if that is not known.

    Args:
        place: The step.
        loss: Of the step.
        grad_norm: Likewise.
    """
    if np.isfinite(loss) and np.isfinite(grad_norm):
        return "; loss and gradient are finite, the update that the optimizer makes of them is not"
    try:
        say(
            f"the loss or its gradient is not finite at step {place.number:,}: looking for where it began (Ctrl-C "
            "skips it)"
        )
        return f"; {find(place, bool(np.isfinite(loss)))}"
    except (Exception, KeyboardInterrupt) as error:  # what ended the run is worth telling, and not this
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        return "" if isinstance(error, KeyboardInterrupt) else f"; where it began could not be measured ({reason})"


def find(place: Place, loss_is_finite: bool) -> str:
    """What stopped being finite in a step."""
    begin, state, task, number = time.perf_counter(), place.state, place.task, place.number
    for what, tree in (("parameter", state.params), ("kept value", state.batch_stats)):
        for path, (finite, _) in _by_path(_sizes(tree)).items():
            if not finite:
                return f"before this step the {what} {path} was no longer finite"
    place.loader.close()  # nothing more is trained on
    with contextlib.closing(place.loader.train(number, number + 1)) as batches:
        batch = next(batches)
    key = rng.of_step(place.key, jnp.int32(number))
    examples = _examples(batch, key, task=task)
    params, batch_stats = sharding.everywhere((state.params, state.batch_stats))
    measure = _measurement(task, params, batch_stats)
    count = np.maximum(np.asarray(sharding.everywhere(examples["mask"])).sum(), 1).astype(np.float32)
    looked_at, parts = 0, list(_parts(task, len(batch.mask), key))
    for rows, noise in parts[:PARTS]:
        found = measure(sharding.everywhere(_taken(examples, rows)), noise, count)
        looked_at += 1
        if _of_first(found is not None):
            return str(found) if found is not None else "it began in a part of the batch that another process saw"
        if _of_first(place.hurried() or time.perf_counter() - begin > LONGEST):
            break
    if looked_at < len(parts):
        return f"in the first {looked_at} of the {len(parts)} parts of the batch every layer is finite, both ways"
    if not loss_is_finite:
        return "the output of every layer is finite, the loss of the network's output is not"
    return _of_parameters(_by_path(_gradient_sizes(state, batch, key, task=task)))


def _of_parameters(sizes: dict[str, tuple[bool, float]]) -> str:
    for path, (finite, _) in sizes.items():
        if not finite:
            return f"activations and their gradients are finite, the gradient of the parameter {path} is not"
    path = max(sizes, key=lambda name: sizes[name][1])
    largest = sizes[path][1]
    if largest > np.sqrt(np.finfo(np.float32).max / 1e3):
        return f"every gradient is finite, but not the square of its norm: that of {path} has entries of {largest:.3g}"
    return "computed once more, layer by layer, everything is finite"


# ---------------------------------------------------------------- one part of the batch


def _measurement(task: Task, params: Any, batch_stats: Any) -> Callable[..., spp.Breakdown | None]:
    """`(part, noise, count) -> where it breaks down`. Compiled once; where the layers of a network cannot all be
    measured, its blocks are.
    """
    monitors: list[spp.Monitor] = []

    def measure(part: Examples, noise: jax.Array | None, count: np.ndarray) -> spp.Breakdown | None:
        model = Loss(task.network.model(params, batch_stats, noise), task.label_smoothing)
        inputs = (part["image"], part["targets"], part["mask"], jnp.asarray(count))
        for where, level in ((holds_parameters, "layer"), (None, "block")):
            try:
                monitors[:] = monitors or [spp.Monitor(*inputs, where=where, loss=lambda loss: loss, level=level)]
                monitors[0].inputs = inputs
                return _unwrapped(spp.find_breakdown(monitors[0](model)))
            except ValueError:  # a layer inside of a conditional
                monitors.clear()
                if where is None:
                    raise
        raise AssertionError("unreachable")

    return measure


def _unwrapped(found: spp.Breakdown | None) -> spp.Breakdown | None:
    """With paths in the network, not in what holds it here."""

    def path(given: str | None) -> str | None:
        return given and ("the network" if given == NETWORK else given.removeprefix(f"{NETWORK}/"))

    return found and spp.Breakdown(path(found.path), found.kind, path(found.before), found.std)


def _parts(task: Task, batch_size: int, key: jax.Array) -> Iterator[tuple[np.ndarray, jax.Array | None]]:
    """(rows, key of the network's own noise) of what is computed at once in a step: see `step`."""
    axes = [axis for axis in sharding.AXES if task.mesh.shape[axis] > 1]
    shape = [task.mesh.shape[axis] for axis in axes]
    devices = int(np.prod(shape, dtype=int))
    random = bool(jax.tree.leaves(task.network.random))
    for device, rows in enumerate(np.split(np.arange(batch_size, dtype=np.int32), devices)):
        noise = rng.stream(key, "noise") if random else None
        for place in np.unravel_index(device, shape) if random and shape else ():
            noise = jax.random.fold_in(noise, int(place))
        for part in range(task.parts):
            own = noise if noise is None or task.parts == 1 else jax.random.fold_in(noise, part)
            yield rows[part :: task.parts], own


# ---------------------------------------------------------------- compiled pieces


@functools.partial(jax.jit, static_argnames="task")
def _examples(batch: Batch, key: jax.Array, *, task: Task) -> Examples:
    return step.make_examples(batch, key, task)


@jax.jit
def _taken(examples: Examples, rows: jax.Array) -> Examples:
    return jax.tree.map(lambda x: x[rows], examples)


@jax.jit
def _sizes(tree: Any) -> Any:
    """(whether it is finite, largest magnitude) of each floating-point array."""

    def of(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            return jnp.bool_(True), jnp.float32(0)
        return jnp.isfinite(leaf).all(), jnp.abs(leaf).max().astype(jnp.float32)

    return jax.tree.map(of, tree)


@functools.partial(jax.jit, static_argnames="task")
def _gradient_sizes(state: TrainState, batch: Batch, key: jax.Array, *, task: Task) -> Any:
    return _sizes(step.differentiate(state, step.make_examples(batch, key, task), key, task)[0])


def _by_path(sizes: Any) -> dict[str, tuple[bool, float]]:
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(sharding.everywhere(sizes)), is_leaf=_is_pair)
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): (bool(finite), float(largest))
        for path, (finite, largest) in found
    }


def _is_pair(node: Any) -> bool:
    return isinstance(node, tuple)


def _of_first(value: bool) -> bool:
    """What the first process says: all of them go the same way."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))
