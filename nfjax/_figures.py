"""Figures that are drawn into files, whatever the surroundings say about windows, notebooks and home directories."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new(**settings: Any) -> Figure:
    """An empty figure that needs no window, and that a notebook shows though pyplot does not know it.

    settings: of matplotlib.figure.Figure.
    """
    figure = _figure_class()(**settings)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    return figure


@functools.cache
def _figure_class() -> type[Figure]:
    if "matplotlib" not in sys.modules:
        _import_matplotlib()
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that shows itself."""

        def _repr_png_(self) -> bytes:
            stream = io.BytesIO()
            self.savefig(stream, format="png", dpi=80)
            return stream.getvalue()

    return NotebookFigure


def _import_matplotlib() -> None:
    """`import matplotlib` fails where MPLBACKEND names a backend that is not installed, as a process that was started
    from a notebook inherits it.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):  # for pyplot, where the user takes it, as matplotlib does itself
            matplotlib.rcParams["backend"] = backend
