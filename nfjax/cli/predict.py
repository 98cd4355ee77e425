"""nfjax predict --model=PATH FILE|DIR ... [--top=5] [--out=predictions.csv] [--out=sheet.png]

Names what images show, with probabilities: a table, and files of several kinds. Of a folder, all images in it and below
it are taken. What cannot be read is named, left out and counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from absl import logging

from nfjax import _streams as streams
from nfjax.cli._outcome import FailedError, UsageError
from nfjax.cli._parser import Parser, path, positive

if TYPE_CHECKING:
    from nfjax.inference import Prediction, Predictor

SHOWN = 20  # rows of the table where the rest is in a file
WIDEST = 48  # columns of a file name in the table
WIDEST_CLASS = 24


def add_arguments(parser: Parser) -> None:
    parser.add_argument("images", nargs="+", type=path, metavar="FILE|DIR", help="images, or folders of images")
    add_model(parser)
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="classes of each image (5)")
    parser.add_argument(
        "--out", action="append", default=[], type=path, metavar="FILE",
        help="where the predictions go, by its ending: .csv, .jsonl, or .png, .svg, .pdf for a sheet of the images; "
        "may be given several times",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images computed together (64)")
    parser.add_argument("--dtype", metavar="NAME", help="to compute in, float32 or bfloat16 (that of the training)")


def add_model(parser: Parser) -> None:
    """The arguments that say which network it is."""
    parser.add_argument(
        "--model", required=True, type=path, metavar="PATH", help="the workdir of a run, or a folder of nfjax export"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="of a run's checkpoint; by default the one with the best test accuracy"
    )
    parser.add_argument("--ema", action="store_true", help="the average of a run's weights over the steps")
    parser.add_argument(
        "--trust", action="store_true", help="run the code of a network of somebody's own, package.module:function"
    )


def run(arguments: argparse.Namespace) -> None:
    from nfjax.cli import _predictions  # here: --help is answered quickly

    writers = [_predictions.writer(out) for out in arguments.out]
    if twice := [out for out, count in collections.Counter(arguments.out).items() if count > 1]:
        raise UsageError(f"--out={twice[0]} is given twice")
    aside: collections.Counter[str] = collections.Counter()
    paths = _listed(arguments.images, aside)
    left = _left_aside(aside)
    if not paths:
        raise FailedError(f"there are no images in {', '.join(arguments.images)}{left and f': {left}'}")
    from nfjax import compilation, inference

    logging.set_verbosity(logging.ERROR)
    compilation.keep()
    predictor = inference.load(
        arguments.model,
        step=arguments.step,
        ema=arguments.ema,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        trust=arguments.trust,
    )
    bad: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        add = [stack.enter_context(make(out, arguments.top)) for out, make in zip(arguments.out, writers, strict=True)]
        table = Table(paths, predictor.class_names, arguments.top, SHOWN if add else None)
        good = 0
        for prediction in _predicted(predictor, paths, bad, table):
            good += 1
            table.show(prediction)
            for write in add:
                write(prediction)
        if not good:
            raise FailedError(f"none of the {len(paths):,} files can be read: {_summary(bad)}")
    _conclude(arguments.out, good, bad, left, table)


def _listed(given: Sequence[str], aside: collections.Counter[str]) -> list[str]:
    """The files named, and the images in the folders named, sorted by their path."""
    from nfjax.data.sources import folder

    paths = []
    for name in given:
        if os.path.isdir(name):
            paths += [os.path.join(name, os.fsdecode(below)) for below in folder.images_below(name, aside)]
        else:
            paths.append(name)
    return paths


def _predicted(predictor: Predictor, paths: list[str], bad: dict[str, str], table: Table) -> Iterator[Prediction]:
    """The predictions of what can be read; the rest is named on stderr, and kept in `bad`."""
    import tqdm

    with tqdm.tqdm(total=len(paths), unit=" images", mininterval=0.5, disable=None, leave=False) as bar:
        table.bar = bar

        def skip(name: str, cause: str, detail: str) -> None:
            bad[name] = cause
            bar.update()
            bar.write(f"nfjax: {name}: {cause}", file=streams.err())

        for prediction in predictor.stream(paths, skip):
            bar.update()
            yield prediction


def _conclude(outs: Sequence[str], good: int, bad: dict[str, str], left: str, table: Table) -> None:
    lines = [f"{good:,} image{'' if good == 1 else 's'}"]
    if bad:
        lines[0] += f", {len(bad):,} skipped: {_summary(bad)}"
    if left:
        lines.append(left)
    if good > table.rows:
        lines.append(f"the table has the first {table.rows}")
    from nfjax.cli import _predictions

    lines += [_predictions.told(out, good) for out in outs]
    print("\n".join(lines), file=streams.err(), flush=True)


def _summary(bad: dict[str, str]) -> str:
    from nfjax.data.loading import skips

    return skips.summary(bad)


def _left_aside(aside: collections.Counter[str]) -> str:
    from nfjax.data.splits import left_aside

    return left_aside(aside) if aside else ""


class Table:
    """The rows on the terminal, as wide as it is.

    Attributes:
        rows: How many were shown.
        bar: A progress bar that is on the terminal, too; None for none.
    """

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], top: int, most: int | None):
        """Decides how wide the columns are.

        Args:
            paths: Of all rows.
            class_names: Of all classes.
            top: Classes in a row; of these, as many as fit.
            most: Rows that are shown; None for all.
        """
        from nfjax.data.loading.skips import printable

        self._shown, self._most, self.rows, self.bar = printable, most, 0, None
        self._file = min(max(_width(printable(path)) for path in paths), WIDEST)
        self._class = min(max(_width(printable(name)) for name in class_names), WIDEST_CLASS)
        out = streams.out()
        columns = shutil.get_terminal_size().columns if out.isatty() else None
        each = self._class + 9
        self._top = top if columns is None else max(1, min(top, (columns - self._file) // each))

    def show(self, prediction: Prediction) -> None:
        """Prints a row, above the bar if there is one."""
        if self._most is not None and self.rows >= self._most:
            return
        self.rows += 1
        cells = [_padded(_cut(self._shown(prediction.image), self._file, left=True), self._file)]
        for name, probability in prediction.top(self._top):
            cells.append(f"{_padded(_cut(self._shown(name), self._class), self._class)} {probability:6.1%}")
        line = "  ".join(cells)
        if self.bar is None or self.bar.disable:
            print(line, file=streams.out())
        else:
            self.bar.write(line, file=streams.out())


def _width(text: str) -> int:
    """Columns on a terminal: letters of East Asia take two, marks on other letters none."""
    import unicodedata

    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _cut(text: str, width: int, left: bool = False) -> str:
    """The text in so many columns; of one that is longer the beginning, or with `left` the end."""
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[1:] if left else text[:-1]
    return f"…{text}" if left else f"{text}…"
