"""Other kernels for a network before its first step, from the images of that step: `model.rescale`."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from nfjax import data, rescale, spp
from nfjax._names import lookup
from nfjax.runs.progress import say
from nfjax.training import loader, propagation
from nfjax.training.networks import Network

# name -> `(model, images, *, seed, report) -> model`
METHODS: dict[str, Callable[..., nnx.Module]] = {
    "lsuv": rescale.lsuv,
    "balance": rescale.balance,
    "balance_forward": functools.partial(rescale.balance, direction="forward"),
    "balance_backward": functools.partial(rescale.balance, direction="backward"),
}
BETWEEN_BLOCKS = ("balance", "balance_forward", "balance_backward")
NONE = "none"
NOTES = 3  # of the report, in the line for a person
IMAGES = 128  # of the first batch, at most: they are on one device, and a variance needs no more


def check(config: ConfigDict, model: nnx.Module) -> None:
    """Raises ValueError where there is no such method, or blocks are not there, or not clear, between which it would
    measure. model: with shapes for arrays.
    """
    if method(config) is not None and config.model.rescale in BETWEEN_BLOCKS:
        size = config.data.image_size
        images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        with propagation.asking_for_blocks("balance"):
            spp.Monitor(images, where=propagation.blocks(config)).check(model)


def method(config: ConfigDict) -> Callable[..., nnx.Module] | None:
    """What `model.rescale` names, None for none. Raises ValueError that lists the names for one that is not known."""
    return lookup("model.rescale", config.model.rescale or NONE, {NONE: None, **METHODS}, callables=False)


def apply(
    config: ConfigDict,
    split: data.Images | data.Encoded,
    normalize: Callable[[jax.Array], jax.Array],
    network: Network,
    params: Any,
    batch_stats: Any,
) -> Any:
    """The parameters with other kernels, the same in all processes; as they are where the config asks for nothing.

    Args:
        config: Of the run.
        split: Of training, from which the images of the first step come, as they are without augmentation.
        normalize: From these to what the network sees.
        network: What the parameters are of.
        params: Before anything was trained.
        batch_stats: Likewise.

    Raises:
        ValueError: A variance is zero or not finite, or there is no kernel that could be rescaled.
    """
    if (change := method(config)) is None:
        return params
    images = normalize(jnp.asarray(loader.images_of_first_step(config, split, IMAGES)))
    options = {"where": propagation.blocks(config)} if config.model.rescale in BETWEEN_BLOCKS else {}
    report = functools.partial(tell, images=len(images))
    try:
        model = change(network.model(params, batch_stats), images, seed=config.seed, report=report, **options)
    except ValueError as error:
        raise ValueError(f"model.rescale={config.model.rescale}: {error}") from error
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if jax.process_count() > 1:  # another kind of processor rounds otherwise
        from jax.experimental import multihost_utils

        params = jax.tree.map(jnp.asarray, multihost_utils.broadcast_one_to_all(params))
    return params


def tell(report: rescale.Report, images: int) -> None:
    """A line for the person who starts the run: what changed, and how far variances were apart before and after."""
    changed = [row for row in report.rows if abs(np.log(row.factor)) > 0.01]
    signal = report.signal or {"output of a kernel": ([r.before for r in report.rows], [r.after for r in report.rows])}
    spread = "; ".join(f"{name} {_spread(before)}, now {_spread(after)}" for name, (before, after) in signal.items())
    notes = collections.Counter(row.note for row in report.rows if row.note).most_common(NOTES)
    say(
        f"rescale {report.method}: {len(changed)} of {len(report.rows)} kernels changed, on {images} images in "
        f"{report.seconds:.1f} s; largest over smallest variance: {spread}"
        + "".join(f"; {count} x {note}" for note, count in notes)
    )


def _spread(variances: Any) -> str:
    least, most = float(np.min(variances)), float(np.max(variances))
    return f"{most / least:.3g}" if least > 0 else "inf"
