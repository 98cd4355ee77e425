"""The pictures of a report: one SVG for each panel, so that they stack on a phone and take the colours of the page."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from nfjax import _figures as figures
from nfjax.spp import _panels as panels
from nfjax.spp._diagnosis import Diagnosis
from nfjax.spp._panels import Style
from nfjax.spp._plotting import DIRECTIONS
from nfjax.spp._profile import Profile
from nfjax.spp._theory import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (3.8, 2.6)  # inches: at the width of a phone its letters are as large as those of the page
# What Matplotlib writes, and the page's colour that takes its place, in light and dark.
_COLOURS = {
    **{colour.lower(): f"var(--curve{i})" for i, colour in enumerate(panels.COLOURS)},
    **{colour.lower(): f"var(--{verdict})" for verdict, (_, colour) in panels.VERDICTS.items()},
    panels.STAGE_COLOUR.lower(): "var(--rule)",
    "#737373": "var(--muted)",
    "#666666": "var(--muted)",
}
_DASHES = {"-": "", "--": "6 3", "-.": "6 2 1.5 2", ":": "1.5 2"}
_MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★"}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A panel.

    Attributes:
        heading: Of it, in words.
        meaning: How to read it.
        direction: "forward" or "backward" where it shows a variance; None for a detail.
        svg: The element.
    """

    heading: str
    meaning: str
    direction: str | None
    svg: str


def draw(
    profiles: Mapping[str, Profile],
    predictions: Mapping[str, Prediction],
    known: Mapping[str, Mapping[str, np.ndarray]],
    diagnoses: Mapping[str, Diagnosis],
    style: Mapping[str, Style],
    tolerance: float,
) -> list[Picture]:
    """All panels of which something was measured, the variances first.

    Args:
        profiles: By name.
        predictions: Of some of them.
        known: `panels.columns` of each.
        diagnoses: Of each.
        style: Of each one's curves.
        tolerance: Of the verdicts.
    """
    ways = {direction: {key: getattr(one, direction) for key, one in diagnoses.items()} for direction, _ in DIRECTIONS}
    found: list[Picture] = []

    def add(heading: str, meaning: str, direction: str | None, draw_on: Callable[[Axes], None]) -> None:
        figure = figures.new(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw_on(axes)
        axes.tick_params(labelsize=8.5)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        found.append(Picture(heading, meaning, direction, _svg(figure, heading, f"p{len(found)}-")))

    def variance(direction: str, name: str) -> Callable[[Axes], None]:
        def draw_on(axes: Axes) -> None:
            panels.draw_variance(axes, name, profiles, predictions, style, True, (0.0, 1.0), tolerance)
            panels.mark(axes, ways[direction], profiles, style)

        return draw_on

    def small(detail: panels.Detail) -> Callable[[Axes], None]:
        def draw_on(axes: Axes) -> None:
            panels.draw_detail(axes, detail, profiles, known, style)
            for direction in detail.directions if len(profiles) == 1 else ():
                panels.mark(axes, ways[direction], profiles, style, named=False)

        return draw_on

    thin = "; thin: its closed form" if predictions else ""
    shade = "; shaded: all seeds" if any(len(profile.seeds) > 1 for profile in profiles.values()) else ""
    grey = f"; grey: within a factor of {tolerance:g} of where it starts" if len(profiles) == 1 else ""
    with _plain_matplotlib():
        for (direction, name), heading, what in zip(
            DIRECTIONS,
            ("Activations, towards the output", "Gradients, towards the input"),
            ("Variance of each block's output", "Variance of the gradient there, relative to the last block"),
            strict=True,
        ):
            add(heading, f"{what}{thin}{shade}{grey}.", direction, variance(direction, name))
        for detail in panels.details(known):
            add(detail.heading, detail.meaning, None, small(detail))
    return found


def swatch(look: Style) -> str:
    """A piece of a curve, for a legend in HTML."""
    colour = _COLOURS.get(look.color.lower(), "currentColor")
    return (
        f'<svg class="swatch" viewBox="0 0 40 12" width="40" height="12" aria-hidden="true">'
        f'<path d="M1 6H39" style="stroke: {colour}; stroke-width: 2" stroke-dasharray="{_DASHES[look.linestyle]}"/>'
        f'<text x="20" y="10" text-anchor="middle" style="fill: {colour}; font-size: 11px">{_MARKERS[look.marker]}'
        "</text></svg>"
    )


@contextlib.contextmanager
def _plain_matplotlib() -> Iterator[None]:
    """Matplotlib's own settings, not the user's: the same profile gives the same file."""
    figures.new()  # which imports Matplotlib, whatever MPLBACKEND says
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Letters that its font lacks are written as text, and shown by the browser's.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nfjax"})
        yield


def _svg(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an element of a page: its identifiers begin with `prefix`, its colours are the page's."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    box = re.search(r"viewBox=\"[^\"]*\"", text).group()
    text = re.sub(r"<[^>]*>", lambda tag: _page_tag(tag.group(), prefix), text)  # tags alone: not what they enclose
    text = f'<svg class="plot" role="img" aria-label="{html.escape(label)}" {box}{text[text.index(">") :]}'
    return re.sub(r"\n\s*", "\n", text).strip()


def _page_tag(tag: str, prefix: str) -> str:
    tag = re.sub(r"(?<= id=\")(?=[^\"])|(?<=url\(#)|(?<=href=\"#)", prefix, tag).replace("xlink:href", "href")
    tag = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda colour: _COLOURS.get(colour.group(), colour.group()), tag)
    return re.sub(r"(\.\d\d)\d+", r"\1", tag)  # a hundredth of a point will do, and takes a third less
