"""What saving costs the training step.

    python -m benchmarks checkpoints --depths=18,50

For each network, its real state (parameters and momentum, float32, width 64) and its real training step at 32x32: pairs
of stretches of steps, in turn with one asynchronous save at the beginning and without any. The difference of their
medians is what a save costs the steps, wherever it is spent: checksums, copies to the host, cores and disk taken while
it is written. As a share of `checkpoint.every_steps` steps, which is the default interval, and of a CIFAR-10 epoch,
after which a run saves as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import tables
from benchmarks.runner import DEPTHS, Bench, Side, some_of
from benchmarks.tables import Record

SIDES = {"nfjax": Side("nfjax", "nfjax")}
ROUNDS = 5
EPOCH = 391  # steps of 128 images in an epoch of CIFAR-10
COMMAND = "python -m benchmarks checkpoints"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=some_of(DEPTHS, int), default=[18, 50])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=4, help="steps of a stretch: a save is to be over in it")


def key(record: Record) -> list[Any]:
    return [record["depth"], record.get("width", 64), record["batch"], record["device"]]


def measure(bench: Bench) -> Iterator[Record]:
    arguments = bench.arguments
    for depth in arguments.depths:
        shape = {"depth": depth, "batch": arguments.batch, "width": arguments.width}
        times: dict[str, list[float]] = {"with": [], "without": [], "call": [], "written": []}
        with bench.start(SIDES["nfjax"], "saves") as worker:
            made = worker.ask("prepare", **shape)
            for _ in range(arguments.rounds):
                for save in (True, False):
                    for name, value in worker.ask("stretch", length=arguments.length, save=save).items():
                        times[name].append(value)
            worker.ask("end")
        median = {name: statistics.median(values) for name, values in times.items()}
        step, cost = median["without"] / arguments.length, median["with"] - median["without"]
        shares = {"share_of_interval": cost / (made["every_steps"] * step), "share_of_epoch": cost / (EPOCH * step)}
        measured = {"step": step, "call": median["call"], "cost": cost, "all": times, "cores": os.cpu_count()}
        yield shape | made | measured | shares


def table(records: list[Record]) -> str:
    return tables.by_device(records, _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    head = ["network", "state", "step", "`save` returns after", "costs the steps", "of 1 000 steps"]
    rows = [
        [
            f"ResNet-{r['depth']}, 32x32, batch {r['batch']}",
            f"{r['megabytes']:.0f} MB",
            *(f"{1e3 * r[name]:,.0f} ms" for name in ("step", "call", "cost")),
            *(f"{r[name]:.3%}" for name in ("share_of_interval", "share_of_epoch")),
        ]
        for r in records
    ]
    pairs = " or ".join(dict.fromkeys(str(len(r["all"]["with"])) for r in records))
    note = f"{tables.device_name(records[0])}, medians of {pairs} pairs, in turn.{tables.busy(records)}"
    return f"{tables.markdown([*head, 'of a CIFAR-10 epoch'], rows)}\n\n{note}"
