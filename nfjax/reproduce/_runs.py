"""Trains what a grid still lacks, one run after another in one process, each in a workdir of `nfjax.training.loop`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nfjax import compilation, data, preemption
from nfjax import config as configs
from nfjax.cli import settings
from nfjax.data.contents import contents
from nfjax.reproduce import _endings, _grids, _pace, _records
from nfjax.reproduce._curves import NETWORKS
from nfjax.reproduce._grids import Cell, Grid
from nfjax.reproduce._records import Record
from nfjax.runs import workdirs
from nfjax.training import checks, keywords, loader
from nfjax.training import loop as train

# Fields that would overrule what is compared: the network itself, or its depth.
OVERRULING = ("model.name", "model.stage_sizes", "model.block")


@dataclasses.dataclass(frozen=True)
class Base:
    """What is trained on: its settings, and how many classes, training and test images it has, None for any."""

    config: Callable[[], ConfigDict]
    classes: int | None = None
    images: tuple[int, int] | None = None


BASES = {
    "CIFAR-10": Base(configs.cifar, 10, (50_000, 10_000)),
    "CIFAR-100": Base(configs.cifar100, 100, (50_000, 10_000)),
    "ImageNet": Base(configs.imagenet, 1000, (1_281_167, 50_000)),
    _grids.ANY: Base(configs.cifar),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        out: Folder of the results.
        seeds: How many, from 0.
        changes: {"model.width": 8}, over the paper's settings.
        data: Directory of the images; empty to train nothing.
        data_name: What they are called in results.
        runs: Where the workdirs are.
        networks: Beginnings of the labels of those that are trained; all if empty.
        until: When all has to be over, by `time.monotonic`.
    """

    out: pathlib.Path
    seeds: int = 3
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""
    data_name: str = ""
    runs: pathlib.Path = pathlib.Path("runs/reproduce")
    networks: Sequence[str] = ()
    until: float = math.inf


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell of the grid with a seed."""

    cell: Cell
    seed: int
    config: ConfigDict

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All that decide what it comes to."""
        return workdirs.essence(self.config)

    def is_done(self, settings: Mapping[str, Any]) -> bool:
        """Whether it is the run that has these settings."""
        quick = ("model.depth", "seed", "model.residual", "optim.learning_rate")
        own = self.settings
        if self.cell.changes.keys() - settings.keys():  # of before there was what makes this network another
            return False
        return all(settings.get(name, own[name]) == own[name] for name in quick) and _records.agree(settings, own)

    def __str__(self) -> str:
        return f"{self.cell.label}, seed {self.seed}"


# What is to be trained, the most telling first, by the records that there are of these images.
Plan = Callable[[Sequence[Record]], Sequence[Run]]


def parse_changes(given: Sequence[settings.Setting]) -> dict[str, Any]:
    """{"model.width": 8} from --config.model.width=8; "none" stands for None.

    Args:
        given: Of the command line.

    Raises:
        ValueError: There is no such field, it is one that the figures themselves set, or it cannot have such a value.
    """
    for setting in given:
        if setting.field == "log.evaluate_every_epochs":
            raise ValueError(f"{setting}: the figures show every epoch; to evaluate less often, use nfjax.main")
        if setting.field in (*_records.COMPARED, *OVERRULING, "data.dir"):
            raise ValueError(
                f"{setting}: {setting.field} is not for you to choose here; --seeds and --data are, or use nfjax.main"
            )
    changes = settings.values(configs.base(), given)
    for name in keywords.parse("model.arguments", changes.get("model.arguments", "")):
        if (field := f"model.{name}") in (*_records.COMPARED, *OVERRULING):
            raise ValueError(f"--config.model.arguments has {name!r}: {field} is not for you to choose here")
    return changes


def make_config(dataset: str, cell: Cell, seed: int, request: Request) -> ConfigDict:
    """The config of one run.

    Args:
        dataset: A name in `BASES`.
        cell: The network.
        seed: Of the run.
        request: What is asked for.

    Raises:
        ValueError: A setting does not exist, or has no such value.
    """
    config = BASES[dataset].config()
    config.checkpoint.keep = 1
    for name in request.changes:
        settings.check_known(config, name)
    rule, norm, init = NETWORKS[cell.curve]
    network = {"model.depth": cell.depth, "model.residual": rule, "model.norm": norm, "model.init": init}
    own = network | {"seed": seed, "data.dir": request.data}
    for name, value in {**request.changes, **cell.changes, **own}.items():
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"--config.{name}={value}: {_expected(config, name)}") from error
    return config


def make_run(grid: Grid, cell: Cell, seed: int, request: Request) -> Run:
    """A run of a grid; ValueError as `make_config`."""
    return Run(cell, seed, make_config(grid.dataset, cell, seed, request))


def _expected(config: ConfigDict, name: str) -> str:
    """What the field is, for a person who gave it something else."""
    there = functools.reduce(getattr, name.split("."), config)
    if isinstance(there, ConfigDict):
        return f"{name} has fields of its own, {', '.join(there)}"
    return f"expected a value of the kind of {there!r}"


def choose_cells(grid: Grid, request: Request) -> list[Cell]:
    """Those of the networks that are asked for.

    Raises:
        ValueError: There is none of such a name.
    """
    labels = [cell.label for cell in grid.cells]
    for beginning in request.networks:
        if not any(label.startswith(beginning) for label in labels):
            raise ValueError(f"--network={beginning}: expected the beginning of one of\n  " + "\n  ".join(labels))
    return [cell for cell in grid.cells if cell.label.startswith(tuple(request.networks) or ("",))]


def planned(grid: Grid, request: Request) -> list[Run]:
    """All runs of a grid, the most telling first: of each depth all networks with the first seed, then the next."""
    return [
        make_run(grid, cell, seed, request)
        for depth in grid.depths
        for seed in range(request.seeds)
        for cell in grid.cells
        if cell.depth == depth
    ]


def plan_grid(grid: Grid, request: Request) -> Plan:
    """That of a grid all of whose runs are known beforehand: those of the networks that are asked for."""
    cells = choose_cells(grid, request)
    runs = [run for run in planned(grid, request) if run.cell in cells]
    return lambda known: runs


def deviations(dataset: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `settings` have other than the paper's, or where it states none than ours: {"epochs": 8}."""
    own = _records.terms(workdirs.essence(BASES[dataset].config()))
    return {name: value for name, value in _records.terms(settings).items() if name in own and own[name] != value}


def is_the_papers(record: Record) -> bool:
    """Whether a run has the settings of the paper, its data set by name, and as many images."""
    images = BASES[record.dataset].images
    same_data = record.data == record.dataset and tuple(record.images) == images
    return same_data and not deviations(record.dataset, record.settings)


@dataclasses.dataclass(frozen=True)
class Images:
    """What has to be known of a data set.

    Attributes:
        fingerprint: Of what is in it.
        counts: Training and test images.
        classes: How many there are.
        guessing: The share of the test images that are of the most frequent class.
    """

    fingerprint: str
    counts: tuple[int, int]
    classes: int
    guessing: float


def inspect(dataset: str, config: ConfigDict) -> Images:
    """Reads the images of a config; ValueError as `open_data`."""
    found = open_data(dataset, config)
    labels = np.asarray(found.test.labels)
    guessing = float(np.bincount(labels).max()) / len(labels)
    return Images(contents(found), (len(found.train), len(found.test)), len(found.class_names), guessing)


def prepare(dataset: str, plan: Plan, request: Request) -> Images:
    """Reads the images of a plan, before anything is trained.

    Raises:
        ValueError: The first run could not be started; the images cannot be read, are not of this data set, or are
            called like others that were trained on.
    """
    runs = plan([])
    checks.check(runs[0].config)
    images = inspect(dataset, runs[0].config)
    _check_name(dataset, runs, request, images.fingerprint)
    return images


def train_missing(title: str, dataset: str, plan: Plan, request: Request, images: Images) -> None:
    """Trains every run of a plan that has no record in `request.out`, and writes one for each as soon as it is over.

    Stopped at any point, the same call goes on from there. The plan is asked anew after every run: it may depend on
    what the others came to. Where there is an end to the time, what would not end before it is not started, and the
    others go on in its place.

    Args:
        title: Of what is compared.
        dataset: A name in `BASES`.
        plan: What is to be trained, the most telling first, by what there is.
        request: What is asked for.
        images: What `prepare` says of them.

    Raises:
        ValueError: A run could not be started. What `loop.train` raises passes through, but for runs that diverge: this
            is a result.
    """
    forecast = _pace.Forecast(request.until, request.runs, images.counts)
    left_out: list[Run] = []

    def find_missing() -> tuple[int, list[Run]]:
        """(how many runs the plan has now, those that are neither there nor left out)."""
        known = [
            record
            for record in _records.read(request.out)
            if (record.dataset, record.fingerprint) == (dataset, images.fingerprint)
        ]
        done = [*(record.settings for record in known), *(run.settings for run in left_out)]
        runs = plan(known)
        return len(runs), [run for run in runs if not any(map(run.is_done, done))]

    count, missing = find_missing()
    for run in {run.cell.label: run for run in missing}.values():
        checks.check(run.config)
    print(f"{title}: {count - len(missing)} of {count} runs are there", flush=True)
    number = 0
    while missing:
        run, number, left = missing[0], number + 1, len(missing) - 1
        workdir = request.runs / _folder(run, request.data_name, images.fingerprint)
        starts, told = forecast.of(run.config, workdir)
        print(f"\n{number}/{number + left}    {run}{told}", flush=True)
        if not starts:
            left_out.append(run)
            missing = missing[1:]
            continue
        diverged = None
        try:
            train.train(run.config, str(workdir), [_until(request.until)])
        except preemption.TrainingPreemptedError:
            if time.monotonic() < request.until:
                raise
            print("the time is over: saved, and the same command goes on from there", flush=True)
            return
        except train.TrainingDivergedError as error:
            diverged = str(error).partition(";")[0]
            print(f"diverged: {error}", flush=True)
        measured = _endings.read(workdir, run.config.batch_size)
        about = {"dataset": dataset, "data": request.data_name, "fingerprint": images.fingerprint}
        about |= {"images": images.counts, "classes": images.classes, "guessing": images.guessing}
        about |= {"curve": run.cell.curve, "settings": run.settings, "diverged": diverged}
        _records.append(request.out, Record(**about, **measured))
        _, missing = find_missing()
        if missing and missing[0].cell != run.cell:
            compilation.forget()
    if forecast.left_out:
        print(f"\n{forecast.summary()}", flush=True)


def check_first(grid: Grid, request: Request) -> None:
    """Raises ValueError where the first run of a grid could not be started, for its settings or its images."""
    run = planned(grid, request)[0]
    checks.check(run.config)
    open_data(grid.dataset, run.config)


def open_data(dataset: str, config: ConfigDict) -> data.Dataset:
    """The images of a config, where they may be those of a data set.

    Raises:
        ValueError: They cannot be read, or have another number of classes.
    """
    found, expected = loader.open_data(config, config.data.dir), BASES[dataset].classes
    if (classes := len(found.class_names)) != expected and expected is not None:
        raise ValueError(
            f"{config.data.dir} has {classes} classes, expected the {expected} of {dataset}: choose another --data"
        )
    return found


def _until(end: float) -> Callable[[train.Run], None]:
    """A callback that ends a run after that time, for one that takes longer than was measured."""

    def stop(run: train.Run) -> None:
        if time.monotonic() >= end and run.progress.step < run.progress.total:
            run.stopped = True

    return stop


def _check_name(dataset: str, runs: Sequence[Run], request: Request, fingerprint: str) -> None:
    """Raises ValueError for other images of the same name, which would be drawn as the same figure."""
    for record in _records.read(request.out):
        # Where any images may be compared, runs on other terms are in the same figures.
        comparable = dataset == _grids.ANY or any(
            _records.agree(record.terms, _records.terms(run.settings)) for run in runs
        )
        if record.dataset == dataset and comparable:
            # Names that differ in case or punctuation only would share the figures' files.
            same_name, same_data = slug(record.data) == slug(request.data_name), record.fingerprint == fingerprint
            if same_name and not same_data:
                raise ValueError(
                    f"{request.out / _records.FILE} has runs on {record.data!r} whose images are others (fingerprint "
                    f"{record.fingerprint}, here {fingerprint}): give these another name with --data-name"
                )
            if same_data and record.data != request.data_name:
                raise ValueError(
                    f"{request.out / _records.FILE} has runs on these images under the name {record.data!r}: give "
                    f"--data-name={record.data!r}"
                )


def _folder(run: Run, data_name: str, fingerprint: str) -> str:
    """One for each run, under a name that tells a person what is in it."""
    exact = json.dumps([run.settings, fingerprint], sort_keys=True)
    network = run.cell.label if run.cell.curve in run.cell.label else f"ResNet-{run.cell.depth} {run.cell.curve}"
    name = slug(f"{data_name} {network} seed {run.seed}")
    return f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def slug(text: str) -> str:
    """Lower case, with hyphens between the words."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")
