"""The fields of the picture that compares networks: what stands in each, and its colour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nfjax.reproduce import _rates, _records
from nfjax.reproduce._rates import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND = (
    "✗ does not train    ÷ diverged    (n) the mean of n seeds    · not measured    grey: the largest rate is not known"
)
# What decides the colour, and the text. False where a network does not train, None where that is not known.
Field = tuple[float | bool | None, str]
UNKNOWN: Field = (None, "·")


def accuracy(outcome: Outcome) -> Field:
    """The mean test accuracy in percent, of the runs at the rate of the config."""
    usual = outcome.usual
    if not usual:
        return UNKNOWN
    reached = _records.over_seeds(usual, "test_accuracy")
    if reached is None:
        return False, "÷"
    seeds = f" ({reached.n})" if len(usual) > 1 else ""
    diverged = " ÷" if reached.n < len(usual) else ""
    if not any(map(_rates.trains, usual)):
        return False, f"✗{seeds}{diverged}"
    return 100 * reached.mean, f"{100 * reached.mean:.0f}{seeds}{diverged}"


def largest(outcome: Outcome) -> Field:
    """The largest rate at which it trains, by its exponent."""
    if not outcome.trained:
        return UNKNOWN
    low, high = _rates.bracket(outcome.trained)
    if low < _rates.LOWEST:
        return (False, "✗") if high == _rates.LOWEST else (None, f"< {outcome.rate * 2.0**high:.2g}")
    at = f"{outcome.rate * 2.0**low:.2g}"
    if high - low > 1:
        return None, f"≥ {at}"
    return low, at if high <= _rates.HIGHEST else f"≥ {at}"


def best(outcome: Outcome) -> Field:
    """The best test accuracy in percent, of all rates that were tried with the first seed."""
    if not outcome.trained:
        return UNKNOWN
    if (found := outcome.best()) is not None:
        return 100 * found[1], f"{100 * found[1]:.0f}"
    return (False, "✗") if _rates.largest(outcome.trained) is not None else UNKNOWN


def draw(axes: Axes, fields: Mapping[tuple[int, int], Field]) -> None:
    """A field for each (row, column): from dark for the least to light for the most, red where it does not train."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    values = [value for value, _ in fields.values() if value is not None and value is not False]
    low, high = min(values, default=0.0), max(values, default=1.0)
    colours = colormaps["viridis"]
    for (row, column), (value, text) in fields.items():
        colour, ink = "#e8e8e8", "#444444"
        if value is False:
            colour, ink = "#8c1d18", "white"
        elif value is not None:
            share = (value - low) / (high - low) if high > low else 1.0
            colour, ink = colours(0.15 + 0.85 * share), "black" if share > 0.5 else "white"
        axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=colour, linewidth=0))
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
