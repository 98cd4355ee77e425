"""What could not be read of a split: counted by cause, named in a file, and too much of it stops the run."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Callable

FILE = "skipped.jsonl"


class TooManySkippedError(ValueError):
    """More images of a split cannot be read than the run allows."""


class Skips:
    """The examples of one split that were skipped; called with (index, cause, detail) for each, as often as it is met.

    name_of: index -> how a person finds the example. limit: the share of `size` above which TooManySkippedError is
    raised, by `check`. folder: where `skipped.jsonl` gets one line for each of them; those that a run has named before
    it was stopped count on.
    """

    def __init__(
        self, split: str, name_of: Callable[[int], str], size: int, limit: float, folder: pathlib.Path | None = None
    ):
        self.split, self.size, self.limit = split, size, limit
        self.causes: dict[str, str] = {}  # {name: cause}
        self._name_of = name_of
        self._file = None if folder is None else folder / FILE
        if folder is not None:
            self.causes = read(folder, split)

    def __call__(self, index: int, cause: str, detail: str) -> None:
        name = printable(self._name_of(index))
        if name in self.causes:
            return
        self.causes[name] = cause
        if self._file is not None:
            record = {"split": self.split, "name": name, "cause": cause, "detail": printable(detail)}
            with open(self._file, "a") as file:
                file.write(json.dumps(record) + "\n")

    def check(self) -> None:
        """Raises TooManySkippedError that lists the causes and the first names."""
        if len(self.causes) > self.limit * self.size:
            raise TooManySkippedError(
                f"{len(self.causes)} of the {self.size} images in {self.split} cannot be read, more than "
                f"{self.limit:.0%}; {self.summary()}. Remove or repair them, or allow more with "
                f"--config.data.max_skipped{f'; all are named in {self._file}' if self._file else ''}"
            )

    def check_batch(self, good: int, wanted: int) -> None:
        """Raises TooManySkippedError if less than half of a batch could be read: something happened to the data."""
        if 2 * good < wanted:
            raise TooManySkippedError(
                f"{wanted - good} of the {wanted} images in a batch of {self.split} cannot be read: has the data moved "
                f"or its disk gone away? {self.summary()}; the run goes on with the same command when it is back"
            )

    def summary(self) -> str:
        """Causes with their counts, and the first names."""
        counts = collections.Counter(self.causes.values())
        names = ", ".join(list(self.causes)[:10]) + (" and more" if len(self.causes) > 10 else "")
        return f"{', '.join(f'{count} {cause}' for cause, count in counts.most_common())}: {names}"


def printable(text: str) -> str:
    """File names need not be text."""
    return text.encode("utf-8", "backslashreplace").decode()


def read(folder: pathlib.Path, split: str | None = None) -> dict[str, str]:
    """{name: cause} of what was skipped in the run in `folder`, of one split or of all."""
    path = folder / FILE
    records = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {record["name"]: record["cause"] for record in records if split in (None, record["split"])}
