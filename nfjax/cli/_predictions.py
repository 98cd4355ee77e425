"""The files that `nfjax predict` writes. Each is there in full at the end, or not at all.

A kind of file is a context manager `(path, top) -> function that takes a Prediction`, and one line in `WRITERS`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from nfjax import _figures as figures
from nfjax import storage
from nfjax.cli._outcome import UsageError
from nfjax.data.loading.skips import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nfjax.inference import Prediction

MOST_DRAWN = 64  # images of a sheet
SHEET_CLASSES = 3  # below each of them
# With these, full width forms included, spreadsheets begin a formula.
_FORMULA = tuple("=+-@\t\r＝＋－＠")

Add: TypeAlias = "Callable[[Prediction], None]"
Writer: TypeAlias = "Callable[[str, int], contextlib.AbstractContextManager[Add]]"


@contextlib.contextmanager
def csv_rows(out: str, top: int) -> Iterator[Add]:
    """A row for each image: its file, and name and probability of the most probable classes."""
    with _writing(out) as part, open(part, "w", encoding="utf-8", newline="") as file:
        rows, first = csv.writer(file, lineterminator="\n"), True

        def add(prediction: Prediction) -> None:
            nonlocal first
            found = prediction.top(top)
            if first:
                names = [f"{what}_{k}" for k in range(1, len(found) + 1) for what in ("class", "probability")]
                rows.writerow(["file", *names])
                first = False
            cells = [cell for name, share in found for cell in (harmless(name), f"{share:.6f}")]
            rows.writerow([harmless(prediction.image), *cells])

        yield add


@contextlib.contextmanager
def json_lines(out: str, top: int) -> Iterator[Add]:
    """A JSON object for each image: {"file", "predictions": [{"class", "probability"}, ...]}."""
    with _writing(out) as part, open(part, "w", encoding="utf-8") as file:

        def add(prediction: Prediction) -> None:
            found = [{"class": printable(name), "probability": round(share, 6)} for name, share in prediction.top(top)]
            told = {"file": printable(prediction.image), "predictions": found}
            file.write(json.dumps(told, ensure_ascii=False) + "\n")

        yield add


@contextlib.contextmanager
def sheet(out: str, top: int) -> Iterator[Add]:
    """The first images as the network sees them, with the predictions below."""
    kept: list[Prediction] = []

    def add(prediction: Prediction) -> None:
        if len(kept) < MOST_DRAWN:
            kept.append(prediction)

    yield add
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for a letter that no font has
        storage.write_figure(pathlib.Path(out), draw(kept, min(top, SHEET_CLASSES)), dpi=130)


WRITERS: dict[str, Writer] = {
    ".csv": csv_rows,
    ".jsonl": json_lines,
    ".png": sheet,
    ".svg": sheet,
    ".pdf": sheet,
}


def writer(out: str) -> Writer:
    """What writes a file of this name. Raises UsageError for an ending that has none, and where it cannot lie there."""
    ending = os.path.splitext(out)[1].lower()
    if ending not in WRITERS:
        raise UsageError(f"--out={out}: expected a file that ends with one of {', '.join(WRITERS)}")
    if os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or "."):
        raise UsageError(f"--out={out}: expected a file in a folder that exists")
    return WRITERS[ending]


def told(out: str, count: int) -> str:
    """A line about a file with so many predictions."""
    drawn = WRITERS[os.path.splitext(out)[1].lower()] is sheet and count > MOST_DRAWN
    return f"{out} shows the first {MOST_DRAWN} of {count:,}" if drawn else out


def draw(predictions: list[Prediction], top: int) -> Figure:
    """The images in rows of eight, with the `top` most probable classes below each of them."""
    columns = min(8, len(predictions))
    rows = -(-len(predictions) // columns)
    figure = figures.new(figsize=(1.7 * columns, (1.7 + 0.17 * (1 + top)) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, prediction in zip(axes.flat, predictions, strict=False):
        ax.imshow(prediction.pixels)
        name = _short(os.path.basename(prediction.image))
        ax.set_title(name, fontsize=6, color="#555555", parse_math=False)  # $ is part of a name
        lines = [f"{_short(name)} {share:.0%}" for name, share in prediction.top(top)]
        below = {"transform": ax.transAxes, "ha": "center", "va": "top", "fontsize": 7, "parse_math": False}
        ax.text(0.5, -0.03, "\n".join(lines), **below)
    return figure


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 22 else f"{name[:21]}…"


def harmless(text: str) -> str:
    """Text that a spreadsheet takes for text."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


@contextlib.contextmanager
def _writing(out: str) -> Iterator[pathlib.Path]:
    with storage.replacing(pathlib.Path(out), f"{os.getpid()}") as part:
        yield part
