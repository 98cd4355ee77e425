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

from nfjax import metrics

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

    def train(self, params: Any, batch_stats: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        """Logits [B, classes] and the updated batch statistics."""
        model = self.model(params, batch_stats)
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
) -> Step:
    """`train_step(state, batch) -> (state, sums)`, to be jitted. preprocess: `(key, uint8 images) -> float images`, and
    then `mix`, both given `fold_in(key, step)`. The loss is the mean over the examples whose mask is 1: one that could
    not be read counts for nothing (batch norm, where there is any, sees it black). Where examples are mixed, "correct"
    counts predictions of the class that has the greater part.

    accumulate: parts of the batch whose gradients are computed one after the other and added, which takes the memory of
    one. They are drawn and augmented together, so without batch norm this is the step of the whole batch; batch norm
    sees the parts.

    A step whose loss, gradient or update is not finite leaves the state as it was, and so does every later one, because
    a batch counts only if its "step" is the state's: nothing is trained on after a NaN, however many steps were already
    on their way to the device.
    """

    def loss_of(params: Any, batch_stats: Any, part: Examples, count: jax.Array) -> Any:
        logits, batch_stats = network.train(params, batch_stats, part["image"])
        cross_entropy = functools.partial(metrics.cross_entropy, logits, smoothing=label_smoothing)
        losses = sum(weights * cross_entropy(labels) for labels, weights in part["targets"])
        sums = metrics.sums(losses, logits, part["label"], part["mask"])
        return (losses * part["mask"]).sum() / count, (batch_stats, sums)

    def gradient(params: Any, batch_stats: Any, examples: Examples) -> tuple[Any, Any, jax.Array, Sums]:
        """(gradient, batch statistics, loss, sums) of the examples."""
        of_loss = jax.value_and_grad(loss_of, has_aux=True)
        count = jnp.maximum(examples["mask"].sum(), 1)
        if accumulate == 1:
            (loss, (batch_stats, sums)), grads = of_loss(params, batch_stats, examples, count)
            return grads, batch_stats, loss, sums
        # Every part takes every n-th example, and with them as many from each device.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]), examples)

        def add(carry: Any, i: jax.Array) -> tuple[Any, None]:
            part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), parts)
            grads, batch_stats, loss, sums = carry
            (more_loss, (batch_stats, more_sums)), more_grads = of_loss(params, batch_stats, part, count)
            grads, loss, sums = jax.tree.map(jnp.add, (grads, loss, sums), (more_grads, more_loss, more_sums))
            return (grads, batch_stats, loss, sums), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        sums = {name: jnp.float32(0) for name in ("loss", "correct", "count")}
        # On CPU, XLA runs convolutions inside a loop many times slower than outside.
        unroll = accumulate if jax.default_backend() == "cpu" else 1
        start = (zeros, batch_stats, jnp.float32(0), sums)
        return jax.lax.scan(add, start, jnp.arange(accumulate), unroll=unroll)[0]

    def train_step(state: State, batch: Batch) -> tuple[State, Sums]:
        step_key, labels, mask = jax.random.fold_in(key, state["step"]), batch["label"], batch["mask"]
        images = preprocess(step_key, batch["image"])
        targets = [(labels, jnp.ones_like(mask))]
        if mix is not None:
            images, partner, weight = mix(step_key, images, mask)
            targets = [(labels, weight), (labels[partner], 1 - weight)]
            labels = jnp.where(weight >= 0.5, labels, labels[partner])
        examples = {"image": images, "targets": targets, "label": labels, "mask": mask}
        grads, batch_stats, loss, sums = gradient(state["params"], state["batch_stats"], examples)
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
