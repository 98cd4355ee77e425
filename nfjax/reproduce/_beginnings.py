"""What is known of a network before training: its cost, and how its signal changes from the first block to the last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import msgspec
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from nfjax import cost, spp, storage
from nfjax.reproduce import _runs
from nfjax.reproduce._grids import Cell, Grid
from nfjax.reproduce._pace import shown
from nfjax.reproduce._runs import Request
from nfjax.runs import workdirs
from nfjax.training import networks

FILE = "beginnings.json"
SEEDS, BATCH = 5, 32
Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A network as it is drawn.

    Attributes:
        parameters: Of the network.
        macs: Multiply-accumulates for one image.
        forward: Variance at the first block divided by that at the last, of each seed, smallest to largest.
        backward: That of the gradient.
        closed: Both in closed form, None where there is none.
    """

    parameters: Count
    macs: Count
    forward: Sequence[float]
    backward: Sequence[float]
    closed: tuple[float, float] | None

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be read off a network."""
        if not self.forward or len(self.forward) != len(self.backward):
            raise ValueError("expected as many forward as backward ratios, one for each seed")


def measure(config: ConfigDict, classes: int) -> Beginning:
    """Measures the network of a config on N(0, 1) noise, with an N(0, 1) gradient at the last block, for five seeds.

    Raises:
        ValueError: It has no residual blocks, or cannot be built.
    """
    size = config.data.image_size

    def make(seed: int) -> object:
        return networks.build(config, classes, jax.random.key(seed))

    shape = (BATCH, size, size, 3)
    profile = spp.propagate_seeds(make, spp.noise(shape), seeds=SEEDS)
    predicted = spp.predict(make(0), shape)
    spent = cost.count(networks.shapes(config, classes), (1, *shape[1:]))

    def first_over_last(name: str) -> list[float]:
        samples = np.asarray(profile.samples[name], np.float64)
        return sorted(float(f"{ratio:.6g}") for ratio in samples[:, 0] / samples[:, -1])

    closed = None
    if predicted is not None:
        forward, backward = predicted.forward_var, predicted.backward_var
        closed = float(f"{forward[0] / forward[-1]:.6g}"), float(f"{backward[0] / backward[-1]:.6g}")
    return Beginning(
        spent.parameters, spent.macs, first_over_last("forward_var"), first_over_last("backward_var"), closed
    )


def read(grid: Grid, request: Request, classes: int) -> dict[str, Beginning]:
    """Those that were measured, by the label of their network."""
    known = _read(request.out / FILE)
    keys = {cell.label: _key(cell, _runs.make_config(grid.dataset, cell, 0, request), classes) for cell in grid.cells}
    return {label: known[key] for label, key in keys.items() if key in known}


def measure_missing(grid: Grid, request: Request, classes: int) -> None:
    """Measures what was not, network after network, and keeps each as soon as it is there, until the time is over.

    Args:
        grid: What is compared.
        request: What is asked for.
        classes: Of the images.
    """
    there, path = read(grid, request, classes), request.out / FILE
    missing = [cell for cell in _runs.chosen(grid, request) if cell.label not in there]
    start = time.monotonic()
    for number, cell in enumerate(missing):
        if time.monotonic() >= request.until:
            return
        config = _runs.make_config(grid.dataset, cell, 0, request)
        begin = time.monotonic()
        measured = measure(config, classes)
        # Read again: another process may have added to it.
        everything = _read(path) | {_key(cell, config, classes): measured}
        storage.write_json(path, {key: dataclasses.asdict(value) for key, value in everything.items()})
        now = time.monotonic()
        left = (now - start) / (number + 1) * (len(missing) - number - 1)
        line = f"before training  {number + 1:>2}/{len(missing)}  {cell.label:<50} {now - begin:5.1f} s"
        print(f"{line}, about {shown(left)} left", file=sys.stderr, flush=True)


def _key(cell: Cell, config: ConfigDict, classes: int) -> str:
    """ "ResNet-18 IdShort, He fan-out, 0123abcd": the same for all runs that begin with such a network."""
    settings = {name: value for name, value in workdirs.essence(config).items() if name.startswith("model.")}
    exact = json.dumps([settings, config.data.image_size, classes], sort_keys=True)
    return f"{cell.label}, {hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _read(path: pathlib.Path) -> Mapping[str, Beginning]:
    """None, with a warning, where they cannot be read: they are measured again."""
    try:
        return storage.read_json(path, dict[str, Beginning], "it is written anew")
    except FileNotFoundError:
        return {}
    except storage.DamagedFileError as error:
        logging.warning("%s", error)
        return {}
