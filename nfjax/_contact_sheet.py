"""Many small images on one picture, each with a few words above and below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nfjax import _figures as figures
from nfjax.data.loading.skips import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 8
SIDE = 1.5  # inches, of an image with what is around it
LINE = 0.17  # inches, of text
LETTERS = 18  # of a word that fits above an image


@dataclasses.dataclass(frozen=True)
class Tile:
    """What stands in one place of a sheet.

    Attributes:
        images: Below each other, uint8 [H, W, 3].
        above: Lines of text.
        below: One line in small and grey.
    """

    images: tuple[np.ndarray, ...]
    above: Sequence[str]
    below: str = ""


def draw(tiles: Sequence[Tile]) -> Figure:
    """The tiles, at least one, in rows of eight. Whatever their words are made of, no formula is set in them."""
    columns = min(COLUMNS, len(tiles))
    rows, images = -(-len(tiles) // columns), len(tiles[0].images)
    lines = max(len(tile.above) for tile in tiles) + any(tile.below for tile in tiles)
    figure = figures.new(figsize=(SIDE * columns, (SIDE * images + LINE * lines) * rows), layout="constrained")
    axes = figure.subplots(rows * images, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for place, tile in enumerate(tiles):
        row, column = images * (place // columns), place % columns
        for offset, image in enumerate(tile.images):
            axes[row + offset, column].imshow(image)
        axes[row, column].set_title("\n".join(tile.above), fontsize=8, parse_math=False)
        if tile.below:
            last = axes[row + images - 1, column]
            grey = {"ha": "center", "va": "top", "fontsize": 6, "color": "#555555", "parse_math": False}
            last.text(0.5, -0.03, tile.below, transform=last.transAxes, **grey)
    return figure


def short(name: str, letters: int = LETTERS) -> str:
    """A name as it is printed, or the beginning of it where it is too long."""
    name = printable(name)
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
