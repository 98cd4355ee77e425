"""One step of training and of evaluation.

A training step knows no data set and no settings: it is built from a network, an optimizer and a preprocessing
function.
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
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from nfjax.runs import metrics
from nfjax.training import sharding as meshes

State = dict[str, Any]  # {"params", "batch_stats", "opt", "step"}, plain dicts of arrays
# {"image": uint8 [B, H, W, 3], "label": int32 [B], "mask": float32 [B]}; training adds "step"
Batch = dict[str, jax.Array]
Sums = dict[str, Any]  # of a batch: "loss", "correct", "count"; training adds "grad_norm"
Step = Callable[[State, Batch], Any]
# What a loss needs: {"image" float [B, H, W, 3], "targets" [(labels int32 [B], weights float32 [B]), ...],
# "label" int32 [B] for the accuracy, "mask" float32 [B]}
Examples = dict[str, Any]
# (key, float images, mask [B]) -> (images, partner int32 [B], weight float32 [B]), see nfjax.augment.mixup
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Network:
    """A Flax NNX model as functions of plain dicts: NNX is at work only while they are traced, which keeps a dispatch
    short.
    """

    train_graph: nnx.GraphDef
    eval_graph: nnx.GraphDef
    structures: tuple[Any, Any]  # of the NNX states of parameters and batch statistics

    def train(
        self, params: Any, batch_stats: Any, images: jax.Array, axes: tuple[str, ...] | None = None
    ) -> tuple[jax.Array, Any]:
        """Logits [B, classes] and the updated batch statistics. axes: of the mesh, inside of `jax.shard_map`: batch
        norm then takes its statistics over the images of all of their devices.
        """
        model = self.model(params, batch_stats)
        model.set_attributes(nnx.BatchNorm, axis_name=axes, raise_if_not_found=False)
        logits = model(images)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def predict(self, params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        """Logits [B, classes], from running statistics where there is batch norm."""
        return self._merge(self.eval_graph, params, batch_stats)(images)

    def model(self, params: Any, batch_stats: Any) -> nnx.Module:
        """The NNX model in training mode."""
        return self._merge(self.train_graph, params, batch_stats)

    def _merge(self, graph: nnx.GraphDef, *states: Any) -> nnx.Module:
        # A plain dict has its leaves in the order of the nnx.State it was made from.
        unflattened = (jax.tree.unflatten(s, jax.tree.leaves(x)) for s, x in zip(self.structures, states, strict=True))
        return nnx.merge(graph, *unflattened)


def as_functions(model: nnx.Module) -> tuple[Network, Any, Any]:
    """(network, params, batch_stats) of a model; the last two are plain dicts."""
    model.train()
    train_graph, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    model.eval()
    eval_graph, _, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    structures = (jax.tree.structure(params), jax.tree.structure(batch_stats))
    return Network(train_graph, eval_graph, structures), nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def initial_state(params: Any, batch_stats: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return {
        "params": params,
        "batch_stats": batch_stats,
        "opt": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    preprocess: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    label_smoothing: float,
    mix: Mix | None = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Step:
    """`train_step(state, batch) -> (state, sums)`, to be jitted. preprocess: `(key, uint8 images) -> float images`, and
    then `mix`, both given `fold_in(key, step)`. The loss is the mean over the examples whose mask is 1: one that could
    not be read counts for nothing (batch norm, where there is any, sees it black). Where examples are mixed, "correct"
    counts predictions of the class that has the greater part.

    accumulate: parts of the batch whose gradients are computed one after the other and added, which takes the memory of
    one. They are drawn and augmented together, so without batch norm this is the step of the whole batch; batch norm
    sees the parts.

    mesh: of the devices over which the batch is divided, all there are if None. Each computes the gradient of its own
    examples, from all parameters, and these gradients are added once per step: neither what is sent nor how it is
    divided depends on the size of the batch.

    A step whose loss, gradient or update is not finite leaves the state as it was, and so does every later one, because
    a batch counts only if its "step" is the state's: nothing is trained on after a NaN, however many steps were already
    on their way to the device.
    """
    mesh = meshes.make() if mesh is None else mesh
    axes = tuple(axis for axis in meshes.AXES if mesh.shape[axis] > 1)  # XLA would call on others alone, too

    def loss_of(params: Any, batch_stats: Any, part: Examples, count: jax.Array) -> Any:
        logits, batch_stats = network.train(params, batch_stats, part["image"], axes or None)
        cross_entropy = functools.partial(metrics.cross_entropy, logits, smoothing=label_smoothing)
        losses = sum(weights * cross_entropy(labels) for labels, weights in part["targets"])
        sums = metrics.sums(losses, logits, part["label"], part["mask"])
        return (losses * part["mask"]).sum() / count, (batch_stats, sums)

    def gradient(params: Any, batch_stats: Any, examples: Examples, count: jax.Array) -> tuple[Any, Any]:
        """((gradient, loss, sums), batch statistics) over all devices, each of which has its `examples`; `count` of all
        are there.
        """
        of_loss = jax.value_and_grad(loss_of, has_aux=True)

        def of_part(batch_stats: Any, part: Examples) -> tuple[Any, Any]:
            (loss, (batch_stats, sums)), grads = of_loss(params, batch_stats, part, count)
            return (grads, loss, sums), batch_stats

        if accumulate == 1:
            own, batch_stats = of_part(batch_stats, examples)
        else:
            # Every part takes every n-th example of the batch, however many devices there are.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]), examples)

            def add(carry: Any, i: jax.Array) -> tuple[Any, None]:
                own, batch_stats = carry
                part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), parts)
                more, batch_stats = of_part(batch_stats, part)
                return (jax.tree.map(jnp.add, own, more), batch_stats), None

            sums = {name: jnp.float32(0) for name in ("loss", "correct", "count")}
            start = ((jax.tree.map(jnp.zeros_like, params), jnp.float32(0), sums), batch_stats)
            # On CPU, XLA runs convolutions inside a loop many times slower than outside.
            unroll = accumulate if jax.default_backend() == "cpu" else 1
            (own, batch_stats), _ = jax.lax.scan(add, start, jnp.arange(accumulate), unroll=unroll)
        return jax.lax.psum(own, axes), batch_stats

    everywhere, divided = PartitionSpec(), PartitionSpec(meshes.AXES)
    gradient = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(everywhere, everywhere, divided, everywhere),
        out_specs=everywhere,
        check_vma=False,  # checked, the gradients of each part would be added over the devices at once
    )

    def train_step(state: State, batch: Batch) -> tuple[State, Sums]:
        step_key, labels, mask = jax.random.fold_in(key, state["step"]), batch["label"], batch["mask"]
        images = preprocess(step_key, batch["image"])
        targets = [(labels, jnp.ones_like(mask))]
        if mix is not None:
            images, partner, weight = mix(step_key, images, mask)
            targets = [(labels, weight), (labels[partner], 1 - weight)]
            labels = jnp.where(weight >= 0.5, labels, labels[partner])
        examples = {"image": images, "targets": targets, "label": labels, "mask": mask}
        count = jnp.maximum(mask.sum(), 1)
        (grads, loss, sums), batch_stats = gradient(state["params"], state["batch_stats"], examples, count)
        grad_norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        new = {
            "params": optax.apply_updates(state["params"], updates),
            "batch_stats": batch_stats,
            "opt": opt,
            "step": state["step"] + 1,
        }
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        good = finite & (batch["step"] == state["step"])
        state = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return state, sums | {"grad_norm": grad_norm}

    return train_step


def make_eval_step(network: Network, preprocess: Callable[[jax.Array], jax.Array]) -> Step:
    """`eval_step(state, batch) -> sums` over the examples whose mask is 1, without label smoothing."""

    def eval_step(state: State, batch: Batch) -> Sums:
        logits = network.predict(state["params"], state["batch_stats"], preprocess(batch["image"]))
        return metrics.sums(metrics.cross_entropy(logits, batch["label"]), logits, batch["label"], batch["mask"])

    return eval_step


def fetch(parts: list[Sums]) -> Sums:
    """The sums of several dispatches on the host, NumPy arrays with one entry per step."""
    fetched = jax.device_get(parts)
    return {name: np.concatenate([np.atleast_1d(part[name]) for part in fetched]) for name in fetched[0]}
