"""What was measured, and what it means."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nfjax.spp._diagnosis import Diagnosis, diagnose
from nfjax.spp._mode import Mode

STATISTICS = ("forward_var", "backward_var", "channel_sq_mean", "channel_var", "branch_var", "branch_share")


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Profile:
    """Signal propagation through a network, one entry per block in execution order.

    paths: where each block stands in the model; a block that runs several times is numbered. shapes, dtypes: of the
    blocks' outputs. seeds: of the runs. samples: each statistic as float64 [seeds, blocks]. outputs: what was measured
    of each block, its path and, where it returns more than one array, the array's place in that: "blocks/0[1]". mode:
    in which mode the network ran. zeros: parameters that are all zero and multiply what a block returns, before any
    other block does, by the block's path ("" for what comes before the first); looked for only where a variance is 0 or
    a block is the identity.

    As attributes, the median over the seeds, float64 [blocks]:
    forward_var, Var[x_l] over the whole output tensor of block l; backward_var, Var[dL/dx_l] of the gradient there;
    and Brock et al.'s three (2021a): channel_sq_mean, the squared mean of each channel, averaged over channels (the
    last axis); channel_var, the variance within each channel, averaged; branch_var, that of the residual branch before
    it is added, NaN where a block has none. Further branch_share, Var[branch] / Var[x_l] over whole tensors: of what is
    called a branch, or where nothing is, or where a factor behind it makes the block the identity, of x_l - x for the
    input x that has x_l's shape; NaN where there is none. All are population statistics, accumulated in float32.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    seeds: tuple[int, ...]
    samples: Mapping[str, np.ndarray]
    outputs: tuple[str, ...] = ()
    mode: Mode = dataclasses.field(default_factory=Mode)
    zeros: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", self.paths)

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

    @property
    def branch_share(self) -> np.ndarray:
        return self.quantile("branch_share", 0.5)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def stages(self) -> list[slice]:
        """Runs of blocks whose outputs have the same shape."""
        starts = [i for i in range(len(self)) if i == 0 or self.shapes[i] != self.shapes[i - 1]]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def diagnose(self, tolerance: float = 10.0) -> Diagnosis:
        """Whether the signal survives, both ways, in which mode of the network, and what the verdict rests on.
        tolerance: by what factor a variance may leave that of its first block (forward) or of its last (backward) and
        still count as preserved; 10 is our choice.
        """
        return diagnose(self, tolerance)

    def rows(self) -> Iterator[list[Any]]:
        """A table of the samples: its head, then one row per seed and block, values to seven digits."""
        yield ["seed", "index", "path", "shape", "dtype", *STATISTICS, "output", "mode"]
        for s, seed in enumerate(self.seeds):
            for i, path in enumerate(self.paths):
                shape = "x".join(map(str, self.shapes[i]))
                values = [f"{self.samples[statistic][s, i]:.7g}" for statistic in STATISTICS]
                yield [seed, i, path, shape, self.dtypes[i], *values, self.outputs[i], str(self.mode)]

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
            "outputs": self.outputs,
            "mode": {"text": str(self.mode), **dataclasses.asdict(self.mode)},
            "zeros": dict(self.zeros),
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
        for i, path in enumerate(self.outputs):
            shape = "x".join(map(str, self.shapes[i]))
            lines.append([str(i), path, shape, *(f"{columns[c][i]:.3g}" for c in shown)])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        align = [str.rjust, str.ljust, str.ljust, *([str.rjust] * len(shown))]
        table = [
            "  ".join(a(cell, w) for a, cell, w in zip(align, line, widths, strict=True)).rstrip() for line in lines
        ]
        seeds = f", median of {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        head = f"Profile of {len(self)} blocks, {'/'.join(sorted(set(self.dtypes)))}{seeds}"
        return "\n".join([head, *filter(None, [str(self.mode)]), *table])
