"""One step of training, jitted, and one of evaluation, which `evaluation` compiles.

A step knows no data set and no settings: what stays the same from step to step is a `Task`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from nfjax.training import losses, movement, patterns, rng, sharding
from nfjax.training.networks import Network
from nfjax.training.state import Batch, Steps, TrainState

# Of a batch: "loss", "correct", "count"; training adds "grad_norm" and, where it is watched, "signal".
Sums = dict[str, Any]
# (key of the step, uint8 [B, H, W, 3]) -> float [B, H, W, 3]
Preprocess = Callable[[jax.Array, jax.Array], jax.Array]
# (key of the step, float images, mask [B]) -> (images, partner int32 [B], weight float32 [B]), see nfjax.augment.mixup
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
# What a loss needs: {"image" float [B, H, W, 3], "targets" [(labels int32 [B], weights float32 [B]), ...],
# "label" int32 [B] for the accuracy, "mask" float32 [B]}
Examples = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is trained and how: all that a compiled step has built in.

    Attributes:
        network: Of which the parameters are trained.
        optimizer: Turns gradients into updates.
        preprocess: From the images of a batch to what the network sees.
        mix: Mixes examples after that, None for no mixing.
        label_smoothing: Share of the target that is spread over all classes.
        ema_decay: Of the average of the weights, None for no average.
        parts: Of the batch, whose gradients are computed one after the other and added, which takes the memory of one.
            They are drawn and augmented together, so without batch norm this is the step of the whole batch; batch
            norm sees the parts.
        unroll: Whether the parts stand one after the other in the program, and are no loop in it.
        signal_every: Steps from one to the next that tells how far it moves the weights, None for none.
        frozen: Patterns of what stays as it is, as the network and the optimizer have them.
        class_weights: Factor of the loss of an example by its class, [C]; None for 1. The loss is divided by the number
            of examples, not by the sum of their weights, which would give a batch of frequent classes more.
        mesh: Of the devices over which a batch is divided, all there are by default.
    """

    network: Network
    optimizer: optax.GradientTransformation
    preprocess: Preprocess
    mix: Mix | None = None
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    parts: int = 1
    unroll: bool = False
    signal_every: int | None = None
    frozen: tuple[str, ...] = ()
    class_weights: tuple[float, ...] | None = None
    mesh: Mesh = dataclasses.field(default_factory=sharding.make)

    @property
    def has_noise(self) -> bool:
        """Whether the gradients of parts of the batch are there, and wanted, to be compared with that of the whole."""
        return self.signal_every is not None and self.parts * self.mesh.size > 1


@functools.partial(jax.jit, static_argnames="task", donate_argnames="state")
def train_step(state: TrainState, batch: Batch, key: jax.Array, *, task: Task) -> tuple[TrainState, Sums]:
    """One step of training. The state's memory is used for the new one.

    The loss is the mean over the examples whose mask is 1: one that could not be read counts for nothing (batch norm,
    where there is any, sees it black). Where examples are mixed, "correct" counts predictions of the class that has
    the greater part.

    A step whose loss, gradient or update is not finite leaves the state as it was, but for `diverged`, and so does
    every later one: nothing is trained on after a NaN, however many steps were already on their way to the device.

    Args:
        state: Before the step.
        batch: Its examples.
        key: Of the run's stream "training", the same for every step.
        task: What is trained.

    Returns:
        The state after the step and the batch's sums, {"loss", "correct", "count", "grad_norm"}, each [], and where it
        is watched "signal", see `movement`.
    """
    key = rng.of_step(key, state.step)
    grads, loss, sums, batch_stats = differentiate(state, make_examples(batch, key, task), key, task)
    grad_norm = _norm(grads)
    updates, opt = task.optimizer.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(_norm(updates))
    after = state.replace(params=params, batch_stats=batch_stats, opt=opt, step=state.step + 1)
    if task.ema_decay is not None:
        averaged = _averaged(state, after, task.ema_decay)
        # An average of equal numbers may differ from them in the last bit.
        held = {name: patterns.held(task.frozen, state.ema[name], averaged[name]) for name in averaged}
        after = after.replace(ema=held)
    if task.signal_every is not None:
        count = task.parts * task.mesh.size
        parts = movement.Parts(sums.pop("part_square") / count, count, batch.mask.size) if task.has_noise else None
        due = (state.step + 1) % task.signal_every == 0
        sums["signal"] = movement.measure(due, state.params, params, grads, parts)
    good = finite & ~state.diverged
    state = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state).replace(diverged=~good)
    state = jax.lax.with_sharding_constraint(state, sharding.of_state(state, task.mesh))
    return state, sums | {"grad_norm": grad_norm}


@functools.partial(jax.jit, static_argnames="task", donate_argnames="state")
def train_steps(state: TrainState, steps: Steps, key: jax.Array, *, task: Task) -> tuple[TrainState, Sums]:
    """Several steps of training in one dispatch: as many `train_step`s, whose sums are stacked to [n].

    The number of steps is an argument of the compiled loop.
    """

    def take(state: TrainState, number: Any) -> tuple[TrainState, Sums]:
        batch = gather(steps.examples, steps.indices[number], mesh=task.mesh)
        return train_step.__wrapped__(state, batch, key, task=task)  # its buffers are not its own to donate

    def body(number: jax.Array, carry: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
        state, sums = take(carry[0], number)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return state, jax.tree.map(put, carry[1], sums)

    _, shapes = jax.eval_shape(take, state, 0)
    stacked = jax.tree.map(lambda x: jnp.zeros((len(steps.indices), *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, steps.count, body, (state, stacked))


@functools.partial(jax.jit, static_argnames="mesh")
def gather(examples: Batch, indices: jax.Array, mask: jax.Array | None = None, *, mesh: Mesh) -> Batch:
    """A batch of examples that lie on the device, by their indices int32 [B], divided over the devices.

    mask: float32 [B], ones if None.
    """
    batch = jax.tree.map(lambda x: x[indices], examples)
    return jax.lax.with_sharding_constraint(
        batch if mask is None else batch.replace(mask=mask), sharding.by_batch(mesh)
    )


def eval_step(
    params: Any, batch_stats: Any, batch: Batch, *, network: Network, normalize: Callable[[jax.Array], jax.Array]
) -> Sums:
    """The sums of a batch over the examples whose mask is 1, without label smoothing.

    normalize: uint8 [B, H, W, 3] to what the network sees.
    """
    logits = network.predict(params, batch_stats, normalize(batch.image))
    return losses.sums(losses.cross_entropy(logits, batch.label), logits, batch.label, batch.mask)


def predict_step(
    params: Any, batch_stats: Any, batch: Batch, *, network: Network, normalize: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(labels int32 [B], predicted classes int32 [B], log-probabilities float32 [B, C], mask [B]) of a batch; the rest
    as of `eval_step`.
    """
    logits = network.predict(params, batch_stats, normalize(batch.image))
    predicted = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32)
    return batch.label, predicted, jax.nn.log_softmax(logits), batch.mask


def fetch(parts: list[tuple[int, Sums]]) -> Sums:
    """The sums of several dispatches on the host: NumPy arrays with one entry per step.

    parts: (how many steps, their sums) of each dispatch.
    """
    fetched = jax.device_get([sums for _, sums in parts])

    def by_step(name: str, count: int, sums: Sums) -> np.ndarray:
        return sums[name][:count] if np.ndim(sums["count"]) else np.asarray(sums[name])[None]

    return {
        name: np.concatenate([by_step(name, count, sums) for (count, _), sums in zip(parts, fetched, strict=True)])
        for name in fetched[0]
    }


# ---------------------------------------------------------------- the pieces of a step


def make_examples(batch: Batch, key: jax.Array, task: Task) -> Examples:
    """What the network is trained on: augmented, normalised, mixed."""
    images, labels = task.preprocess(key, batch.image), batch.label
    targets = [(labels, jnp.ones_like(batch.mask))]
    if task.mix is not None:
        images, partner, weight = task.mix(key, images, batch.mask)
        targets = [(labels, weight), (labels[partner], 1 - weight)]
        labels = jnp.where(weight >= 0.5, labels, labels[partner])
    if task.class_weights is not None:
        of_class = jnp.asarray(task.class_weights, jnp.float32)
        targets = [(target, weight * of_class[target]) for target, weight in targets]
    return {"image": images, "targets": targets, "label": labels, "mask": batch.mask}


def differentiate(
    state: TrainState, examples: Examples, key: jax.Array, task: Task
) -> tuple[Any, jax.Array, Sums, Any]:
    """(gradient, loss, sums, batch statistics) of the whole batch.

    Each device computes the gradient of its own examples, from all parameters, and these gradients are added once per
    step: neither what is sent nor how it is divided depends on the size of the batch.
    """
    axes = tuple(axis for axis in sharding.AXES if task.mesh.shape[axis] > 1)  # XLA would call on others alone, too
    noise = rng.stream(key, "noise") if jax.tree.leaves(task.network.random) else None

    def of_device(params: Any, batch_stats: Any, examples: Examples, count: jax.Array, noise: jax.Array | None) -> Any:
        if noise is not None:
            for axis in axes:
                noise = jax.random.fold_in(noise, jax.lax.axis_index(axis))
        own, batch_stats = _added_up(params, batch_stats, examples, count, noise, axes, task)
        return jax.lax.psum(own, axes), batch_stats

    everywhere, divided = PartitionSpec(), PartitionSpec(sharding.AXES)
    of_device = jax.shard_map(
        of_device,
        mesh=task.mesh,
        in_specs=(everywhere, everywhere, divided, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,  # checked, the gradients of each part would be added over the devices at once
    )
    count = jnp.maximum(examples["mask"].sum(), 1)
    (grads, loss, sums), batch_stats = of_device(state.params, state.batch_stats, examples, count, noise)
    return grads, loss, sums, batch_stats


def _added_up(
    params: Any,
    batch_stats: Any,
    examples: Examples,
    count: jax.Array,
    noise: jax.Array | None,
    axes: tuple[str, ...],
    task: Task,
) -> tuple[Any, Any]:
    """((gradient, loss, sums), batch statistics) of one device's examples, part by part."""

    def of_part(batch_stats: Any, part: Examples, noise: jax.Array | None) -> tuple[Any, Any]:
        of_loss = jax.value_and_grad(_loss, has_aux=True)
        (loss, (batch_stats, sums)), grads = of_loss(params, batch_stats, part, count, noise, axes, task)
        if task.has_noise:
            # Of the mean over the part, and not of the part's share of the mean over the batch.
            sums["part_square"] = movement.square(grads) * jnp.square(count / jnp.maximum(sums["count"], 1))
        return (grads, loss, sums), batch_stats

    if task.parts == 1:
        return of_part(batch_stats, examples, noise)
    # Every part takes every n-th example of the batch, however many devices there are.
    parts = jax.tree.map(lambda x: x.reshape(-1, task.parts, *x.shape[1:]), examples)

    def add(carry: Any, i: jax.Array) -> tuple[Any, None]:
        own, batch_stats = carry
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), parts)
        more, batch_stats = of_part(batch_stats, part, None if noise is None else jax.random.fold_in(noise, i))
        return (jax.tree.map(jnp.add, own, more), batch_stats), None

    names = ("loss", "correct", "count", *(("part_square",) if task.has_noise else ()))
    sums = {name: jnp.float32(0) for name in names}
    start = ((jax.tree.map(jnp.zeros_like, params), jnp.float32(0), sums), batch_stats)
    (own, batch_stats), _ = jax.lax.scan(add, start, jnp.arange(task.parts), unroll=task.unroll)
    return own, batch_stats


def _loss(
    params: Any,
    batch_stats: Any,
    part: Examples,
    count: jax.Array,
    noise: jax.Array | None,
    axes: tuple[str, ...],
    task: Task,
) -> tuple[jax.Array, tuple[Any, Sums]]:
    """A part's share of the mean loss over `count` examples; with it, the batch statistics and sums."""
    logits, batch_stats = task.network.train(params, batch_stats, part["image"], noise, axes or None)
    each = sum(
        weights * losses.cross_entropy(logits, labels, task.label_smoothing) for labels, weights in part["targets"]
    )
    sums = losses.sums(each, logits, part["label"], part["mask"])
    return (each * part["mask"]).sum() / count, (batch_stats, sums)


def _norm(tree: Any) -> jax.Array:
    """The global L2 norm."""
    return jnp.sqrt(movement.square(tree))


def _averaged(before: TrainState, after: TrainState, decay: float) -> dict[str, Any]:
    """The exponential moving average of parameters and batch statistics after a step.

    The decay grows with the steps, (1 + t) / (10 + t) up to its value, as in TensorFlow's ExponentialMovingAverage with
    num_updates: the first weights, which are random, are soon forgotten.
    """
    step = before.step.astype(jnp.float32)
    keep = jnp.minimum(jnp.float32(decay), (1 + step) / (10 + step))
    new = {"params": after.params, "batch_stats": after.batch_stats}

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        return (keep * old.astype(jnp.float32) + (1 - keep) * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(average, before.ema, new)
