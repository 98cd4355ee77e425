"""Signal propagation plots: variances by depth, forward on the left, backward on the right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from nfjax import _figures as figures
from nfjax.spp._profile import Profile
from nfjax.spp._theory import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe colours; dashes and markers tell the curves apart in print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*"


@dataclasses.dataclass(frozen=True)
class Style:
    """How one curve is drawn, in Matplotlib's terms."""

    color: str
    linestyle: str = "-"
    marker: str = "o"


def styles(names: list[str]) -> dict[str, Style]:
    """A style for each curve; neighbours differ in colour, dashes and marker."""
    return {
        name: Style(
            _COLOURS[i % len(_COLOURS)], _DASHES[(i + i // len(_COLOURS)) % len(_DASHES)], _MARKERS[i % len(_MARKERS)]
        )
        for i, name in enumerate(names)
    }


def plot(
    profiles: Profile | Mapping[str, Profile],
    predictions: Prediction | Mapping[str, Prediction | None] | None = None,
    *,
    relative: bool = True,
    band: tuple[float, float] = (0.0, 1.0),
    title: str | None = None,
    style: Mapping[str, Style] | None = None,
) -> Figure:
    """Forward and backward variance by block, on log axes; one curve for each profile, by name.

    Values that a log axis cannot show (0, infinite, NaN) are gaps.

    Args:
        profiles: One, or several by name.
        predictions: Of `spp.predict`, one for all or by the same names: thin lines under the curves.
        relative: Whether the backward variance is divided by that at the last block (its level depends on batch and
            loss).
        band: Two quantiles over the seeds, between which the surroundings of the median are shaded; all of them by
            default.
        title: Of the figure.
        style: Of each curve, by name.

    Returns:
        A Matplotlib figure, `figure.savefig(path)`.

    Raises:
        ValueError: There is no profile, or none for a prediction.
    """
    if isinstance(profiles, Profile):
        profiles = {"": profiles}
    if isinstance(predictions, Prediction):
        predictions = dict.fromkeys(profiles, predictions)
    if not profiles:
        raise ValueError("there is no profile to plot")
    predictions = {name: one for name, one in (predictions or {}).items() if one is not None}
    if unknown := set(predictions) - set(profiles):
        raise ValueError(f"predictions for {', '.join(sorted(unknown))}, of which there is no profile")
    style = styles(list(profiles)) | dict(style or {})
    rows = -(-len(profiles) // 4) if any(profiles) else 0
    figure = figures.new(figsize=(10, 4.0 + 0.2 * rows), layout="constrained")
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(1, 2)
    backward_label = r"Var$[\partial L/\partial x_l]$" + (" relative to the last block" if relative else "")
    for axes, name, label, heading in zip(
        panels, ("forward_var", "backward_var"), (r"Var$[x_l]$", backward_label), ("forward", "backward"), strict=True
    ):
        divide = relative and name == "backward_var"
        for key, profile in profiles.items():
            median = profile.quantile(name, 0.5)
            low, high = (profile.quantile(name, q) for q in band)
            unit = median[-1] if divide else 1.0
            blocks = np.arange(1, len(profile) + 1)
            colour, look = style[key].color, style[key]
            if key in predictions:
                axes.plot(
                    blocks, _shown(getattr(predictions[key], name)), color=colour, linewidth=0.8, alpha=0.6, zorder=1
                )
            axes.plot(
                blocks, _shown(median / unit), color=colour, linestyle=look.linestyle, marker=look.marker,
                markersize=3.5, markevery=max(len(profile) // 16, 1), linewidth=1.4, label=key, zorder=3,
            )  # fmt: skip
            if len(profile.seeds) > 1:
                axes.fill_between(
                    blocks, _shown(low / unit), _shown(high / unit), color=colour, alpha=0.15, linewidth=0
                )
        axes.set(xlabel="block", ylabel=label, yscale="log", title=heading)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
        _wide_enough(axes)
        if len({(tuple(s.start for s in p.stages), len(p)) for p in profiles.values()}) == 1:
            for stage in next(iter(profiles.values())).stages[1:]:
                axes.axvline(stage.start + 0.5, color="0.8", linewidth=0.8, zorder=0)
    handles, labels = panels[0].get_legend_handles_labels()
    if predictions:
        handles.append(Line2D([], [], color="0.4", linewidth=0.8))
        labels.append("thin: closed form")
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


def _shown(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _wide_enough(axes: object) -> None:
    """A curve that stays within a factor of 10 is seen to be flat, and not blown up to the height of the panel."""
    low, high = axes.get_ylim()
    if low > 0 and high / low < 100:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10, middle * 10)
