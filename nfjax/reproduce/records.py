"""What is kept of a finished training run: one line of `training.jsonl`, and what several of them say together."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FILE = "training.jsonl"
# The settings in which the runs of one comparison differ; in all others they are equal.
COMPARED = ("seed", "model.depth", "model.residual", "model.norm", "model.init")
PER_EPOCH = ("train_loss", "train_accuracy", "train_grad_norm", "test_loss", "test_accuracy")


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run, or one that diverged.

    dataset: a name in `runs.BASES`. data: what the images are called, and fingerprint: of what is in them. images: how
    many to train on and to test with. settings: {"model.depth": 18, ...}, all that decide what a run comes to. epochs:
    {"test_accuracy": [...], ...}, those of `PER_EPOCH`, one number per epoch. diverged: why the run ended early, if it
    did. seconds: of training, compilation included, evaluation not. starts: the entries of its versions.json.
    """

    dataset: str
    data: str
    fingerprint: str
    images: tuple[int, int]
    classes: int
    curve: str
    settings: Mapping[str, Any]
    epochs: Mapping[str, Sequence[float]]
    diverged: str | None
    seconds: float
    starts: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be read off a run."""
        if not isinstance(self.epochs, Mapping) or not isinstance(self.settings, Mapping):
            raise ValueError("epochs and settings must be objects")
        lengths = {len(self.epochs[name]) for name in PER_EPOCH if isinstance(self.epochs.get(name), (list, tuple))}
        if set(PER_EPOCH) - self.epochs.keys() or len(lengths) != 1:
            raise ValueError(f"epochs must have {', '.join(PER_EPOCH)}, a number per epoch in each")
        if lengths == {0} and self.diverged is None:
            raise ValueError("it has no epoch, and did not diverge")
        if missing := {*COMPARED, "epochs"} - self.settings.keys():
            raise ValueError(f"settings lack {', '.join(sorted(missing))}")

    @property
    def depth(self) -> int:
        return self.settings["model.depth"]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def terms(self) -> dict[str, Any]:
        """The settings that must be equal where runs are compared."""
        return terms(self.settings)

    def counted(self) -> str:
        """ "5,000 training and 1,000 test images"."""
        train, test = self.images
        return f"{train:,} training and {test:,} test images"

    def final(self, name: str) -> float | None:
        """Of the last epoch; None for a run that diverged before the first was over."""
        values = self.epochs[name]
        return values[-1] if values else None

    def best(self, name: str) -> float | None:
        """The highest of all epochs."""
        return max(self.epochs[name], default=None)


def terms(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that must be equal where runs are compared."""
    return {name: value for name, value in settings.items() if name not in COMPARED}


def agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether settings are the same in all fields that both have: a run from before a field existed is compared in the
    others.
    """
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def read(out: pathlib.Path) -> list[Record]:
    """The records in `out`, none if there is no such file; of a run that stands there twice the later one.

    Raises ValueError for a line that is no record; one cut short by a crash, which can only be the last, is left out.
    """
    path = out / FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:  # ValueError: no JSON, no text, or no such run
            if number == len(lines) and not _is_json(line):
                continue
            raise ValueError(
                f"{path}, line {number} is not the record of a run ({error}): remove or mend it"
            ) from error
        same = [known for known in records if _same_run(known, record)]
        records = [known for known in records if known not in same] + [record]
    return records


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _same_run(one: Record, other: Record) -> bool:
    return one.fingerprint == other.fingerprint and agree(one.settings, other.settings)


def append(out: pathlib.Path, record: Record) -> None:
    """Adds a line, in one piece, also where several processes do; a line that a crash cut short is ended first."""
    with open(out / FILE, "a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                before, end, last = stream.read().rpartition(b"\n")
                if _is_json(last):  # an editor left the last line without its end
                    stream.write(b"\n")
                else:
                    stream.truncate(len(before + end))
        stream.write(json.dumps(dataclasses.asdict(record)).encode() + b"\n")


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records that may be compared, together: the same images, the same settings but for seed and network."""
    found: list[list[Record]] = []
    for record in records:
        for group in found:
            first = group[0]
            if (first.dataset, first.data, first.fingerprint) == (
                record.dataset,
                record.data,
                record.fingerprint,
            ) and agree(first.terms, record.terms):
                group.append(record)
                break
        else:
            found.append([record])
    return found


@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation of n values; the deviation is 0 for one."""

    mean: float
    std: float
    n: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / self.n**0.5

    def percent(self) -> str:
        spread = f" ± {100 * self.std:.2f}" if self.n > 1 else ""
        return f"{100 * self.mean:.2f}{spread} %"


def mean(values: Iterable[float]) -> Mean | None:
    """Of these values; None if there are none."""
    values = list(values)
    if not values:
        return None
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def over_seeds(records: Iterable[Record], name: str, of: str = "final") -> Mean | None:
    """Mean of the `of` ("final" or "best") value of the runs that came to their end; None where none did."""
    return mean(getattr(record, of)(name) for record in records if record.diverged is None)
