"""nfjax evaluate --workdir=DIR [--step=N] [--data-dir=DIR]
       nfjax evaluate --workdir=DIR --images=DIR --out=assessment.png --out=assessment.json --errors=errors.png
       nfjax evaluate --model=PATH --images=DIR

Scores the best checkpoint of a run, or a chosen one, on the run's test images, where each of them counts exactly once,
or on other images: accuracy, also by class, what is taken for what, and whether the confidence is earned. --model takes
whatever nfjax predict does, an exported folder, too, and leaves out the images that cannot be read.

--out draws the confusion matrix and the reliability diagram (.png, .svg, .pdf), or writes all numbers (.json) or the
confusion matrix, a row for each class (.csv). --errors draws the wrong predictions of which the network is surest.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import logging

from nfjax import _streams as streams
from nfjax.cli._outcome import UsageError
from nfjax.cli._parser import PICTURES, Parser, check_file, path, positive

if TYPE_CHECKING:
    from nfjax.evaluate import Assessed

DPI = 130


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--workdir", metavar="DIR", help="of a training run")
    parser.add_argument("--model", type=path, metavar="PATH", help="or a folder of nfjax export, or hf://USER/NAME")
    parser.add_argument(
        "--trust", action="store_true", help="of --model: run the code that it names, see nfjax predict"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="of the checkpoint; by default the one with the best test accuracy"
    )
    parser.add_argument("--ema", action="store_true", help="assess the average of the weights, where the run has one")
    images = parser.add_argument_group("on which images")
    images.add_argument("--data-dir", type=path, metavar="DIR", help="where the images are now, if they have moved")
    images.add_argument("--split", choices=("test", "train"), help="of the run's images (test)")
    images.add_argument("--images", type=path, metavar="DIR", help="others in their place, DIR/<class>/*.jpg")
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--out", action="append", default=[], type=path, metavar="FILE",
        help=f"{', '.join(WRITERS)}; may be given several times",
    )  # fmt: skip
    written.add_argument("--errors", type=path, metavar="FILE", help=f"{', '.join(PICTURES)}: the surest mistakes")
    written.add_argument("--count", type=positive, metavar="N", help="of these (32)")


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    from nfjax import compilation  # here: --help is answered quickly

    logging.set_verbosity(logging.ERROR)
    compilation.keep()
    found = _on_images(arguments) if arguments.images else _of_run(arguments)
    print(f"\n{found.assessment}")
    for name in arguments.out:
        WRITERS[pathlib.Path(name).suffix.lower()](pathlib.Path(name), found)
        print(name)
    if arguments.errors:
        _write_errors(pathlib.Path(arguments.errors), found, arguments.count or 32)


def _of_run(arguments: argparse.Namespace) -> Assessed:
    """Of a checkpoint; its score is printed, and that of the average of its weights, if there is one."""
    from nfjax import evaluate

    where = {"data_dir": arguments.data_dir, "split": arguments.split or "test"}
    found = evaluate.assess(arguments.workdir, arguments.step, **where, ema=arguments.ema)
    what = f"{where['split']} accuracy"
    _print_score(f"step {found.step:,}: {what}", found)
    if not arguments.ema and found.has_average:
        averaged = evaluate.assess(arguments.workdir, found.step, **where, ema=True)
        _print_score(f"average of the weights: {what}", averaged)
    return found


def _on_images(arguments: argparse.Namespace) -> Assessed:
    """Of a run or an export, on a folder of images; those that cannot be read are named, and left out."""
    from nfjax import inference

    def skip(name: str, cause: str, detail: str) -> None:
        print(f"nfjax: {streams.printable(name)}: {cause}{f' ({detail})' if detail else ''}", file=sys.stderr)

    # A workdir is of the user's own, as in training: its code is run without being asked for.
    trust = arguments.trust or bool(arguments.workdir)
    model = arguments.model or arguments.workdir
    predictor = inference.load(model, step=arguments.step, ema=arguments.ema, trust=trust)
    found = inference.assess(predictor, arguments.images, skip)
    _print_score(f"step {found.step:,}: on other images" if arguments.workdir else "on these images", found)
    return found


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.model and not arguments.workdir:
        raise UsageError("an argument is missing: --model, or --workdir; nfjax evaluate --help tells more")
    if arguments.model and arguments.workdir:
        raise UsageError("--model and --workdir: expected one of the two")
    if arguments.model and not arguments.images:
        raise UsageError("--model needs --images=DIR, with a folder for each class; --workdir has images of its own")
    if arguments.trust and not arguments.model:
        raise UsageError("--trust goes with --model")
    for name in arguments.out:
        check_file("--out", name, WRITERS)
    if arguments.errors:
        check_file("--errors", arguments.errors, PICTURES)
    if arguments.count and not arguments.errors:
        raise UsageError("--count goes with --errors")
    for option in ("split", "data_dir"):
        if arguments.images and getattr(arguments, option):
            raise UsageError(f"--{option.replace('_', '-')} is about the run's images; it does not go with --images")


def _print_score(what: str, found: Assessed) -> None:
    score = found.assessment
    print(f"{what} {score.accuracy:.2%}, loss {score.loss:.4f}, of {score.images:,} images")


def _write_picture(file: pathlib.Path, found: Assessed) -> None:
    from nfjax import storage
    from nfjax.assessment import _pictures as pictures

    storage.write_figure(file, pictures.draw(found.assessment), DPI)


def _write_json(file: pathlib.Path, found: Assessed) -> None:
    from nfjax import storage

    storage.write_json(file, {"step": found.step} | found.assessment.to_dict())


def _write_csv(file: pathlib.Path, found: Assessed) -> None:
    from nfjax import storage
    from nfjax.cli._predictions import harmless

    names = [harmless(name) for name in found.assessment.class_names]
    rows = [[name, *counts] for name, counts in zip(names, found.assessment.confusion().tolist(), strict=True)]
    storage.write_csv(file, [["true / predicted", *names], *rows])


def _write_errors(file: pathlib.Path, found: Assessed, count: int) -> None:
    from nfjax import storage
    from nfjax.assessment import _pictures as pictures

    chosen = found.assessment.confident_errors(count)
    if not len(chosen):
        print(f"every image is recognized: {file} is not drawn")
        return
    storage.write_figure(file, pictures.draw_errors(found.assessment, chosen, found.image), DPI)
    print(f"{file}, of {found.name(int(chosen[0]))} and others")


WRITERS: dict[str, Callable[[pathlib.Path, Assessed], None]] = {
    **dict.fromkeys(PICTURES, _write_picture),
    ".json": _write_json,
    ".csv": _write_csv,
}
