"""Scores, loss and accuracy, and predictions over all images of a split, each counted exactly once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from nfjax import _cpu, compilation
from nfjax.training import losses, step
from nfjax.training.loader import Loader
from nfjax.training.networks import Network


def score(
    network: Network,
    normalize: Callable[[jax.Array], jax.Array],
    loader: Loader,
    params: Any,
    batch_stats: Any,
    onednn: bool = True,
) -> dict[str, float]:
    """Loss and accuracy on all examples of a loader, but for those that cannot be read.

    Args:
        network: Whose predictions are scored.
        normalize: uint8 [B, H, W, 3] to what the network sees.
        loader: Of the split.
        params: Of the network.
        batch_stats: Likewise.
        onednn: As `train.onednn`.

    Returns:
        {"loss", "accuracy", "images"}: mean cross-entropy in nats, a fraction in [0, 1], how many images were scored.

    Raises:
        ValueError: None of the images can be read.
    """
    parts = [(1, sums) for sums in _over(step.eval_step, network, normalize, loader, params, batch_stats, onednn)]
    totals = {name: values.sum(dtype=np.float64) for name, values in step.fetch(parts).items()}
    if not totals["count"]:
        raise ValueError(f"none of the {loader.size} test images can be read; skipped.jsonl in the workdir says why")
    return losses.means(totals) | {"images": int(totals["count"])}


class Predictions(NamedTuple):
    """What a network predicts for the images of a split that can be read.

    Attributes:
        examples: Which of the split's they are, int64 [N].
        labels: Their true classes, int32 [N].
        predicted: The classes with the largest logits, int32 [N].
        log_probabilities: Of all classes, float32 [N, C].
    """

    examples: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    log_probabilities: np.ndarray


def predictions(
    network: Network,
    normalize: Callable[[jax.Array], jax.Array],
    loader: Loader,
    params: Any,
    batch_stats: Any,
    onednn: bool = True,
) -> Predictions:
    """The predictions for all examples of a loader, but for those that cannot be read; arguments and errors as of
    `score`. For one process, which has all devices.
    """
    parts = [
        jax.device_get(part)
        for part in _over(step.predict_step, network, normalize, loader, params, batch_stats, onednn)
    ]
    label, predicted, log_probabilities, mask = (np.concatenate(values) for values in zip(*parts, strict=True))
    read = np.flatnonzero(mask > 0)
    if not len(read):
        raise ValueError(f"none of the {loader.size} images can be read")
    return Predictions(read, label[read], predicted[read], log_probabilities[read])


def _over(
    function: Callable[..., Any],
    network: Network,
    normalize: Callable[[jax.Array], jax.Array],
    loader: Loader,
    params: Any,
    batch_stats: Any,
    onednn: bool,
) -> list[Any]:
    """What a function of `step` returns for each batch, in the order of the split."""
    options = _cpu.compiler_options(_cpu.platform_of(loader.mesh), onednn)
    compiled = _compiled_with(function, tuple(options.items()))
    with compilation.not_kept(options):
        return [
            compiled(params, batch_stats, batch, network=network, normalize=normalize) for batch in loader.evaluate()
        ]


@functools.cache  # so that what it has compiled is found again
def _compiled_with(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=("network", "normalize"), compiler_options=dict(options))
