"""What is kept of a finished training run: one line of `training.jsonl`, and what several of them say together."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from nfjax.reproduce import _lines

FILE = "training.jsonl"
# The settings in which the runs of one comparison differ; in all others they are equal.
COMPARED = ("seed", "model.depth", "model.residual", "model.norm", "model.init")
PER_EPOCH = ("train_loss", "train_accuracy", "train_grad_norm", "test_loss", "test_accuracy")


Count = Annotated[int, msgspec.Meta(ge=1)]


class Device(TypedDict):
    """What a run was trained on."""

    kind: str
    platform: str
    count: int


class Start(TypedDict):
    """An entry of a run's versions.json."""

    started: str
    step: NotRequired[int]
    python: NotRequired[str]
    packages: dict[str, str]
    device: Device
    commit: str | None


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run, or one that diverged.

    Attributes:
        dataset: A name in `_runs.BASES`.
        data: What the images are called.
        fingerprint: Of what is in them.
        images: How many to train on and to test with.
        classes: How many there are.
        curve: A name in `_curves.NETWORKS`.
        settings: {"model.depth": 18, ...}, all that decide what a run comes to.
        epochs: {"test_accuracy": [...], ...}, those of `PER_EPOCH`, one number per epoch.
        diverged: Why the run ended early, if it did.
        seconds: Of training, compilation included, evaluation not.
        starts: The entries of its versions.json.
        guessing: The share of the test images that are of the most frequent class; None in records of before that was
            noted.
    """

    dataset: str
    data: str
    fingerprint: str
    images: Annotated[Sequence[Count], msgspec.Meta(min_length=2, max_length=2)]
    classes: Count
    curve: str
    settings: Mapping[str, Any]
    epochs: Mapping[str, Sequence[float]]
    diverged: str | None
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    starts: Sequence[Start]
    guessing: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be read off a run."""
        lengths = {len(self.epochs[name]) for name in PER_EPOCH if name in self.epochs}
        if set(PER_EPOCH) - self.epochs.keys() or len(lengths) != 1:
            raise ValueError(f"epochs must have {', '.join(PER_EPOCH)}, a number per epoch in each")
        if lengths == {0} and self.diverged is None:
            raise ValueError("it has no epoch, and did not diverge")
        if missing := {*COMPARED, "epochs"} - self.settings.keys():
            raise ValueError(f"settings lack {', '.join(sorted(missing))}")
        for name in ("seed", "model.depth", "epochs"):
            if type(self.settings[name]) is not int:
                raise ValueError(f"settings have {name}={self.settings[name]!r}, expected a whole number")
        if lengths.pop() > self.settings["epochs"]:
            raise ValueError(f"it has more epochs than its settings, {self.settings['epochs']}")
        for name in ("train_accuracy", "test_accuracy"):
            if wrong := [value for value in self.epochs[name] if not 0 <= value <= 1]:
                raise ValueError(f"{name} is {wrong[0]!r}, expected a share from 0 to 1")
        for text in (self.dataset, self.data, self.curve):
            if not text.isprintable():
                raise ValueError(f"{text!r} is no name that can be printed")

    @property
    def depth(self) -> int:
        return self.settings["model.depth"]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def rate(self) -> float:
        """The learning rate; NaN for what is none."""
        rate = self.settings.get("optim.learning_rate")
        return float(rate) if isinstance(rate, int | float) else math.nan

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
    """The records in a folder, none if there is no such file; of a run that stands there twice the later one.

    Args:
        out: The folder.

    Raises:
        ValueError: A line is no record; one cut short by a crash, which can only be the last, is left out, with a
            warning.
    """
    records: list[Record] = []
    for record in _lines.read(out / FILE, Record, "the record of a run", "its run is not known"):
        records = [known for known in records if not _same_run(known, record)] + [record]
    return records


def _same_run(one: Record, other: Record) -> bool:
    return one.fingerprint == other.fingerprint and agree(one.settings, other.settings)


def append(out: pathlib.Path, record: Record) -> None:
    """Adds a record to those in a folder; OSError where it cannot be written, and then nothing of it is."""
    _lines.append(out / FILE, record)


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
