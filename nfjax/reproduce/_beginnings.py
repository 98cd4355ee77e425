"""What is known of a network before training: its cost, and how its signal changes from the first block to the last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import jax
import msgspec
import numpy as np

from nfjax import compilation, cost, spp
from nfjax import config as configs
from nfjax.reproduce import _lines, _runs
from nfjax.reproduce._grids import Grid
from nfjax.reproduce._pace import shown
from nfjax.reproduce._runs import Request, Run
from nfjax.runs import workdirs
from nfjax.training import networks, rescaling

FILE = "beginnings.jsonl"
SHARE = 0.25  # of the time that is left, where there is an end to it and something to train
SEEDS, BATCH = 5, 32
MENDED_ON = 8  # images, where kernels are changed first
Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A network as it is drawn.

    Attributes:
        network: By which it is found: its label, and a digest of its settings.
        parameters: Of the network.
        macs: Multiply-accumulates for one image.
        forward: Variance at the first block divided by that at the last, of each seed, smallest to largest.
        backward: That of the gradient.
        closed: Both in closed form, None where there is none.
    """

    network: str
    parameters: Count
    macs: Count
    forward: Sequence[float]
    backward: Sequence[float]
    closed: tuple[float, float] | None

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be read off a network."""
        if not self.forward or len(self.forward) != len(self.backward):
            raise ValueError("expected as many forward as backward ratios, one for each seed")
        for ratios in (self.forward, self.backward):
            if list(ratios) != sorted(ratios):
                raise ValueError("expected ratios from the smallest to the largest")


def measure(run: Run, classes: int) -> Beginning:
    """Measures the network of a run on N(0, 1) noise, with an N(0, 1) gradient at the last block, for five seeds.

    Args:
        run: Whose network it is.
        classes: Of the images.

    Raises:
        ValueError: It has no residual blocks, or cannot be built.
    """
    size = run.settings["data.image_size"]
    shape, mend = (BATCH, size, size, 3), rescaling.method(run.config)

    def make(seed: int) -> object:
        model = networks.build(run.config, classes, jax.random.key(seed))
        if mend is None:
            return model
        # On noise of its own, and not on that which is measured.
        return mend(model, spp.noise((MENDED_ON, *shape[1:]))(jax.random.key(SEEDS + seed)), seed=seed)

    profile = spp.propagate_seeds(make, spp.noise(shape), seeds=SEEDS)
    predicted = spp.predict(make(0), shape)
    spent = cost.count(networks.shapes(run.config, classes), (1, *shape[1:]))

    def first_over_last(name: str) -> list[float]:
        samples = np.asarray(profile.samples[name], np.float64)
        return sorted(float(f"{ratio:.6g}") for ratio in samples[:, 0] / samples[:, -1])

    closed = None
    if predicted is not None:
        forward, backward = predicted.forward_var, predicted.backward_var
        closed = float(f"{forward[0] / forward[-1]:.6g}"), float(f"{backward[0] / backward[-1]:.6g}")
    ratios = [first_over_last(name) for name in ("forward_var", "backward_var")]
    return Beginning(_key(run, classes), spent.parameters, spent.macs, *ratios, closed)


def read(grid: Grid, request: Request, classes: int) -> dict[str, Beginning]:
    """Those that were measured, by the label of their network."""
    entries = _lines.read(request.out / FILE, Beginning, "what is known of a network", "its network is measured again")
    known = {one.network: one for one in entries}
    keys = {cell.label: _key(_runs.make_run(grid, cell, 0, request), classes) for cell in grid.cells}
    return {label: known[key] for label, key in keys.items() if key in known}


def measure_missing(grid: Grid, request: Request, classes: int) -> None:
    """Measures what was not, network after network, and keeps each as soon as it is there, until the time is over, or a
    quarter of it where something is to be trained.

    Args:
        grid: What is compared.
        request: What is asked for.
        classes: Of the images.
    """
    there = read(grid, request, classes)
    missing = [cell for cell in _runs.choose_cells(grid, request) if cell.label not in there]
    start, longest = time.monotonic(), 0.0
    until = request.until
    if request.data and until < math.inf:
        until = start + SHARE * (until - start)
    for number, cell in enumerate(missing):
        begin = time.monotonic()
        if begin + longest >= until:
            return
        _lines.append(request.out / FILE, measure(_runs.make_run(grid, cell, 0, request), classes))
        compilation.forget()
        now = time.monotonic()
        longest = max(longest, now - begin)
        left = (now - start) / (number + 1) * (len(missing) - number - 1)
        line = f"before training  {number + 1:>2}/{len(missing)}  {cell.label:<50} {now - begin:5.1f} s"
        print(f"{line}, about {shown(left)} left", file=sys.stderr, flush=True)


def _key(run: Run, classes: int) -> str:
    """ "ResNet-18 IdShort, He fan-out, 0123abcd": the same for all runs that begin with such a network, and when later
    versions have fields more.
    """
    default = workdirs.essence(configs.base())
    model = {name: value for name, value in run.settings.items() if name.startswith("model.")}
    settings = {name: value for name, value in model.items() if value != default.get(name)}
    exact = json.dumps([settings, run.settings["data.image_size"], classes], sort_keys=True)
    return f"{run.cell.label}, {hashlib.sha256(exact.encode()).hexdigest()[:8]}"
