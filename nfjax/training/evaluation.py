"""Scores: loss and accuracy over all images of a split, each counted exactly once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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
    options = _cpu.compiler_options(_cpu.platform_of(loader.mesh), onednn)
    eval_step = _compiled_with(tuple(options.items()))
    with compilation.not_kept(options):
        parts = [
            (1, eval_step(params, batch_stats, batch, network=network, normalize=normalize))
            for batch in loader.evaluate()
        ]
    totals = {name: values.sum(dtype=np.float64) for name, values in step.fetch(parts).items()}
    if not totals["count"]:
        raise ValueError(f"none of the {loader.size} test images can be read; skipped.jsonl in the workdir says why")
    return losses.means(totals) | {"images": int(totals["count"])}


@functools.cache  # so that what it has compiled is found again
def _compiled_with(options: tuple[tuple[str, Any], ...]) -> Callable[..., step.Sums]:
    statics = ("network", "normalize")
    return jax.jit(step.eval_step, static_argnames=statics, compiler_options=dict(options))
