"""One panel of a picture each: a variance by block, one of the details, and where a verdict turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nfjax.spp._diagnosis import Direction
from nfjax.spp._profile import Profile
from nfjax.spp._theory import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colour-blind-safe colours; dashes and markers tell the curves apart in print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*"

# Of the verdicts: a symbol, for those who do not see the colour, and the colour.
VERDICTS = {
    "preserved": ("✓", "#1A7F37"),
    "exploding": ("▲", "#C62828"),
    "vanishing": ("▼", "#7D4CC9"),
    "non-finite": ("✕", "#C62828"),
}
STAGE_COLOUR = "#CCCCCC"
MARK_DASHES = (0, (5, 2))
_LONGEST_PATH = 34


@dataclasses.dataclass(frozen=True)
class Style:
    """How one curve is drawn, in Matplotlib's terms."""

    color: str
    linestyle: str = "-"
    marker: str = "o"


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each curve; neighbours differ in colour, dashes and marker."""
    return {
        name: Style(
            COLOURS[i % len(COLOURS)], _DASHES[(i + i // len(COLOURS)) % len(_DASHES)], _MARKERS[i % len(_MARKERS)]
        )
        for i, name in enumerate(names)
    }


class SingularValues(Protocol):
    """Of the blocks' Jacobians: what `spp.jacobians` returns. Both arrays are float64 [blocks]."""

    paths: tuple[str, ...]

    @property
    def largest(self) -> np.ndarray: ...
    @property
    def mean_square(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a panel: what `columns` has under `name`."""

    name: str
    caption: str
    hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Detail:
    """A small panel below the variances.

    Attributes:
        heading: The question that it answers.
        label: Of its y axis.
        curves: What is drawn in it, where it was measured.
        scale: "share" from 0 to 1, "cosine" to 1, or "log".
        directions: Of whose verdicts the turn is marked in it: "forward" and "backward".
        meaning: How to read it, in words.
    """

    heading: str
    label: str
    curves: tuple[Curve, ...]
    scale: str = "share"
    directions: tuple[str, ...] = ("forward",)
    meaning: str = ""


DETAILS = (
    Detail(
        "Do different inputs become the same?", "cosine of two inputs", (Curve("similarity", ""),), "cosine",
        meaning="Mean cosine of the activations of two examples. Near 1 the network no longer tells inputs apart.",
    ),
    Detail(
        "How much does each block add?", "branch's share", (Curve("branch_share", ""),),
        meaning="Variance of the residual branch, divided by that of the block's output. Near 0 the block is the "
        "identity.",
    ),
    Detail(
        "Which units have stopped reacting?", "share of the units",
        (Curve("dead", "dead: 0 for the whole batch"), Curve("saturated", "saturated", hollow=True)),
        meaning="Dead: units of ReLU and its kin that are 0 for the whole batch. Saturated: outputs of tanh, sigmoid "
        "or erf close to their bounds. Hardly any gradient passes either.",
    ),
    Detail(
        "How far does a block stretch a signal?", "singular values",
        (Curve("largest", "largest"), Curve("root_mean_square", "root mean square", hollow=True)),
        "log", ("forward", "backward"),
        meaning="Singular values of each block's Jacobian. With a root mean square of 1 a signal keeps its length on "
        "average; a largest value far above 1 stretches it in some direction.",
    ),
)  # fmt: skip


def columns(profile: Profile, jacobians: SingularValues | None) -> dict[str, np.ndarray]:
    """All that is known of the blocks, float64 [blocks] each: the medians of the profile's samples, "largest" and
    "root_mean_square" singular values. What is NaN throughout is left out.

    Raises:
        ValueError: The singular values are of other blocks.
    """
    found = {name: profile.quantile(name, 0.5) for name in profile.samples}
    if jacobians is not None:
        place = {path: i for i, path in enumerate(jacobians.paths)}
        if not place.keys() & set(profile.paths):
            raise ValueError(
                f"the singular values are of {_some(jacobians.paths)}, the profile of {_some(profile.paths)}: measure "
                "both with the same where="
            )
        with np.errstate(invalid="ignore"):
            of_blocks = {"largest": jacobians.largest, "root_mean_square": np.sqrt(jacobians.mean_square)}
        for name, values in of_blocks.items():
            found[name] = np.array([values[place[path]] if path in place else np.nan for path in profile.paths])
    return {name: values for name, values in found.items() if not np.isnan(values).all()}


def details(known: Mapping[str, Mapping[str, np.ndarray]]) -> list[Detail]:
    """The details of which something was measured, with those curves; `known` is `columns` by profile."""
    names = {name for one in known.values() for name in one}
    chosen = [dataclasses.replace(d, curves=tuple(c for c in d.curves if c.name in names)) for d in DETAILS]
    return [detail for detail in chosen if detail.curves]


def draw_variance(
    axes: Axes,
    name: str,
    profiles: Mapping[str, Profile],
    predictions: Mapping[str, Prediction],
    style: Mapping[str, Style],
    relative: bool,
    band: tuple[float, float],
    tolerance: float | None = None,
) -> None:
    """Draws "forward_var" or "backward_var" of each profile by block.

    With a tolerance, and where there is but one profile, what counts as preserved is shaded.
    """
    divide, drawn = relative and name == "backward_var", False
    for key, profile in profiles.items():
        median = profile.quantile(name, 0.5)
        low, high = (profile.quantile(name, q) for q in band)
        unit = median[-1] if divide else 1.0
        blocks, look = np.arange(1, len(profile) + 1), style[key]
        drawn |= bool(np.isfinite(_shown(median, unit)).any())
        if key in predictions:
            predicted = _shown(getattr(predictions[key], name))
            axes.plot(blocks, predicted, color=look.color, linewidth=0.8, alpha=0.6, zorder=1)
        axes.plot(
            blocks, _shown(median, unit), color=look.color, linestyle=look.linestyle, marker=look.marker,
            markersize=3.5, markevery=_every(profile), linewidth=1.4, label=key, zorder=3,
        )  # fmt: skip
        if len(profile.seeds) > 1:
            axes.fill_between(
                blocks, _shown(low, unit), _shown(high, unit), color=look.color, alpha=0.15, linewidth=0
            )  # fmt: skip
        start = _shown(median[[-1]] if name == "backward_var" else median[[0]], unit)[0]
        if tolerance is not None and len(profiles) == 1 and np.isfinite(start):
            axes.axhspan(start / tolerance, start * tolerance, color="0.5", alpha=0.1, linewidth=0, zorder=0)
    backward_label = r"Var$[\partial L/\partial x_l]$" + (" relative to the last block" if relative else "")
    axes.set(ylabel=r"Var$[x_l]$" if name == "forward_var" else backward_label, yscale="log")
    _finish(axes, profiles)
    _wide_enough(axes)
    if not drawn:
        _say_nothing(axes)


def draw_detail(
    axes: Axes,
    detail: Detail,
    profiles: Mapping[str, Profile],
    known: Mapping[str, Mapping[str, np.ndarray]],
    style: Mapping[str, Style],
) -> None:
    """Draws one of `details` by block; blocks of which there is nothing are passed over."""
    for key, profile in profiles.items():
        for curve in detail.curves:
            if curve.name not in known[key]:
                continue
            values, look = known[key][curve.name], style[key]
            there = np.isfinite(values) & (values > 0) if detail.scale == "log" else np.isfinite(values)
            if not there.any():
                continue
            axes.plot(
                np.flatnonzero(there) + 1, values[there], color=look.color, linestyle=look.linestyle,
                marker=look.marker, markersize=3, markerfacecolor="none" if curve.hollow else look.color,
                markevery=_every(profile), linewidth=0.9 if curve.hollow else 1.3, zorder=3, clip_on=False,
            )  # fmt: skip
    if not axes.lines:
        _say_nothing(axes)
    axes.set(ylabel=detail.label)
    if detail.scale == "log":
        axes.set_yscale("log")
        axes.axhline(1.0, color="0.5", linewidth=0.8, zorder=1)
        _wide_enough(axes)
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(min(0.0, low) if detail.scale == "cosine" else 0.0, max(1.0, high))
    _finish(axes, profiles)
    if len(detail.curves) > 1:
        from matplotlib.lines import Line2D

        axes.legend(
            [
                Line2D([], [], color="0.4", marker="o", markersize=3, markerfacecolor="none" if c.hollow else "0.4")
                for c in detail.curves
            ],
            [curve.caption for curve in detail.curves],
            fontsize=7.5, frameon=False, loc="best", borderaxespad=0.2, handlelength=1.6,
        )  # fmt: skip


def mark(
    axes: Axes,
    ways: Mapping[str, Direction],
    profiles: Mapping[str, Profile],
    style: Mapping[str, Style],
    named: bool = True,
) -> None:
    """Draws a thin line at the block from which a variance is no longer preserved; of one profile with its path."""
    for key, way in ways.items():
        if way.block is None:
            continue
        profile, alone = profiles[key], len(profiles) == 1
        x = profile.paths.index(way.block) + 1
        colour = VERDICTS[way.verdict][1] if alone else style[key].color
        axes.axvline(x, color=colour, linewidth=0.9, linestyle=MARK_DASHES, zorder=2)
        if alone and named:
            path, right = shorten(way.block), x > (len(profile) + 1) / 2
            if "…" in path:  # what tells it from its neighbours may be in what was left out
                path += f" ({profile.level} {x})"
            axes.annotate(
                f"{path} ↓" if right else f"↓ {path}", (x, 1.0), (3.5 if right else -3.5, 2),
                xycoords=("data", "axes fraction"), textcoords="offset points", color=colour, fontsize=8,
                ha="right" if right else "left", va="bottom", parse_math=False,
            )  # fmt: skip


def head(axes: Axes, text: str, way: Direction | None = None) -> None:
    """Writes a heading above a panel, with the verdict in its colour; below it is room for the label of a mark."""
    pad = 5 if way is None or way.block is None else 15
    if way is None:
        axes.set_title(text, loc="left", fontsize=9.5, pad=pad)
    else:
        symbol, colour = VERDICTS[way.verdict]
        title = axes.set_title(f"{text}: {symbol} {way.verdict}", loc="left", fontsize=11, pad=pad, color=colour)
        title.set_fontweight("bold")


def shorten(path: str) -> str:
    """A path that fits above a panel: of a long one the beginning and, with more weight, the end."""
    path = printable(path)
    if len(path) <= _LONGEST_PATH:
        return path
    return f"{path[: _LONGEST_PATH // 3]}…{path[-(_LONGEST_PATH - _LONGEST_PATH // 3 - 1) :]}"


def printable(text: object) -> str:
    """Text on one line, without what steers a terminal or turns the direction of writing."""
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
        for character in str(text)
    )


def _finish(axes: Axes, profiles: Mapping[str, Profile]) -> None:
    """The x axis, the grid, and lines between the stages where all profiles have the same."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(next(iter(profiles.values())).level)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    longest = max(map(len, profiles.values()))
    margin = 0.05 * (longest - 1)
    axes.set_xlim((1 - margin, longest + margin) if longest > 1 else (0.5, 1.5))
    if longest == 1:
        axes.set_xticks([1])
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    if len({(tuple(s.start for s in p.stages), len(p)) for p in profiles.values()}) == 1:
        for stage in next(iter(profiles.values())).stages[1:]:
            axes.axvline(stage.start + 0.5, color=STAGE_COLOUR, linewidth=0.8, zorder=0)


def _say_nothing(axes: Axes) -> None:
    axes.text(
        0.5, 0.5, "every value is 0, infinite or NaN", transform=axes.transAxes, ha="center", va="center", color="0.45",
        fontsize=9, in_layout=False,
    )  # fmt: skip


def _every(profile: Profile) -> int:
    return max(len(profile) // 16, 1)


def _shown(values: np.ndarray, unit: float = 1.0) -> np.ndarray:
    """What a log axis can show of values in a unit; the rest are gaps."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        values = values / unit
        return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _wide_enough(axes: Axes) -> None:
    """A curve that stays within a factor of 10 is seen to be flat, and not blown up to the height of the panel."""
    low, high = axes.get_ylim()
    if low > 0 and high / low < 100:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 10, middle * 10)


def _some(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
