"""A sweep at a glance: one panel for each quantity, size against value, one curve for each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nfjax import _figures as figures
from nfjax.spp._sweep_fit import QUANTITIES, TOLERANCE
from nfjax.spp._sweep_result import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "activation": "activations",
    "activation_change": "change of activations",
    "output": "output",
    "output_change": "change of the output",
    "kernel_change": "relative change of kernels",
}
_WORDS = {
    "grows": "depends on {}",
    "shrinks": "depends on {}",
    "independent": "independent of {}",
    "unclear": "unclear",
}


def plot_sweep(sweep: Sweep, *, tolerance: float = TOLERANCE, title: str | None = None) -> Figure:
    """Sizes against width, depth or what was swept, on log axes; flat curves are what one hopes for.

    Each step is a curve, the median over the seeds, of the block whose size depends most on the value, with its law in
    the legend; the other blocks are the thin lines. What a log axis cannot show (0, infinite, NaN) is a gap.

    Args:
        sweep: Of `spp.sweep`.
        tolerance: An exponent up to this counts as none.
        title: Of the figure.

    Returns:
        A Matplotlib figure, `figure.savefig(path)`.
    """
    quantities = [quantity for quantity in QUANTITIES if sweep.places[quantity]]
    if not sweep.steps:
        quantities = [quantity for quantity in quantities if QUANTITIES[quantity].from_start]
    columns = min(len(quantities) + 1, 3)
    rows = -(-(len(quantities) + 1) // columns)
    figure = figures.new(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, quantity in zip(panels, quantities, strict=False):
        _quantity(axes, sweep, quantity, tolerance)
    losses = np.median(sweep.losses, axis=1)
    for step in range(sweep.steps + 1):
        look = {"color": _colour(sweep, step), "marker": "o", "markersize": 3.5, "linewidth": 1.4}
        panels[len(quantities)].plot(sweep.values, _shown(losses[:, step]), label=f"step {step}", **look)
    _finish(panels[len(quantities)], sweep, "loss")
    for axes in panels[len(quantities) + 1 :]:
        axes.set_visible(False)
    figure.suptitle(title or f"{sweep.name}: {sweep.setting}", fontsize=11)
    return figure


def _quantity(axes: Any, sweep: Sweep, quantity: str, tolerance: float) -> None:
    sizes, places = np.median(sweep.sizes[quantity], axis=1), sweep.places[quantity]
    steps = range(0 if QUANTITIES[quantity].from_start else 1, sweep.steps + 1)
    trends = [sweep.trend(quantity, step, tolerance) for step in steps]
    for step, trend in zip(steps, trends, strict=True):
        chosen = places.index(trend.place) if trend.place in places else 0
        colour = _colour(sweep, step)
        for place in range(len(places)):
            if place != chosen:
                axes.plot(sweep.values, _shown(sizes[:, step, place]), color=colour, linewidth=0.5, alpha=0.5)
        law = trend.law if not math.isnan(trend.exponent) else trend.verdict
        axes.plot(
            sweep.values, _shown(sizes[:, step, chosen]), color=colour, marker="o", markersize=3.5, linewidth=1.6,
            zorder=3, label=f"step {step}: {law}",
        )  # fmt: skip
    word = _WORDS.get(trends[-1].verdict, trends[-1].verdict).format(sweep.name)
    good = all(trend.verdict in ("independent", "zero") for trend in trends)
    unclear = not good and all(trend.verdict in ("independent", "zero", "unclear") for trend in trends)
    colour = "#00704F" if good else "0.3" if unclear else "#B34400"
    thick = dict.fromkeys(trend.place for trend in trends if trend.place)
    drawn = f"in {', '.join(thick)}; thin: the others" if len(places) > 1 and thick else None
    _finish(axes, sweep, f"{_TITLES[quantity]}: {word}", colour, drawn)


def _finish(axes: Any, sweep: Sweep, title: str, colour: str = "0.0", drawn: str | None = None) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log", xlabel=sweep.name)
    axes.set_title(title, fontsize=10, color=colour)
    axes.set_xticks(sweep.values, [f"{value:g}" for value in sweep.values])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if low > 0 and high / low < 30:  # what is flat is seen to be
        middle = (low * high) ** 0.5
        low, high = middle / 30**0.5, middle * 30**0.5
        axes.yaxis.set_minor_formatter(NullFormatter())
    if low > 0:
        axes.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", title=drawn, title_fontsize=8, alignment="left")


def _colour(sweep: Sweep, step: int) -> Any:
    """From dark to light over the steps, readable in grey."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.85 * step / max(sweep.steps, 1))


def _shown(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(values) & (values > 0), values, np.nan)
