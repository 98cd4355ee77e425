"""What training is in the middle of: the state of a run, and a batch of examples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class Batch:
    """Examples of one step, and nothing else.

    Attributes:
        image: uint8 [B, H, W, 3].
        label: int32 [B].
        mask: float32 [B], 0 for an example that could not be read or only fills the batch up.
    """

    image: jax.Array
    label: jax.Array
    mask: jax.Array


@struct.dataclass
class Steps:
    """Several batches of examples that lie on the device, for steps that are taken in one dispatch.

    Attributes:
        examples: All of a split, as a `Batch` of N examples.
        indices: int32 [n, B] into them, one row per step.
        count: How many of the n rows are steps; the others only keep the shape, so that epochs of unequal length do not
            compile again.
    """

    examples: Batch
    indices: jax.Array
    count: jax.Array


@struct.dataclass
class TrainState:
    """Everything that a step changes: with the seed, all that is needed to go on exactly.

    Attributes:
        params: Parameters, a pytree of plain dicts.
        batch_stats: Whatever else the network keeps between steps, such as the running statistics of batch norm.
        opt: The optimizer's state.
        ema: {"params", "batch_stats"} averaged over the steps, at least in float32, None where the config asks for
            none.
        step: int32 [], how many steps were taken.
        diverged: bool [], whether a step was not finite; no step changes anything from then on. Never saved.
    """

    params: Any
    batch_stats: Any
    opt: optax.OptState
    ema: dict[str, Any] | None
    step: jax.Array
    diverged: jax.Array

    @classmethod
    def start(
        cls, params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, ema: bool = False
    ) -> TrainState:
        """The state before the first step."""
        # Copies: every array is donated to the first step, and none can be twice. Some optimizers begin with the
        # parameters themselves, as Prodigy does.
        opt = jax.tree.map(jnp.array, optimizer.init(params))
        average = jax.tree.map(_precise, {"params": params, "batch_stats": batch_stats}) if ema else None
        return cls(params, batch_stats, opt, average, jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def to_saved(self) -> dict[str, Any]:
        """The plain dict that a checkpoint holds."""
        saved = {"params": self.params, "batch_stats": self.batch_stats, "opt": self.opt, "step": self.step}
        return saved if self.ema is None else saved | {"ema": self.ema}

    def from_saved(self, saved: dict[str, Any]) -> TrainState:
        """The state of a checkpoint."""
        return self.replace(**saved)

    def average(self) -> tuple[Any, Any]:
        """The averaged parameters and batch statistics, in the types of the network."""
        return jax.tree.map(
            lambda average, own: average.astype(own.dtype),
            (self.ema["params"], self.ema["batch_stats"]),
            (self.params, self.batch_stats),
        )


def _precise(x: jax.Array) -> jax.Array:
    """A copy, float32 of bfloat16: an average moves by less than a bit of that per step."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return jnp.array(x, jnp.float32 if narrow else x.dtype)
