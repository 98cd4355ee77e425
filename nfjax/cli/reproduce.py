"""nfjax reproduce NAME ... [--out=results] [--data=DIR] [--seeds=3] [--epochs=200] [--config.model.width=8 ...]

The paper's tables and figures: on the screen, and as CSV, Markdown and PNG files under --out.

    nfjax reproduce table1 table2 figure2 figure6
    nfjax reproduce figure7 --data=DIR --data-name=CIFAR-10
    nfjax reproduce rules --data=DIR --epochs=3 --config.model.width=8
    nfjax reproduce claims
    nfjax reproduce campaign --data=DIR --minutes=25

table1 and table2 are counted, figure2 and figure6 measured at initialization. figure3 (CIFAR-10, 50 and 101 layers),
figure7 (18 layers), figure4 (CIFAR-100), figure5 (ImageNet), depth (18 to 152 layers) and ablations (settings that the
paper does not state) are trained: with --data whatever of their runs is missing, the most telling first; without it,
what is there is drawn. Stopped, the same command goes on. With --minutes, no run is started that does not end in them,
by a measured step. Each finished run is a line of OUT/training.jsonl. Runs with other settings or images are other
figures, in files of other names. claims says which of the paper's statements hold in all these runs.

rules goes beyond the paper: every rule of the field and every norm, with the initialization of its authors and with
He's fan-out, at 18, 50 and 101 layers. It measures cost and signal before training, which needs no images, and with
--data trains, on any images: each network once, then at other learning rates until the largest is known at which it
trains, of a grid of factors of 2, then with further seeds. very_deep does the same for narrow networks of 200 and 500
layers; mended for networks of 101 layers whose kernels nfjax.rescale changes before the first step, beside others.
Their runs are lines of OUT/rules/training.jsonl, OUT/very_deep/training.jsonl and OUT/mended/training.jsonl.

campaign spends the minutes for which you have a machine on what is most telling and still missing: how fast a training
step is, beside PyTorch (of --torch-python); figure7; figure3's ResNet-50; depth; what augmenting and loading cost.
Compiled programs are kept in the folder of the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import time

import jax
from absl import logging

from nfjax import _cpu, compilation, preemption
from nfjax.cli._outcome import FailedError, UsageError
from nfjax.cli._parser import Parser, path
from nfjax.reproduce import (
    COMPARISONS,
    REPRODUCTIONS,
    SUMMARIES,
    TRAINED,
    Request,
    Result,
    _campaign,
    _comparison,
    _rates,
    _runs,
)
from nfjax.reproduce._grids import GRIDS
from nfjax.reproduce._pace import shown
from nfjax.reproduce._runs import check_first, parse_changes
from nfjax.reproduce._training import training_figures

CAMPAIGN = "campaign"
DRAWING = 5.0  # seconds of the minutes that are left for figures and tables


def add_arguments(parser: Parser) -> None:
    names = (*REPRODUCTIONS, *TRAINED, *COMPARISONS, *SUMMARIES, CAMPAIGN)
    parser.add_argument(
        "names", nargs="+", choices=names, metavar="NAME", help=f"what to reproduce: {', '.join(names)}"
    )
    parser.add_argument("--out", default="results", type=path, help="folder for what is written (default: results)")
    training = parser.add_argument_group("where runs are needed")
    training.add_argument(
        "--data", type=path, help="folder of the images, as for training; without it nothing is trained"
    )
    training.add_argument("--data-name", help="what the images are called in the results (default: the folder's name)")
    training.add_argument("--seeds", type=int, help="how many runs of each network (default: 3)")
    training.add_argument("--epochs", type=int, help="of each run, short for --config.epochs")
    training.add_argument("--runs", type=path, help="folder for the workdirs of the runs (default: runs/reproduce)")
    training.add_argument(
        "--network",
        action="append",
        metavar="NAME",
        help="train only those whose names begin so, such as 'ResNet-50 ConvShort'; may be given several times",
    )
    training.add_argument("--minutes", type=float, help="in which all has to end; nothing is started that does not")
    training.add_argument("--config.FIELD", metavar="VALUE", help="any other setting, for all runs")
    campaign = parser.add_argument_group("for the campaign")
    campaign.add_argument("--torch-python", type=path, metavar="PYTHON", help="an interpreter that has PyTorch")
    campaign.add_argument("--images", type=path, metavar="DIR", help="folder of large JPEG files, for the loader")


def run(arguments: argparse.Namespace) -> None:
    logging.set_verbosity(logging.WARNING)
    compilation.keep()
    out = _made(pathlib.Path(arguments.out), "--out")
    request = _request(arguments, out)
    if CAMPAIGN in arguments.names:
        _run_campaign(arguments, request)
        return
    if request.data is not None and request.changes.get("train.keep_memory", True):
        _cpu.keep_memory()
    try:
        for name in arguments.names:
            if name in TRAINED:
                _trained(name, request)
            elif name in COMPARISONS:
                _compared(name, request)
            else:
                _show(REPRODUCTIONS[name]() if name in REPRODUCTIONS else SUMMARIES[name](out), out / name)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("between two runs; the same command goes on from there") from None


def _made(folder: pathlib.Path, flag: str) -> pathlib.Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "no permission")
    except OSError as error:
        message = f"cannot write to {folder} ({error.strerror}); choose another folder with {flag}=DIR"
        raise FailedError(message) from error
    return folder


def _request(arguments: argparse.Namespace, out: pathlib.Path) -> Request:
    """What is asked for; UsageError for flags that mean nothing, or nothing here."""
    names = ("data", "seeds", "data_name", "runs", "network", "minutes", "torch_python", "images")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        changes = parse_changes(arguments.settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if arguments.epochs is not None:
        if "epochs" in changes:
            raise UsageError("--epochs is short for --config.epochs: give one of them")
        changes["epochs"] = arguments.epochs
    flags = {name: f"--{name.replace('_', '-')}" for name in given}
    asked = [*flags.values(), *(["--epochs or --config"] if changes else [])]
    trained = (*TRAINED, *COMPARISONS)
    if asked and not any(name in (*trained, CAMPAIGN) for name in arguments.names):
        raise UsageError(f"{', '.join(asked)}: only {', '.join(trained)} are trained; {arguments.names[0]} is not")
    if CAMPAIGN in arguments.names:
        _check_campaign(arguments)
    elif alone := [flags[name] for name in ("torch_python", "images") if name in given]:
        raise UsageError(f"{', '.join(alone)}: only for {CAMPAIGN}")
    if given.get("seeds", 1) < 1:
        raise UsageError(f"--seeds={given['seeds']} must be positive")
    minutes = given.get("minutes", math.inf)
    if not minutes > 0:
        raise UsageError(f"--minutes={minutes:g} must be positive")
    for name in given:
        if given[name] == "":
            raise UsageError(f"{flags[name]} is empty")
        # What is known before training takes a while, too, and needs no images.
        if name in ("network", "minutes") and "data" not in given and not set(arguments.names) & set(COMPARISONS):
            raise UsageError(f"{flags[name]} is for training, and without --data=DIR nothing is trained")
    if "data" in given:
        given.setdefault("data_name", os.path.basename(os.path.abspath(given["data"])))
        if not given["data_name"]:
            raise UsageError(f"--data={given['data']} has no name: say what the images are called with --data-name")
    if "runs" in given:
        given["runs"] = _made(pathlib.Path(given["runs"]), "--runs")
    there = {name: given[name] for name in ("data", "seeds", "data_name", "runs") if name in given}
    until = time.monotonic() + 60 * minutes - DRAWING
    return Request(out=out, changes=changes, **there, networks=given.get("network", ()), until=until)


def _check_campaign(arguments: argparse.Namespace) -> None:
    """UsageError for what a campaign lacks, or has too much."""
    if len(arguments.names) > 1 or arguments.network:
        beside = ", ".join(name for name in arguments.names if name != CAMPAIGN) or "--network, and name it once"
        raise UsageError(f"{CAMPAIGN} chooses what is measured: leave out {beside}")
    if arguments.data is None or arguments.minutes is None:
        raise UsageError(f"{CAMPAIGN} needs --data=DIR, the images to train on, and --minutes=25, what it may take")
    if 0 < arguments.minutes < _campaign.LEAST:
        raise UsageError(
            f"--minutes={arguments.minutes:g} is too short for anything: expected at least {_campaign.LEAST:g}"
        )
    if not math.isfinite(arguments.minutes):
        raise UsageError(f"--minutes={arguments.minutes:g} must be a number of minutes")
    for name in ("torch_python", "images"):
        if (given := getattr(arguments, name)) and not os.path.exists(given):
            raise UsageError(f"--{name.replace('_', '-')}={given}: there is no such file or folder")


def _run_campaign(arguments: argparse.Namespace, request: Request) -> None:
    """Plans with what there is, does it, and says of each claim what the runs say now."""
    jax.config.update("jax_platforms", "cpu")  # the device is left to the jobs, with all of its memory
    check_first(GRIDS["figure7"], request)
    device = _campaign.find_device()
    on = "no accelerator: " if device["platform"] == "cpu" else ""
    left = request.until - time.monotonic()
    print(f"device  {on}{device['count']} x {device['kind']}\ntime    {shown(left)}", flush=True)
    jobs = _campaign.jobs(request, device, arguments.torch_python, arguments.images)
    try:
        _campaign.run(jobs, request.runs, left / 60)
    finally:
        claims = SUMMARIES["claims"](request.out).write(request.out / "claims")
        print(f"\nwhat the runs say of the paper: {', '.join(map(str, claims))}", flush=True)


def _trained(name: str, request: Request) -> None:
    """Trains what is missing, and draws what is there, also after Ctrl-C."""
    grid = TRAINED[name](request)
    stopped = None
    if request.data:
        try:
            plan = _runs.plan_grid(grid, request)
            images = _runs.prepare(grid.dataset, plan, request)
            _runs.train_missing(grid.title, grid.dataset, plan, request, images)
        except preemption.TrainingInterruptedError as error:
            stopped = error
    try:
        for figure in training_figures(grid, request):
            _show(figure, request.out / name)
    except ValueError:
        if stopped is None and math.isinf(request.until):
            raise
    if stopped is not None:
        raise stopped


def _compared(name: str, request: Request) -> None:
    """Measures and trains what is missing, and shows what is there, also after Ctrl-C in a training."""
    grid, stopped, images = COMPARISONS[name], None, None
    request = dataclasses.replace(request, out=_made(request.out / name, "--out"))
    _comparison.check(grid, request)
    if request.data:
        images = _runs.prepare(grid.dataset, _rates.plan_rates(grid, request), request)
    try:
        _comparison.run(grid, request, images)
    except preemption.TrainingInterruptedError as error:
        stopped = error
    for figure in _comparison.comparisons(grid, request, images):
        _show(figure, request.out / name)
    if stopped is not None:
        raise stopped


def _show(result: Result, path: pathlib.Path) -> None:
    written = result.write(path)
    print(f"{result.text()}\n{', '.join(map(str, written))}\n", flush=True)
