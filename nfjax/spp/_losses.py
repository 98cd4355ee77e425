"""Scalar functions of a model's output, from which the gradient can start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nfjax import _names

Loss = Callable[[Any], jax.Array]


def apply(loss: str | Loss, output: Any, key: jax.Array) -> jax.Array:
    """The loss of a model's output.

    Args:
        loss: A name in `LOSSES`, or a function of the output.
        output: What the model returns.
        key: Of what a loss by name draws.

    Returns:
        A floating-point scalar.

    Raises:
        ValueError: There is no such name, or it is no scalar.
    """
    if isinstance(loss, str):
        return _names.lookup("loss", loss, LOSSES)(output, key)
    value = loss(output)
    if not isinstance(value, jax.Array) or value.ndim or not jnp.issubdtype(value.dtype, jnp.floating):
        shown = f"shape {value.shape}, {value.dtype}" if isinstance(value, jax.Array) else type(value).__name__
        raise ValueError(f"loss= must return a floating-point scalar, not {shown}")
    return value


def cross_entropy(output: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy on labels drawn uniformly at random.

    Args:
        output: Logits [..., C].
        key: Of the labels.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: The model's output is no array of logits.
    """
    if not isinstance(output, jax.Array) or output.ndim < 2 or not jnp.issubdtype(output.dtype, jnp.floating):
        shown = f"shape {output.shape}, {output.dtype}" if isinstance(output, jax.Array) else type(output).__name__
        raise ValueError(
            f'loss="cross_entropy" needs logits [..., C] as the model\'s output, which is {shown}; pass loss= a '
            "function of this output that returns a scalar"
        )
    logits = output.astype(jnp.float32)
    labels = jax.random.randint(key, output.shape[:-1], 0, output.shape[-1], jnp.int32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -chosen.mean()


LOSSES: dict[str, Callable[[Any, jax.Array], jax.Array]] = {"cross_entropy": cross_entropy}
