"""How long a network takes to build, against what a Flax user would do otherwise.

    python -m benchmarks building

Each line is fresh processes that build the same network twice: with this library's initializers, with
jax.nn.initializers.he_normal eagerly, as any Flax NNX model is built, and with the latter under one jit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import tables
from benchmarks.runner import DEPTHS, Bench, Side, some_of
from benchmarks.tables import Record

SIDES = {
    "nfjax": Side("nfjax", "nfjax", ("nfjax",)),
    "eager": Side("he_normal, eager", "nfjax", ("eager",)),
    "jitted": Side("he_normal, one jit", "nfjax", ("jitted",)),
}
ROUNDS = 3


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=some_of(DEPTHS, int), default=[18, 50, 101])


def key(record: Record) -> list[Any]:
    return [record[name] for name in ("depth", "residual", "way")]


def measure(bench: Bench) -> Iterator[Record]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    for depth in bench.arguments.depths:
        for residual in ("idshort", "convshort"):
            runs: dict[str, list[list[float]]] = {name: [] for name in bench.arguments.sides}
            for _ in range(bench.arguments.rounds):
                for name, found in runs.items():
                    with bench.start(SIDES[name], "building") as worker:
                        found.append(worker.ask("build", depth=depth, residual=residual))
            for name, found in runs.items():
                record = {"depth": depth, "residual": residual, "way": SIDES[name].title, "runs": found}
                yield record | {"cores": os.cpu_count(), "versions": versions}


def table(records: list[Record]) -> str:
    networks = dict.fromkeys((record["depth"], record["residual"]) for record in records)
    cells = {tuple(key(record)): _seconds(record["runs"]) for record in records}
    titles = [side.title for side in SIDES.values()]
    rows = [[f"ResNet-{d} {r}", *(cells.get((d, r, way), "") for way in titles)] for d, r in networks]
    versions = "; ".join(dict.fromkeys(record["versions"] for record in records))
    count = max(len(record["runs"]) for record in records)
    note = f"Seconds of the first and the second build in a process; {records[0]['cores']} CPU cores, {versions}"
    note += f", median of {count}." if count > 1 else ", one process each."
    return f"{tables.markdown(['network', *titles], rows)}\n\n{note}{tables.busy(records)}\n"


def _seconds(runs: list[list[float]]) -> str:
    """Of the first and of the second build, medians."""
    return " / ".join(f"{statistics.median_high(column):.2f}" for column in zip(*runs, strict=True))
