"""Many networks side by side: what they cost, what their signal does, at which learning rates they train, how well."""

from __future__ import annotations

from nfjax.reproduce import _beginnings, _rates, _runs
from nfjax.reproduce._grids import Grid
from nfjax.reproduce._runs import Request

CLASSES = 10  # where there are no images that say how many


def measure(grid: Grid, request: Request) -> None:
    """Measures what is missing of the networks before training, then trains what is missing.

    Raises:
        ValueError: There is no such network; otherwise as `_runs.train_missing`.
    """
    cell, *_ = _runs.chosen(grid, request)
    classes = CLASSES
    if request.data:
        classes = len(_runs.open_data(grid.dataset, _runs.make_config(grid.dataset, cell, 0, request)).class_names)
    _beginnings.measure_missing(grid, request, classes)
    if request.data:
        _runs.train_missing(grid.title, grid.dataset, _rates.plan(grid, request), request)


def comparisons(grid: Grid, request: Request) -> list:
    """What there is of a grid."""
    return []
