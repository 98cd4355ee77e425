"""What weights of other classes are worth where images are few.

    python -m benchmarks finetune --images=5,20,100

scikit-learn's handwritten digits, by the recipe of configs/digits_convshort.py: one network learns the digits 0 to 4,
from all of their training images. Then 5 to 9 are learned from a few images of each, with as many steps, to whole
epochs: by a network with random weights, by one that begins with the first one's, all of it or its head alone. Every
round has another seed, of weights and of order; the few images are the first of each class, and the test images all
there are of 5 to 9. The accuracy is that after the last epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.runner import Bench, Side
from benchmarks.tables import Record
from nfjax import data
from nfjax.cli import settings
from nfjax.training import train

SIDES = {"nfjax": Side("nfjax", "nfjax")}
ROUNDS = 3
STEPS = 200
# What is set besides init_from.
WAYS: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "fine-tuned": {},
    "fine-tuned, layer_decay=0.75": {"optim.layer_decay": 0.75},
    "the head alone": {"optim.freeze": "stem,blocks"},
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[5, 20, 100],
        help="training images of each class",
    )


def key(record: Record) -> list[Any]:
    return [record["images"], record["way"], record["steps"]]


def measure(bench: Bench) -> Iterator[Record]:
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            _train(pathlib.Path(folder) / f"first{seed}", "first", seed) for seed in range(bench.arguments.rounds)
        ]
        for images in bench.arguments.images:
            for way, changes in WAYS.items():
                if bench.has([images, way, STEPS]):
                    continue
                begin, scores = time.monotonic(), []
                for seed, (source, _) in enumerate(sources):
                    init_from = {} if way == "from scratch" else {"init_from": str(source)}
                    place = pathlib.Path(folder) / f"{images}-{len(way)}-{seed}"
                    scores.append(_train(place, f"last:{images}", seed, **init_from, **changes)[1])
                yield {
                    "images": images,
                    "way": way,
                    "steps": STEPS,
                    "accuracy": scores,
                    "source_accuracy": [accuracy for _, accuracy in sources],
                    "seconds": time.monotonic() - begin,
                    "device": "cpu",
                    "cores": os.cpu_count(),
                }


def _train(folder: pathlib.Path, what: str, seed: int, **changes: Any) -> tuple[pathlib.Path, float]:
    """(the workdir, accuracy at the end) of a run on the "first" digits, or on the "last:N" of each class."""
    config = settings.load("digits_convshort")
    name, _, images = what.partition(":")
    config.data.source, config.data.dir, config.seed = f"{__name__}:{name}", images, seed
    if images:
        config.batch_size = min(config.batch_size, 5 * int(images))
        config.epochs = STEPS * config.batch_size // (5 * int(images))
    config.log.evaluate_every_epochs = config.checkpoint.every_epochs = config.epochs
    config.update_from_flattened_dict(changes)
    return folder, train(config, str(folder))["test_accuracy"]


def first(directory: str, image_size: int) -> data.Dataset:
    """The digits 0 to 4, a source."""
    return of_digits(range(5), None, image_size)


def last(directory: str, image_size: int) -> data.Dataset:
    """The digits 5 to 9, a source. directory: how many training images of each."""
    return of_digits(range(5, 10), int(directory), image_size)


def of_digits(digits: range, count: int | None, image_size: int) -> data.Dataset:
    """Some of the digits, from 0 as labels; of each the first `count` training images, None for all."""
    whole = data.load("digits", "", image_size)

    def part(split: data.Images, count: int | None) -> data.Images:
        kept = np.sort(np.concatenate([np.flatnonzero(split.labels == digit)[:count] for digit in digits]))
        return data.Images(split.images[kept], split.labels[kept] - np.int32(digits.start))

    names = tuple(map(str, digits))
    return dataclasses.replace(whole, train=part(whole.train, count), test=part(whole.test, None), class_names=names)


def table(records: list[Record]) -> str:
    counts = sorted({record["images"] for record in records})
    by_key = {(record["way"], record["images"]): record["accuracy"] for record in records}
    head = ["digits 5 to 9", *(f"{count} images of each" for count in counts)]
    rows = [[way, *(_shown(by_key.get((way, count))) for count in counts)] for way in WAYS]
    seeds = " or ".join(sorted({str(len(record["accuracy"])) for record in records}))
    source = statistics.mean(accuracy for record in records for accuracy in record["source_accuracy"])
    note = (
        f"Test accuracy in %, mean and, in brackets, lowest and highest of {seeds} seeds, after about {STEPS} steps "
        f"of the recipe of `digits_convshort`; the network of the digits 0 to 4 has {source:.1%} on those. Measured by "
        "`python -m benchmarks finetune`."
    )
    return f"{tables.markdown(head, rows)}\n\n{note}\n"


def _shown(accuracies: list[float] | None) -> str:
    if accuracies is None:
        return ""
    low, mean, high = (100 * f(accuracies) for f in (min, statistics.mean, max))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"
