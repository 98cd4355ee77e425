"""The learning rate by step. A schedule is one function and one line in `SCHEDULES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from nfjax._names import find
from nfjax.training import ranges
from nfjax.training.ranges import Range

RANGES: dict[str, Range] = {
    "optim.learning_rate": Range(lambda value: np.float32(value) > 0, "must be positive"),
    "optim.reference_batch_size": ranges.whole(1, 2**24, "must be positive, or none for no scaling"),
    "optim.warmup_epochs": Range(lambda value: value >= 0, "must be 0 or more"),
}


def cosine_by_epoch(peak: float, epoch_ends: Sequence[int]) -> optax.Schedule:
    """Cosine annealing to zero (Loshchilov and Hutter 2016) that changes only between epochs, as the paper steps it.

    In epoch e (from 0) the rate is peak / 2 (1 + cos(pi e / epochs)).

    Args:
        peak: Rate of the first epoch.
        epoch_ends: The number of steps after which each epoch is done, int [epochs].

    Raises:
        ValueError: There are more steps than int32 counts.
    """
    _check_steps(epoch_ends[-1])
    ends = np.asarray(epoch_ends, np.int32)

    def schedule(step: Any) -> jax.Array:
        # All ends at once: a search would be a loop in every step, whose turns a device starts one by one.
        method = "compare_all"
        epoch = jnp.searchsorted(jnp.asarray(ends), jnp.asarray(step, jnp.int32), side="right", method=method)
        return jnp.float32(peak / 2) * (1 + jnp.cos(jnp.float32(np.pi) * epoch.astype(jnp.float32) / len(ends)))

    return schedule


def cosine(peak: float, epoch_ends: Sequence[int]) -> optax.Schedule:
    """Cosine annealing from `peak` to zero over all steps. Arguments and errors as of `cosine_by_epoch`."""
    _check_steps(epoch_ends[-1])
    return _of_float(optax.cosine_decay_schedule(peak, epoch_ends[-1]))


def linear(peak: float, epoch_ends: Sequence[int]) -> optax.Schedule:
    """From `peak` to zero in a straight line over all steps. Arguments and errors as of `cosine_by_epoch`."""
    _check_steps(epoch_ends[-1])
    return _of_float(optax.linear_schedule(peak, 0.0, epoch_ends[-1]))


def constant(peak: float, epoch_ends: Sequence[int]) -> optax.Schedule:
    """Always `peak`. Arguments and errors as of `cosine_by_epoch`."""
    _check_steps(epoch_ends[-1])
    return lambda step: jnp.full(jnp.shape(step), peak, jnp.float32)


SCHEDULES: dict[str, Callable[[float, Sequence[int]], optax.Schedule]] = {
    "cosine": cosine,
    "cosine_by_epoch": cosine_by_epoch,
    "linear": linear,
    "constant": constant,
}


def warmed_up(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """`schedule`, raised linearly from near zero in the first `steps` steps (Goyal et al. 2017)."""

    def warmed(step: Any) -> jax.Array:
        share = (jnp.asarray(step, jnp.float32) + 1) / steps
        return schedule(step) * jnp.minimum(share, 1)

    return warmed if steps else schedule


def check(config: ConfigDict) -> None:
    """Raises ValueError for a schedule that cannot be."""
    if config.optim.warmup_epochs > config.epochs:
        raise ValueError(f"optim.warmup_epochs={config.optim.warmup_epochs} must be from 0 to epochs={config.epochs}")
    name = config.optim.schedule
    try:
        rate = jax.eval_shape(build(config, epoch_ends=[1]), jax.ShapeDtypeStruct((), jnp.int32))
    except TypeError as error:
        raise ValueError(
            f"optim.schedule={name}: expected a function of the peak and the end of each epoch in steps, which returns "
            f"the rate by step: {error}"
        ) from error
    if getattr(rate, "shape", None) != () or not jnp.issubdtype(rate.dtype, jnp.floating):
        raise ValueError(f"optim.schedule={name} gives {rate} for a step: expected one floating-point number")


def build(config: ConfigDict, epoch_ends: Sequence[int]) -> optax.Schedule:
    """The learning rate of a config by step. epoch_ends: the number of steps after which each epoch is done."""
    settings = config.optim
    scale = config.batch_size / (settings.reference_batch_size or config.batch_size)
    peak, warmup = settings.learning_rate * scale, settings.warmup_epochs * epoch_ends[-1] / len(epoch_ends)
    schedule = find("optim.schedule", settings.schedule, SCHEDULES)
    return warmed_up(schedule(peak, epoch_ends), round(warmup))


def _of_float(schedule: optax.Schedule) -> optax.Schedule:
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


def _check_steps(steps: int) -> None:
    if not 0 < steps < 2**31:
        raise ValueError(
            f"a run of {steps:,} steps: expected 1 to {2**31 - 1:,}; choose fewer epochs or a larger batch"
        )
