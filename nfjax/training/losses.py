"""What training minimises, and what is counted of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each example, with label smoothing (Szegedy et al. 2016).

    Args:
        logits: [B, C].
        labels: int [B].
        smoothing: Share of the target that is spread evenly over all classes, at least 0 and less than 1.

    Returns:
        The loss of each example in nats, [B].
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """The weight of each class with which all classes have as much of the loss: n / (classes * n_c).

    Their mean over all examples is 1.

    Args:
        counts: Examples of each class, int [C]; one that has none counts for nothing, and has a weight of 1.

    Returns:
        float32 [C].
    """
    there = counts > 0
    weights = counts.sum() / (there.sum() * np.maximum(counts, 1))
    return np.where(there, weights, 1.0).astype(np.float32)


def sums(losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Loss, correct predictions and number of the examples whose mask is 1, each summed over the batch.

    Args:
        losses: [B].
        logits: [B, C].
        labels: int [B].
        mask: float [B], 0 or 1.

    Returns:
        {"loss", "correct", "count"}, each [].
    """
    correct = (jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == labels).astype(jnp.float32)
    # where, not a product: a masked example contributes nothing even if its loss is not finite.
    return {"loss": jnp.where(mask > 0, losses, 0.0).sum(), "correct": (correct * mask).sum(), "count": mask.sum()}


def means(totals: Mapping[str, float]) -> dict[str, float]:
    """{"loss", "accuracy"} from sums; accuracy is a fraction in [0, 1]."""
    return {"loss": float(totals["loss"] / totals["count"]), "accuracy": float(totals["correct"] / totals["count"])}
