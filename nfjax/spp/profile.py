"""What was measured, and what it means."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

STATISTICS = ("forward_var", "backward_var", "channel_sq_mean", "channel_var", "branch_var")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Profile:
    """Signal propagation through a network, one entry per block in execution order.

    paths: where each block stands in the model; a block that runs several times is numbered. shapes, dtypes: of the
    blocks' outputs. seeds: of the runs. samples: each statistic as float64 [seeds, blocks].

    As attributes, the median over the seeds, float64 [blocks]:
    forward_var, Var[x_l] over the whole output tensor of block l; backward_var, Var[dL/dx_l] of the gradient there;
    and Brock et al.'s three (2021a): channel_sq_mean, the squared mean of each channel, averaged over channels (the
    last axis); channel_var, the variance within each channel, averaged; branch_var, that of the residual branch before
    it is added, NaN where a block has none. All are population statistics, accumulated in float32.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: Mapping[str, np.ndarray]

    def quantile(self, statistic: str, q: float) -> np.ndarray:
        """The q-quantile of a statistic over the seeds, [blocks]; q = 0.5 is the median that the attributes give."""
        if statistic not in self.samples:
            raise ValueError(f"unknown statistic {statistic!r}: expected one of {', '.join(self.samples)}")
        # Of the sorted values without interpolation across infinities, which would be NaN.
        return np.quantile(
            self.samples[statistic], q, axis=0, method="linear" if self._finite(statistic) else "nearest"
        )

    def _finite(self, statistic: str) -> bool:
        return bool(np.isfinite(self.samples[statistic]).all())

    @property
    def forward_var(self) -> np.ndarray:
        return self.quantile("forward_var", 0.5)

    @property
    def backward_var(self) -> np.ndarray:
        return self.quantile("backward_var", 0.5)

    @property
    def channel_sq_mean(self) -> np.ndarray:
        return self.quantile("channel_sq_mean", 0.5)

    @property
    def channel_var(self) -> np.ndarray:
        return self.quantile("channel_var", 0.5)

    @property
    def branch_var(self) -> np.ndarray:
        return self.quantile("branch_var", 0.5)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def stages(self) -> list[slice]:
        """Runs of blocks whose outputs have the same shape."""
        starts = [i for i in range(len(self)) if i == 0 or self.shapes[i] != self.shapes[i - 1]]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def diagnose(self, tolerance: float = 10.0) -> Diagnosis:
        """Whether the signal survives, both ways. tolerance: by what factor a variance may leave that of its first
        block (forward) or of its last (backward) and still count as preserved; 10 is our choice.
        """
        if not tolerance > 1:
            raise ValueError(f"tolerance={tolerance} must be more than 1: it is a factor")
        return Diagnosis(
            _diagnose(self, self.forward_var, tolerance, "activation"),
            _diagnose(self, self.backward_var, tolerance, "gradient"),
        )

    def rows(self) -> Iterator[list[Any]]:
        """A table of the samples: its head, then one row per seed and block, values to seven digits."""
        yield ["seed", "index", "path", "shape", "dtype", *STATISTICS]
        for s, seed in enumerate(self.seeds):
            for i, path in enumerate(self.paths):
                shape = "x".join(map(str, self.shapes[i]))
                values = [f"{self.samples[statistic][s, i]:.7g}" for statistic in STATISTICS]
                yield [seed, i, path, shape, self.dtypes[i], *values]

    def to_csv(self, path: str | pathlib.Path) -> None:
        """Writes `rows` as CSV."""
        with open(path, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(self.rows())

    def to_json(self, path: str | pathlib.Path | None = None) -> str:
        """As JSON text, also written to `path` if given. What is not finite stands as null, "inf" or "-inf"."""

        def plain(value: float) -> float | str | None:
            return value if math.isfinite(value) else None if math.isnan(value) else str(value)

        content = {
            "paths": self.paths,
            "shapes": self.shapes,
            "dtypes": self.dtypes,
            "seeds": self.seeds,
            **{name: [[plain(v) for v in row] for row in rows.tolist()] for name, rows in self.samples.items()},
        }
        text = json.dumps(content, indent=1)
        if path is not None:
            pathlib.Path(path).write_text(text + "\n")
        return text

    def __repr__(self) -> str:
        columns = [getattr(self, statistic) for statistic in STATISTICS]
        shown = [i for i, column in enumerate(columns) if not np.isnan(column).all()]
        head = ["", "block", "output", *(STATISTICS[i] for i in shown)]
        lines = [head]
        for i, path in enumerate(self.paths):
            shape = "x".join(map(str, self.shapes[i]))
            lines.append([str(i), path, shape, *(f"{columns[c][i]:.3g}" for c in shown)])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        align = [str.rjust, str.ljust, str.ljust, *([str.rjust] * len(shown))]
        table = [
            "  ".join(a(cell, w) for a, cell, w in zip(align, line, widths, strict=True)).rstrip() for line in lines
        ]
        seeds = f", median of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        return "\n".join([f"Profile of {len(self)} blocks, {'/'.join(sorted(set(self.dtypes)))}{seeds}", *table])


@dataclasses.dataclass(frozen=True)
class Direction:
    """What happens to a variance along one way through the network.

    quantity: "activation" (towards the output) or "gradient" (towards the input). verdict: "preserved", "vanishing",
    "exploding" or "non-finite". block: the path of the first block, on this way, at which it is no longer preserved,
    None if it always is. total: the variance at the way's end divided by that at its start. per_block: total to the
    power of 1 / number of steps. extreme: the ratio to the start farthest from 1. stages: per_block within each stage,
    in execution order, NaN for a stage of one block. transitions: the ratio across each boundary between stages.
    """

    quantity: str
    verdict: str
    block: str | None
    total: float
    per_block: float
    extreme: float
    stages: tuple[float, ...]
    transitions: tuple[float, ...]

    def __str__(self) -> str:
        way = "towards the output" if self.quantity == "activation" else "towards the input"
        if self.verdict == "non-finite":
            return f"{self.quantity} variance {way}: non-finite from {self.block!r}"
        if self.extreme == 0:
            return f"{self.quantity} variance {way}: vanishing, 0 from {self.block!r}"
        if not math.isfinite(self.per_block):
            change = "changes without bound"
        else:
            verb, factor = ("grows", self.per_block) if self.per_block >= 1 else ("shrinks", 1 / self.per_block)
            change = f"{verb} {factor:.3g}x per block"
        line = f"{self.quantity} variance {change} {way}, {self.total:.3g}x in all: {self.verdict}"
        if self.block is not None:
            line += f" from {self.block!r}"
            if abs(math.log(max(self.extreme, 1e-300))) > abs(math.log(max(self.total, 1e-300))) + 1:
                line += f" (at worst {self.extreme:.3g}x)"
        if len(self.stages) > 1:
            shown = ", ".join("-" if math.isnan(x) else f"{x:.3g}" for x in self.stages)
            line += f"\n  per block within stages {shown}; across transitions "
            line += ", ".join(f"{x:.3g}" for x in self.transitions)
        return line


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Verdicts on both directions; `str` of it is what a person reads."""

    forward: Direction
    backward: Direction

    def __str__(self) -> str:
        return f"{self.forward}\n{self.backward}"


def _diagnose(profile: Profile, variances: np.ndarray, tolerance: float, quantity: str) -> Direction:
    forward = quantity == "activation"

    def along(values: Sequence[Any]) -> list[Any]:
        return list(values) if forward else list(reversed(values))

    way, paths = np.array(along(variances.tolist())), along(profile.paths)
    steps = len(way) - 1
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = way / way[0]
        total = float(ratios[-1])
        per_block = float(total ** (1 / steps)) if steps else 1.0
        growth, transitions = [], []
        for stage in profile.stages:
            inside = along(variances[stage].tolist())
            growth.append(_root(inside[-1], inside[0], len(inside) - 1))
        for stage in profile.stages[1:]:
            pair = along([variances[stage.start - 1], variances[stage.start]])
            transitions.append(_root(pair[1], pair[0], 1))
    broken = np.flatnonzero(~np.isfinite(way))
    common = {"total": total, "per_block": per_block, "stages": tuple(growth), "transitions": tuple(transitions)}
    if broken.size:
        return Direction(quantity, "non-finite", paths[broken[0]], extreme=math.nan, **common)
    if way[0] == 0:
        return Direction(quantity, "vanishing", paths[0], extreme=0.0, **common)
    distance = np.abs(np.log(np.maximum(ratios, 1e-300)))
    worst = int(np.argmax(distance))
    if distance[worst] <= math.log(tolerance):
        return Direction(quantity, "preserved", None, extreme=float(ratios[worst]), **common)
    exploding = ratios[worst] > 1
    left = np.flatnonzero(ratios > tolerance if exploding else ratios < 1 / tolerance)
    verdict = "exploding" if exploding else "vanishing"
    return Direction(quantity, verdict, paths[left[0]], extreme=float(ratios[worst]), **common)


def _root(end: float, start: float, steps: int) -> float:
    """The growth per step between two variances, NaN for none."""
    return float((np.float64(end) / np.float64(start)) ** (1 / steps)) if steps else math.nan
