"""Learning-rate schedule and optimizer: SGD with momentum, weight decay on kernels only, optional gradient clipping."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

CLASSIFIER = "classifier"


def cosine_by_epoch(peak: float, epoch_ends: np.ndarray) -> optax.Schedule:
    """Cosine annealing to zero (Loshchilov and Hutter 2016) that changes only between epochs, as the paper steps it.

    epoch_ends: the number of steps after which each epoch is done, int [epochs]. In epoch e (from 0) the rate is
    peak / 2 (1 + cos(pi e / epochs)). Raises ValueError for more steps than int32 counts.
    """
    _check_steps(epoch_ends[-1])
    ends = np.asarray(epoch_ends, np.int32)

    def schedule(step: Any) -> jax.Array:
        epoch = jnp.searchsorted(jnp.asarray(ends), jnp.asarray(step, jnp.int32), side="right")
        return jnp.float32(peak / 2) * (1 + jnp.cos(jnp.float32(np.pi) * epoch.astype(jnp.float32) / len(ends)))

    return schedule


def cosine_by_step(peak: float, steps: int) -> optax.Schedule:
    """Cosine annealing from `peak` to zero over `steps` steps. Raises ValueError for more than int32 counts."""
    _check_steps(steps)
    decay = optax.cosine_decay_schedule(peak, steps)
    return lambda step: decay(jnp.asarray(step, jnp.float32))


def warmed_up(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """`schedule`, raised linearly from near zero in the first `steps` steps (Goyal et al. 2017)."""

    def warmed(step: Any) -> jax.Array:
        share = (jnp.asarray(step, jnp.float32) + 1) / steps
        return schedule(step) * jnp.minimum(share, 1)

    return warmed if steps else schedule


def sgd(
    schedule: optax.Schedule,
    momentum: float,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    adaptive_clip: float | None = None,
) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum, as PyTorch's: v <- momentum v + g, w <- w - rate v.

    weight_decay: adds weight_decay * w to the gradient of kernels; biases, scalars and normalization scales (rank below
    2) are spared. clip_norm: largest global norm of the gradient, applied first. adaptive_clip: adaptive gradient
    clipping (Brock et al. 2021): largest ratio of gradient norm to weight norm per output unit, with the classifier
    exempt, as in that paper. Raises ValueError for settings that cannot be.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: expected at least 0 and less than 1")
    if not 0 <= weight_decay < np.inf:
        raise ValueError(f"weight_decay={weight_decay}: expected 0, for none, or a positive number")
    for name, value in (("clip_norm", clip_norm), ("adaptive_clip", adaptive_clip)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name}={value}: expected a positive number, or None for no clipping")
    parts = []
    if clip_norm is not None:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if adaptive_clip is not None:
        parts.append(optax.masked(optax.adaptive_grad_clip(adaptive_clip), not_classifier))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=kernels))
    return optax.chain(*parts, optax.sgd(schedule, momentum=momentum))


def _check_steps(steps: int) -> None:
    if not 0 < steps < 2**31:
        raise ValueError(
            f"a run of {steps:,} steps: expected 1 to {2**31 - 1:,}; choose fewer epochs or a larger batch"
        )


def kernels(params: Any) -> Any:
    """True for each kernel (rank 2 and more), False for biases, scalars and normalization scales."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def not_classifier(params: Any) -> Any:
    """False for the parameters under the name "classifier", True for all others."""

    def outside(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        return all(getattr(entry, "key", None) != CLASSIFIER for entry in path)

    return jax.tree_util.tree_map_with_path(outside, params)
