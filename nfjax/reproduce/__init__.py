"""The paper's tables and figures, measured here: one name each.

Those of `REPRODUCTIONS` are computed at once; those of `TRAINED` need runs, which are trained where they are missing,
and so do those of `COMPARISONS`, which go beyond the paper: networks at many learning rates.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Protocol

from nfjax.reproduce._claims import claims_table
from nfjax.reproduce._grids import DEPTH, GRIDS, MENDED, RULES, VERY_DEEP, Grid
from nfjax.reproduce._runs import Request
from nfjax.reproduce._signal import propagation_figure
from nfjax.reproduce._tables import TABLE_1, TABLE_2, as_printed, cost_table
from nfjax.reproduce._training import ablation_grid


class Result(Protocol):
    """What a reproduction found."""

    def text(self) -> str:
        """For the screen."""

    def write(self, path: pathlib.Path) -> list[pathlib.Path]:
        """To files whose names begin with `path`, in a folder that exists; returns them."""


REPRODUCTIONS: dict[str, Callable[[], Result]] = {
    "table1": functools.partial(cost_table, "Table 1: ResNet-50 and ResNet-101, input 32x32x3, 10 classes", TABLE_1),
    "table2": functools.partial(cost_table, "Table 2: ResNet-18, input 32x32x3, 10 classes", TABLE_2),
    "figure2": functools.partial(propagation_figure, "Figure 2", depths=(50, 101)),
    "figure6": functools.partial(propagation_figure, "Figure 6", depths=(18,)),
}
TRAINED: dict[str, Callable[[Request], Grid]] = {
    **{name: lambda request, grid=grid: grid for name, grid in GRIDS.items()},
    "depth": lambda request: DEPTH,
    "ablations": ablation_grid,
}
COMPARISONS: dict[str, Grid] = {"rules": RULES, "very_deep": VERY_DEEP, "mended": MENDED}
# What the runs in a folder say about each claim of the paper.
SUMMARIES: dict[str, Callable[[pathlib.Path], Result]] = {"claims": claims_table}

__all__ = [
    "COMPARISONS", "REPRODUCTIONS", "SUMMARIES", "TABLE_1", "TABLE_2", "TRAINED", "Request", "Result", "as_printed",
    "cost_table", "propagation_figure",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
