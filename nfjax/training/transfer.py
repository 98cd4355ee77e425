"""Weights of a source put into another network, as far as they fit; what does not fit is listed."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nfjax import distributed
from nfjax.runs.progress import say
from nfjax.training import networks, patterns, pretrained
from nfjax.training.pretrained import Record, Source, Weights

SHOWN = 20  # lines for a person; the record has all


@dataclasses.dataclass(frozen=True)
class Fit:
    """What of a network is the source's.

    Attributes:
        params: The parameters.
        batch_stats: What else the network keeps between steps.
        taken: Paths of what comes from the source.
        anew: {path: why} of what stays as it was initialized.
        left: {path: why} of what the source has besides.
    """

    params: Any
    batch_stats: Any
    taken: list[str]
    anew: dict[str, str]
    left: dict[str, str]


def fit(weights: Weights, params: Any, batch_stats: Any, head: frozenset[str] = frozenset()) -> Fit:
    """Takes every array that has the path and the shape of one of the network's.

    Args:
        weights: Of the source.
        params: Of the network, as initialized.
        batch_stats: Likewise.
        head: Paths of parameters that are not taken, whatever their shape: they tell classes apart that are others.
    """
    taken: list[str] = []
    anew: dict[str, str] = {}
    left: dict[str, str] = {}

    def merged(tree: Any, theirs: dict[str, np.ndarray]) -> Any:
        def of(path: str, leaf: jax.Array) -> jax.Array:
            there = theirs.get(path)
            if there is None:
                anew[path] = f"{list(leaf.shape)}, the source has none"
            elif path in head:
                anew[path] = f"{list(leaf.shape)}, of other classes than the source's {list(there.shape)}"
            elif there.shape != leaf.shape:
                anew[path] = f"{list(leaf.shape)}, the source's is {list(there.shape)}"
            else:
                taken.append(path)
                return jnp.array(there, leaf.dtype)  # a copy: the first step takes its memory
            return leaf

        own = patterns.by_path(tree)
        left.update({path: f"{list(leaf.shape)}" for path, leaf in theirs.items() if path not in own})
        return patterns.map_by_path(of, tree)

    made = merged(params, weights.params), merged(batch_stats, weights.batch_stats)
    return Fit(*made, taken, anew, left)


def begin(
    config: ConfigDict, class_names: tuple[str, ...], folder: pathlib.Path | None, params: Any, batch_stats: Any
) -> tuple[Any, Any]:
    """(parameters, batch statistics) to begin with, those of the source that the config names where they fit.

    Prints what was taken and what was not.

    Args:
        config: Of the run.
        class_names: Of its images.
        folder: The workdir, which gets the record; None for none.
        params: As initialized.
        batch_stats: Likewise.

    Raises:
        FileNotFoundError, ValueError: The source cannot be read, or its network shares nothing with this one but what
            tells classes apart.
    """
    source = pretrained.find(config.init_from)
    weights = source.read()
    digest, same = weights.digest(), tuple(class_names) == source.class_names
    distributed.same_everywhere(f"the network at init_from={config.init_from}", digest)
    head = networks.head(config, len(class_names))
    found = fit(weights, params, batch_stats, frozenset() if same else head)
    if not set(found.taken) & patterns.by_path(params).keys() - head:
        raise ValueError(_nothing(config, source, found))
    say("\n".join(_told(source, digest, found, same, params)))
    if folder is not None:
        record = Record(
            source.path,
            source.step,
            digest,
            source.network,
            list(source.class_names),
            source.preprocessing,
            found.taken,
            found.anew,
            found.left,
        )
        pretrained.write_record(folder, record)
    return found.params, found.batch_stats


def _told(source: Source, digest: str, found: Fit, same: bool, params: Any) -> list[str]:
    own = patterns.by_path(params)
    numbers = sum(own[path].size for path in found.taken if path in own)
    classes = "the same classes, so the head is taken, too" if same else "other classes, so the head is drawn anew"
    lines = [
        f"init    {source.path}, step {source.step:,} (digest {digest}): {source.network}, "
        f"{len(source.class_names)} classes: {classes}",
        f"        {len(found.taken)} arrays are the source's, with {numbers:,} of the parameters",
    ]
    rest = [f"        anew {path} {why}" for path, why in found.anew.items()]
    rest += [f"        left {path} {shape}, which this network has not" for path, shape in found.left.items()]
    more = [f"        and {len(rest) - SHOWN} more: {pretrained.RECORD} names all"] if len(rest) > SHOWN else []
    return [*lines, *rest[:SHOWN], *more]


def _nothing(config: ConfigDict, source: Source, found: Fit) -> str:
    differing = [
        f"model.{name}={value} there, {config.model[name]} here"
        for name, value in source.settings.items()
        if value != config.model[name]
    ]
    how = f" ({', '.join(differing)})" if differing else ""
    examples = "; ".join(f"{path} {why}" for path, why in list(found.anew.items())[:3])
    return (
        f"init_from={source.path}: its network, {source.network}, shares no weights with this one, "
        f"{networks.describe(config)}{how}: {examples}. Set --config.model to what it was trained with, or "
        "--config.init_from=none"
    )
