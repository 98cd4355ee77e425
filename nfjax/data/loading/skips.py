"""What could not be read of a split: counted by cause, named in a file, and too much of it stops the run."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable, Mapping

from absl import logging

from nfjax import storage
from nfjax.data.decoding.decode import BadImageError

FILE = "skipped.jsonl"
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of writing, from here on
GONE_AFTER = 32  # images that cannot be read, and not one in between that can: the data is gone


class TooManySkippedError(ValueError):
    """More images of a split cannot be read than the run allows."""


class Skips:
    """The examples of one split that were skipped; called with (index, cause, detail) for each, as often as it is met.

    What the file names from before the run was stopped does not count: it may have been repaired, and is met again
    where it was not.

    Attributes:
        causes: {name: cause} of those.
    """

    def __init__(
        self, split: str, name_of: Callable[[int], str], size: int, limit: float, folder: pathlib.Path | None = None
    ):
        """Begins to count.

        Args:
            split: Its name.
            name_of: Index -> how a person finds the example.
            size: Of the split.
            limit: The share of `size` above which `check` raises.
            folder: Where `skipped.jsonl` gets one line for each example; None for nowhere.
        """
        self.split, self.size, self.limit = split, size, limit
        self.causes: dict[str, str] = {}
        self._name_of, self._in_a_row = name_of, 0
        self._file = None if folder is None else folder / FILE
        self._named = set() if folder is None else set(read(folder, split))
        if self._file is not None and self._file.exists():
            _end_with_a_line(self._file)

    def __call__(self, index: int, cause: str, detail: str) -> None:
        name = printable(self._name_of(index))
        if name in self.causes:
            return
        self.causes[name] = cause
        if self._file is not None and name not in self._named:
            record = {"split": self.split, "name": name, "cause": cause, "detail": printable(detail)}
            with open(self._file, "a") as file:
                file.write(json.dumps(record) + "\n")

    def check(self, good: int, wanted: int) -> None:
        """Call it after every batch.

        Args:
            good: How many of its images could be read.
            wanted: Of so many.

        Raises:
            TooManySkippedError: More are damaged than may be, or none of the last `GONE_AFTER` could be read; the
                message says what to do.
        """
        self._in_a_row = 0 if good else self._in_a_row + wanted
        if self._in_a_row >= GONE_AFTER:
            raise TooManySkippedError(
                f"none of the last {self._in_a_row} images of {self.split} can be read: has the data moved, or its "
                f"disk gone away? {summary(self.causes)}; the run goes on with the same command when it is back"
            )
        check(self.split, self.causes, self.size, self.limit, self._file)


def check(split: str, causes: Mapping[str, str], size: int, limit: float, file: os.PathLike[str] | None = None) -> None:
    """Ends a run of which too much cannot be read.

    Args:
        split: The name of the split.
        causes: {name: cause} of what cannot be read.
        size: Of the split.
        limit: The share that may be damaged.
        file: Which names them all.

    Raises:
        TooManySkippedError: It is more; the message lists the causes, and the first names.
    """
    if len(causes) > limit * size:
        raise TooManySkippedError(
            f"{len(causes)} of the {size} images in {split} cannot be read, more than "
            f"--config.data.max_skipped={limit:g} allows; {summary(causes)}. Repair or remove them, or allow more; if "
            "their disk was gone, the same command goes on when it is back"
            f"{f'. All are named in {file}' if file else ''}"
        )


def summary(causes: Mapping[str, str]) -> str:
    """The causes of {name: cause} with their counts, and the first names."""
    counts = collections.Counter(causes.values())
    names = ", ".join(list(causes)[:10]) + (" and more" if len(causes) > 10 else "")
    return f"{', '.join(f'{count} {cause}' for cause, count in counts.most_common())}: {names}"


def explained(error: Exception) -> tuple[str, str]:
    """(cause, detail) of a failure to read or decode: causes are few, to be counted."""
    if isinstance(error, BadImageError):
        cause = error.cause
    elif isinstance(error, FileNotFoundError):
        cause = "missing"
    elif isinstance(error, OSError):
        cause = "cannot be read"
    elif isinstance(error, MemoryError):
        cause = "out of memory"
    else:
        cause = "bad record" if isinstance(error, ValueError) else type(error).__name__
    return cause, str(error)[:300]


def printable(name: str | bytes) -> str:
    """A file name as text, whatever bytes it is made of; what a terminal would obey is escaped, letter by letter."""
    return _escaped(os.fsencode(name).decode("utf-8", "backslashreplace"))


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(ascii(letter)[1:-1] if is_obeyed(letter) else letter for letter in text)


def is_obeyed(letter: str) -> bool:
    """Whether it moves the cursor, turns the direction of writing, or is no character."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _DIRECTIONS


@dataclasses.dataclass(frozen=True)
class _Line:
    split: str
    name: str
    cause: str


def read(folder: pathlib.Path, split: str | None = None) -> dict[str, str]:
    """{name: cause} of all that was ever skipped in the run in `folder`, of one split or of all.

    A line that is damaged is left out, with a warning: the image is met again. The last may have been cut short.
    """
    path = folder / FILE
    found, damaged = {}, []
    lines = path.read_bytes().split(b"\n")[:-1] if storage.regular_file(path) else []
    for number, line in enumerate(lines, 1):
        try:
            record = storage.parse_json(line, _Line, f"{path}, line {number}", "it is left out")
        except storage.DamagedFileError as error:
            damaged.append(error)
        else:
            if split in (None, record.split):
                found[_escaped(record.name)] = _escaped(record.cause)
    if damaged:
        more = f", as are {len(damaged) - 1} more" if len(damaged) > 1 else ""
        logging.warning("%s%s", damaged[0], more)
    return found


def _end_with_a_line(file: pathlib.Path) -> None:
    """Removes what a killed process has written of its last line."""
    data = file.read_bytes()
    if not data.endswith(b"\n"):
        with open(file, "r+b") as stream:
            stream.truncate(data.rfind(b"\n") + 1)
