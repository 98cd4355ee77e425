"""Signal propagation plots: variances by depth, forward on the left, backward on the right, the details below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nfjax import _figures as figures
from nfjax.spp import _panels as panels
from nfjax.spp._panels import SingularValues, Style
from nfjax.spp._profile import Profile
from nfjax.spp._theory import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each direction, as a diagnosis names it, and its statistic.
DIRECTIONS = (("forward", "forward_var"), ("backward", "backward_var"))


def plot(
    profiles: Profile | Mapping[str, Profile],
    predictions: Prediction | Mapping[str, Prediction | None] | None = None,
    *,
    relative: bool = True,
    band: tuple[float, float] = (0.0, 1.0),
    title: str | None = None,
    style: Mapping[str, Style] | None = None,
    details: bool = False,
    jacobians: SingularValues | Mapping[str, SingularValues] | None = None,
    tolerance: float = 10.0,
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
        details: Whether the verdict is drawn as well, and below it whatever else was measured: whether different inputs
            become the same, how much each block adds, dead and saturated units. A thin line marks the block from which
            a variance is no longer preserved; of a single profile, the grey band is what counts as preserved.
        jacobians: Of `spp.jacobians`, of the one profile or by the same names: singular values as one more detail.
        tolerance: Of the verdict, as for `Profile.diagnose`.

    Returns:
        A Matplotlib figure, `figure.savefig(path)`.

    Raises:
        ValueError: There is no profile, or none for a prediction or for singular values; these are of other blocks; the
            tolerance is not more than 1.
        TypeError: What is given is no profile.
    """
    profiles, predictions, jacobians = by_name(profiles, predictions, jacobians)
    style = panels.styles(list(profiles)) | dict(style or {})
    known = {key: panels.columns(profile, jacobians.get(key)) for key, profile in profiles.items()}
    details = details or bool(jacobians)
    small = panels.details(known) if details else []
    per_row = {1: 1, 3: 3}.get(len(small), 2)
    legend_rows, detail_rows = -(-len(profiles) // 4) if any(profiles) else 0, -(-len(small) // per_row)
    figure = figures.new(figsize=(10, 4.0 + 0.2 * legend_rows + 1.6 * detail_rows), layout="constrained")
    grid = figure.add_gridspec(1 + detail_rows, 6, height_ratios=[3.4, *[1.5] * detail_rows])
    first = figure.add_subplot(grid[0, :3])
    large = [first, figure.add_subplot(grid[0, 3:], sharex=first)]
    diagnoses = {key: profile.diagnose(tolerance) for key, profile in profiles.items()} if details else {}
    ways = {d: {key: getattr(one, d) for key, one in diagnoses.items()} for d, _ in DIRECTIONS}
    for axes, (direction, name) in zip(large, DIRECTIONS, strict=True):
        panels.draw_variance(axes, name, profiles, predictions, style, relative, band, tolerance if details else None)
        panels.mark(axes, ways[direction], profiles, style)
        if len(diagnoses) == 1:
            panels.head(axes, direction, *ways[direction].values())
        else:
            axes.set_title(direction)
    width = 6 // per_row
    for i, detail in enumerate(small):
        row, column = divmod(i, per_row)
        axes = figure.add_subplot(grid[1 + row, column * width : (column + 1) * width], sharex=first)
        panels.draw_detail(axes, detail, profiles, known, style)
        if len(profiles) == 1:
            for direction in detail.directions:
                panels.mark(axes, ways[direction], profiles, style, named=False)
        panels.head(axes, detail.heading)
    for axes in figure.axes[:-per_row] if small else ():  # one label below each column will do
        axes.set_xlabel("")
    marked = any(way.block for by_profile in ways.values() for way in by_profile.values())
    _add_legend(figure, list(profiles), bool(predictions), marked, tolerance if details else None)
    if title:
        figure.suptitle(title)
    return figure


def _add_legend(figure: Figure, names: list[str], predicted: bool, marked: bool, tolerance: float | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [line for line in figure.axes[0].lines if line.get_label() in names and line.get_label()]
    labels = [line.get_label() for line in handles]
    if predicted:
        handles.append(Line2D([], [], color="0.4", linewidth=0.8))
        labels.append("thin: closed form")
    if tolerance is not None and len(names) == 1:
        handles.append(Patch(color="0.5", alpha=0.15, linewidth=0))
        labels.append(f"grey: within a factor of {tolerance:g} of where it starts")
    if marked:
        handles.append(Line2D([], [], color="0.4", linewidth=0.9, linestyle=panels.MARK_DASHES))
        labels.append("upright: no longer preserved from here on")
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)


def by_name(
    profiles: Any, predictions: Any, jacobians: Any
) -> tuple[dict[str, Profile], dict[str, Prediction], dict[str, SingularValues]]:
    """What was given for one profile or several, each by the profile's name; that of a single one is "".

    Raises:
        ValueError: As `plot` does, likewise TypeError.
    """
    if isinstance(profiles, Profile):
        profiles = {"": profiles}
    if not isinstance(profiles, Mapping) or not all(isinstance(profile, Profile) for profile in profiles.values()):
        raise TypeError(f"profiles={profiles!r:.80}: expected an spp.Profile, or a dictionary of them by name")
    if not profiles:
        raise ValueError("there is no profile to plot")
    if isinstance(predictions, Prediction):
        predictions = dict.fromkeys(profiles, predictions)
    if jacobians is not None and not isinstance(jacobians, Mapping):
        if len(profiles) > 1:
            raise ValueError(f"jacobians= are those of one of {len(profiles)} profiles: expected a dictionary by name")
        jacobians = dict.fromkeys(profiles, jacobians)
    found = []
    for what, given in (("predictions", predictions), ("jacobians", jacobians)):
        given = {name: one for name, one in (given or {}).items() if one is not None}
        if unknown := given.keys() - profiles.keys():
            raise ValueError(f"{what} for {', '.join(sorted(map(str, unknown)))}, of which there is no profile")
        found.append(given)
    return dict(profiles), *found
