"""The largest learning rate at which a network trains, on a grid of factors of two around that of the config.

A rate is known by its exponent: 0 for that of the config, 1 for twice, -1 for half of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from nfjax.reproduce import _records, _runs
from nfjax.reproduce._grids import Cell, Grid
from nfjax.reproduce._records import Record
from nfjax.reproduce._runs import Plan, Request, Run

LOWEST, HIGHEST = -8, 8
ABOVE = (2, 4)  # what is tried before smaller ones where that of the config does not train
RATE = "optim.learning_rate"
ERRORS = 3  # standard errors of guessing as many test images, by which a network that trains is above guessing


def trains(record: Record) -> bool:
    """Whether a run came to its end, and above guessing by more than chance.

    The claims of the paper are about long trainings, and ask for twice the accuracy of guessing; after few steps this
    would ask how fast a network trains, and not whether.
    """
    guessing, end = record.guessing or 1 / record.classes, record.final("test_accuracy")
    error = math.sqrt(guessing * (1 - guessing) / record.images[1])
    return record.diverged is None and end is not None and end > guessing + ERRORS * error


def bracket(trained: Mapping[int, bool]) -> tuple[int, int]:
    """(the largest rate that is known to train, the smallest above it that is known not to), both by exponent; one step
    beyond the grid where there is none.
    """
    low = max((exponent for exponent, good in trained.items() if good), default=LOWEST - 1)
    high = min((exponent for exponent, good in trained.items() if not good and exponent > low), default=HIGHEST + 1)
    return low, high


def largest(trained: Mapping[int, bool]) -> int | None:
    """The exponent of the largest rate that trains, one below the grid for none; None where it is not known yet."""
    low, high = bracket(trained)
    return low if high - low == 1 else None


def next_exponent(trained: Mapping[int, bool], likely: int | None = None, diverged: Collection[int] = ()) -> int | None:
    """Which rate is to be tried next: the config's first, then by bisection; None where the largest is known.

    Args:
        trained: Whether it trains, by exponent.
        likely: What the largest may be, from a network that is much the same: the search begins there, and goes on from
            it step by step.
        diverged: Those that did; above them nothing is tried.
    """
    if 0 not in trained:
        return 0
    low, high = bracket(trained)
    if high - low == 1:
        return None
    if low < LOWEST and (likely is None or likely > 0):
        # None is known to train: the config's rate may be too small for the budget as well as too large.
        for above in ABOVE if likely is None else (likely, *ABOVE):
            if above not in trained and above <= min(diverged, default=HIGHEST):
                return above
    if likely is None:
        return (low + high) // 2
    return min(max(likely, low + 1), high - 1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the runs of a network came to.

    Attributes:
        rate: Of the config.
        runs: By exponent of the learning rate, then by seed.
    """

    rate: float
    runs: Mapping[int, Mapping[int, Record]]

    @property
    def usual(self) -> list[Record]:
        """The runs at the rate of the config, by seed."""
        return [record for _, record in sorted(self.runs.get(0, {}).items())]

    @property
    def diverged(self) -> set[int]:
        """The exponents at which the first seed did."""
        return {exponent for exponent, seeds in self.runs.items() if 0 in seeds and seeds[0].diverged is not None}

    @property
    def trained(self) -> dict[int, bool]:
        """Whether the first seed trains, by exponent."""
        return {exponent: trains(seeds[0]) for exponent, seeds in self.runs.items() if 0 in seeds}

    def largest_rate(self) -> str:
        """The largest rate at which it trains, for a person: "0.32"; "0.04 to 0.32" between a rate that trains and one
        that does not, where what is between was not tried; empty where nothing was.
        """
        if not self.trained:
            return ""
        low, high = bracket(self.trained)
        shown = [f"{self.rate * 2.0**exponent:.3g}" for exponent in (low, high)]
        if low < LOWEST:
            return "none" if high == LOWEST else f"none yet, less than {shown[1]}"
        if high > HIGHEST:
            return f"at least {shown[0]}"
        return shown[0] if high - low == 1 else " to ".join(shown)

    def best(self) -> tuple[float, float] | None:
        """(rate, test accuracy) of the best run with the first seed."""
        ends = [
            (record.final("test_accuracy"), self.rate * 2.0**exponent)
            for exponent, seeds in self.runs.items()
            if (record := seeds.get(0)) is not None and trains(record)
        ]
        if not ends:
            return None
        accuracy, rate = max(ends)
        return rate, accuracy


def make_reader(grid: Grid, request: Request) -> Callable[[Sequence[Record]], dict[str, Outcome]]:
    """From records to what they say of each network of a grid, by its label.

    Raises:
        ValueError: The config's learning rate is not positive, or a setting is wrong.
    """
    usual = {cell.label: _runs.make_run(grid, cell, 0, request).settings for cell in grid.cells}
    rates = {label: settings[RATE] for label, settings in usual.items()}
    if wrong := [rate for rate in rates.values() if not 0 < rate < math.inf]:
        raise ValueError(f"optim.learning_rate={wrong[0]:g} must be positive")

    def read(known: Sequence[Record]) -> dict[str, Outcome]:
        by_network: dict[tuple[int, str], list[Record]] = {}
        for record in known:
            by_network.setdefault((record.depth, record.curve), []).append(record)
        found = {}
        for cell in grid.cells:
            runs: dict[int, dict[int, Record]] = {}
            for record in by_network.get((cell.depth, cell.curve), []):
                exponent = _exponent(record.rate, rates[cell.label])
                if exponent is not None and _records.agree(_shared(record.settings), _shared(usual[cell.label])):
                    runs.setdefault(exponent, {})[record.seed] = record
            found[cell.label] = Outcome(rates[cell.label], runs)
        return found

    return read


def plan_rates(grid: Grid, request: Request) -> Plan:
    """For each network, the most telling first: one run at the rate of the config; the largest rate at which it trains,
    as far as it is known which run tells it, beginning where it is for the same network with fewer layers; further
    seeds, network by network, since these are the same program.
    """
    cells = _runs.choose_cells(grid, request)
    read = make_reader(grid, request)
    made: dict[tuple[str, int, int], Run] = {}

    def run(cell: Cell, exponent: int, seed: int) -> Run:
        key = cell.label, exponent, seed
        if key not in made:
            made[key] = _at(grid, cell, exponent, seed, request)
        return made[key]

    def plan(known: Sequence[Record]) -> list[Run]:
        found = read(known)
        runs = [run(cell, 0, 0) for cell in cells]
        for cell in cells:
            trained = found[cell.label].trained
            tried = sorted(set(trained) - {0})
            following = next_exponent(trained, _likely(cell, grid, found), found[cell.label].diverged)
            runs += [run(cell, exponent, 0) for exponent in tried]
            runs += [] if following is None or following == 0 else [run(cell, following, 0)]
        further = range(1, request.seeds)
        return runs + [
            run(cell, 0, seed) for depth in grid.depths for cell in cells if cell.depth == depth for seed in further
        ]

    return plan


def _likely(cell: Cell, grid: Grid, found: Mapping[str, Outcome]) -> int | None:
    """The largest rate of the same network with fewer layers, None where it is not known or there is none."""
    for depth in sorted((depth for depth in grid.depths if depth < cell.depth), reverse=True):
        for other in grid.cells:
            if (other.depth, other.curve) == (depth, cell.curve):
                exponent = largest(found[other.label].trained)
                if exponent is not None and exponent >= LOWEST:
                    return exponent
    return None


def _at(grid: Grid, cell: Cell, exponent: int, seed: int, request: Request) -> Run:
    if exponent:
        rate = _runs.make_run(grid, cell, seed, request).settings[RATE]
        told = f"{cell.label}, learning rate {rate * 2.0**exponent:.3g}"
        cell = dataclasses.replace(cell, label=told, changes={**cell.changes, RATE: rate * 2.0**exponent})
    return _runs.make_run(grid, cell, seed, request)


def _exponent(rate: float, usual: float) -> int | None:
    """None for a rate that is not of the grid."""
    if not 0 < rate < math.inf:
        return None
    exponent = round(math.log2(rate / usual))
    return exponent if LOWEST <= exponent <= HIGHEST and math.isclose(rate, usual * 2.0**exponent) else None


def _shared(settings: Mapping[str, object]) -> dict[str, object]:
    """But for those in which the runs of a network differ."""
    return {name: value for name, value in settings.items() if name not in ("seed", RATE)}
