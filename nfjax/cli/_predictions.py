"""The files that `nfjax predict` writes. Each is there in full at the end, or not at all.

A kind of file is a context manager `(path, top) -> function that takes a Prediction`, and one line in `WRITERS`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from nfjax import _contact_sheet as contact_sheet
from nfjax import storage
from nfjax.cli._parser import PICTURES, check_file
from nfjax.data.loading.skips import is_obeyed, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nfjax.inference import Prediction

MOST_DRAWN = 64  # images of a sheet
SHEET_CLASSES = 3  # above each of them
FILE_LETTERS = 24  # of the name below
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
            found = [{"class": name, "probability": round(share, 6)} for name, share in prediction.top(top)]
            told = json.dumps({"file": os.fspath(prediction.image), "predictions": found}, ensure_ascii=False)
            # By JSON's own escapes, so that whoever reads it gets the names as they are.
            letters = (json.dumps(letter)[1:-1] if is_obeyed(letter) else letter for letter in told)
            file.write("".join(letters) + "\n")

        yield add


@contextlib.contextmanager
def sheet(out: str, top: int) -> Iterator[Add]:
    """The first images as the network sees them, with the predictions above."""
    kept: list[Prediction] = []

    def add(prediction: Prediction) -> None:
        if len(kept) < MOST_DRAWN:
            kept.append(prediction)

    yield add
    storage.write_figure(pathlib.Path(out), draw(kept, min(top, SHEET_CLASSES)), dpi=130)


WRITERS: dict[str, Writer] = {
    ".csv": csv_rows,
    ".jsonl": json_lines,
    **dict.fromkeys(PICTURES, sheet),
}


def writer(out: str) -> Writer:
    """What writes a file of this name. Raises UsageError for one that could not be written."""
    check_file("--out", out, WRITERS)
    return WRITERS[os.path.splitext(out)[1].lower()]


def told(out: str, count: int) -> str:
    """A line about a file with so many predictions."""
    drawn = WRITERS[os.path.splitext(out)[1].lower()] is sheet and count > MOST_DRAWN
    return f"{out} shows the first {MOST_DRAWN} of {count:,}" if drawn else out


def draw(predictions: list[Prediction], top: int) -> Figure:
    """The images with the `top` most probable classes above each of them, and the name of its file below."""
    return contact_sheet.draw(
        [
            contact_sheet.Tile(
                (prediction.pixels,),
                [f"{contact_sheet.short(name)} {share:.0%}" for name, share in prediction.top(top)],
                contact_sheet.short(os.path.basename(prediction.image), FILE_LETTERS),
            )
            for prediction in predictions
        ]
    )


def harmless(text: str) -> str:
    """Text that a spreadsheet takes for text."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


@contextlib.contextmanager
def _writing(out: str) -> Iterator[pathlib.Path]:
    with storage.replacing(pathlib.Path(out), f"{os.getpid()}") as part:
        yield part
