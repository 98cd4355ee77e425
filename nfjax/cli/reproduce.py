"""nfjax reproduce NAME ... [--out=results] [--data=DIR] [--seeds=3] [--epochs=200] [--config.model.width=8 ...]

The paper's tables and figures: on the screen, and as CSV, Markdown and PNG files under --out.

    nfjax reproduce table1 table2 figure2 figure6
    nfjax reproduce figure7 --data=DIR --data-name=CIFAR-10
    nfjax reproduce claims

table1 and table2 are counted, figure2 and figure6 measured at initialization. figure3 (CIFAR-10, 50 and 101 layers),
figure7 (18 layers), figure4 (CIFAR-100), figure5 (ImageNet) and ablations (settings that the paper does not state) are
trained: with --data whatever of their runs is missing, the most telling first; without it, what is there is drawn.
Stopped, the same command goes on. Each finished run is a line of OUT/training.jsonl. Runs with other settings or images
are other figures, in files of other names. claims says which of the paper's statements hold in all these runs.
"""

from __future__ import annotations

import argparse
import os
import pathlib

from absl import logging

from nfjax import compilation, preemption
from nfjax.cli._outcome import FailedError, UsageError
from nfjax.cli._parser import Parser, path
from nfjax.reproduce import REPRODUCTIONS, SUMMARIES, TRAINED, Request, Result
from nfjax.reproduce._runs import parse_changes, train_missing
from nfjax.reproduce._training import training_figures


def add_arguments(parser: Parser) -> None:
    names = (*REPRODUCTIONS, *TRAINED, *SUMMARIES)
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
    training.add_argument("--config.FIELD", metavar="VALUE", help="any other setting, for all runs")


def run(arguments: argparse.Namespace) -> None:
    logging.set_verbosity(logging.WARNING)
    compilation.keep()
    out = _made(pathlib.Path(arguments.out), "--out")
    request = _request(arguments, out)
    try:
        for name in arguments.names:
            if name in TRAINED:
                _trained(name, request)
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
    given = {name: getattr(arguments, name) for name in ("data", "seeds", "data_name", "runs")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        changes = parse_changes(arguments.settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if arguments.epochs is not None:
        if "epochs" in changes:
            raise UsageError("--epochs is short for --config.epochs: give one of them")
        changes["epochs"] = arguments.epochs
    asked = [f"--{name.replace('_', '-')}" for name in given] + (["--epochs or --config"] if changes else [])
    if asked and not any(name in TRAINED for name in arguments.names):
        raise UsageError(f"{', '.join(asked)}: only {', '.join(TRAINED)} are trained; {arguments.names[0]} is not")
    if given.get("seeds", 1) < 1:
        raise UsageError(f"--seeds={given['seeds']} must be positive")
    for name in ("data", "data_name", "runs"):
        if given.get(name) == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty")
    if "data" in given:
        given.setdefault("data_name", os.path.basename(os.path.abspath(given["data"])))
        if not given["data_name"]:
            raise UsageError(f"--data={given['data']} has no name: say what the images are called with --data-name")
    if "runs" in given:
        given["runs"] = _made(pathlib.Path(given["runs"]), "--runs")
    return Request(out=out, changes=changes, **given)


def _trained(name: str, request: Request) -> None:
    """Trains what is missing, and draws what is there, also after Ctrl-C."""
    grid = TRAINED[name](request)
    stopped = None
    if request.data:
        try:
            train_missing(grid, request)
        except preemption.TrainingInterruptedError as error:
            stopped = error
    try:
        for figure in training_figures(grid, request):
            _show(figure, request.out / name)
    except ValueError:
        if stopped is None:
            raise
    if stopped is not None:
        raise stopped


def _show(result: Result, path: pathlib.Path) -> None:
    written = result.write(path)
    print(f"{result.text()}\n{', '.join(map(str, written))}\n", flush=True)
