"""python -m nfjax.reproduce NAME … [--out=results] [--data=DIR] [--seeds=3] [--epochs=200] [--config.model.width=8 …]

The paper's tables and figures: on the screen, and as CSV, Markdown and PNG files under --out.

    python -m nfjax.reproduce table1 table2 figure2 figure6
    python -m nfjax.reproduce figure7 --data=DIR --data-name=CIFAR-10
    python -m nfjax.reproduce claims

table1 and table2 are counted, figure2 and figure6 measured at initialization. figure3 (CIFAR-10, 50 and 101 layers),
figure7 (18 layers), figure4 (CIFAR-100), figure5 (ImageNet) and ablations (settings that the paper does not state) are
trained: with --data whatever of their runs is missing, the most telling first; without it, what is there is drawn.
Stopped, the same command goes on. Each finished run is a line of OUT/training.jsonl. Runs with other settings or images
are other figures, in files of other names. claims says which of the paper's statements hold in all these runs.
"""

from __future__ import annotations

import argparse
import difflib
import os
import pathlib
import sys

from nfjax import preemption

if __name__ == "__main__":
    preemption.begin()

from absl import logging

from nfjax import compilation
from nfjax.preemption import INTERRUPTED, START_AGAIN
from nfjax.reproduce import REPRODUCTIONS, SUMMARIES, TRAINED, Request, Result
from nfjax.reproduce._runs import parse_changes, train_missing
from nfjax.reproduce._training import training_figures


def main() -> None:
    names = (*REPRODUCTIONS, *TRAINED, *SUMMARIES)
    parser = argparse.ArgumentParser(
        prog="python -m nfjax.reproduce",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names", nargs="+", choices=names, metavar="NAME", help=f"what to reproduce: {', '.join(names)}"
    )
    parser.add_argument(
        "--out", default="results", type=os.path.expanduser, help="folder for what is written (default: results)"
    )
    training = parser.add_argument_group("where runs are needed")
    training.add_argument(
        "--data", type=os.path.expanduser, help="folder of the images, as for nfjax.main; without it nothing is trained"
    )
    training.add_argument("--data-name", help="what the images are called in the results (default: the folder's name)")
    training.add_argument("--seeds", type=int, help="how many runs of each network (default: 3)")
    training.add_argument("--epochs", type=int, help="of each run, short for --config.epochs")
    training.add_argument(
        "--runs", type=os.path.expanduser, help="folder for the workdirs of the runs (default: runs/reproduce)"
    )
    training.add_argument("--config.FIELD", metavar="VALUE", help="any other setting, for all runs")
    arguments, rest = parser.parse_known_intermixed_args()
    logging.set_verbosity(logging.WARNING)
    compilation.keep()
    out = _made(pathlib.Path(arguments.out), "--out")
    try:
        request = _request(arguments, rest, out)
        for name in arguments.names:
            if name in TRAINED:
                _trained(name, request)
            else:
                _show(REPRODUCTIONS[name]() if name in REPRODUCTIONS else SUMMARIES[name](out), out / name)
    except preemption.TrainingInterruptedError as error:
        print(f"nfjax: {error}", file=sys.stderr)
        sys.exit(START_AGAIN if isinstance(error, preemption.TrainingPreemptedError) else INTERRUPTED)
    except KeyboardInterrupt:
        print("nfjax: interrupted between two runs; the same command goes on from there", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"nfjax: {error}")


def _made(folder: pathlib.Path, flag: str) -> pathlib.Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "no permission")
    except OSError as error:
        sys.exit(f"nfjax: cannot write to {folder} ({error.strerror}); choose another folder with {flag}=DIR")
    return folder


def _request(arguments: argparse.Namespace, rest: list[str], out: pathlib.Path) -> Request:
    """What is asked for; ValueError for flags that mean nothing, or nothing here."""
    given = {name: getattr(arguments, name) for name in ("data", "seeds", "data_name", "runs")}
    given = {name: value for name, value in given.items() if value is not None}
    _check_flags(rest, [f"--{name.replace('_', '-')}" for name in vars(arguments)])
    changes = parse_changes(rest)
    if arguments.epochs is not None:
        if "epochs" in changes:
            raise ValueError("--epochs is short for --config.epochs: give one of them")
        changes["epochs"] = arguments.epochs
    asked = [f"--{name.replace('_', '-')}" for name in given] + (["--epochs or --config"] if changes else [])
    if asked and not any(name in TRAINED for name in arguments.names):
        raise ValueError(f"{', '.join(asked)}: only {', '.join(TRAINED)} are trained; {arguments.names[0]} is not")
    if given.get("seeds", 1) < 1:
        raise ValueError(f"--seeds={given['seeds']} must be positive")
    for name in ("data", "data_name", "runs"):
        if given.get(name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty")
    if "data" in given:
        given.setdefault("data_name", os.path.basename(os.path.abspath(given["data"])))
        if not given["data_name"]:
            raise ValueError(f"--data={given['data']} has no name: say what the images are called with --data-name")
    if "runs" in given:
        given["runs"] = _made(pathlib.Path(given["runs"]), "--runs")
    return Request(out=out, changes=changes, **given)


def _check_flags(rest: list[str], known: list[str]) -> None:
    """ValueError for an unknown flag that looks like a known one."""
    for argument in rest:
        name = f"--{argument.partition('=')[0].lstrip('-')}"
        if not name.startswith("--config.") and (alike := difflib.get_close_matches(name, known, 1, 0.75)):
            raise ValueError(f"unknown argument {argument!r}: did you mean {alike[0]}?")


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


if __name__ == "__main__":
    main()
