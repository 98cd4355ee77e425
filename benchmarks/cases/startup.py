"""From an empty process to the first training step: import, building, compiling; with and without kept programs.

    python -m benchmarks startup --torch-python=PYTHON

Every line is a fresh process that imports, builds a network with its optimizer, and takes a step on eight images of
32x32. nfjax keeps compiled programs in the user's cache directory, as its commands do (nfjax.compilation); here that is
a temporary one, empty at first. PyTorch is eager, and compiled with an empty and with a filled cache of its own.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import tables, turns
from benchmarks.networks import NETWORKS
from benchmarks.runner import DEPTHS, Bench, Side, some_of
from benchmarks.tables import Record

SIDES = {
    "nothing-kept": Side("nfjax, nothing kept", "nfjax", ("off",)),
    "first-run": Side("nfjax, first run", "nfjax", ("kept",)),
    "next-run": Side("nfjax, next run", "nfjax", ("kept",)),
    "eager": Side("PyTorch eager", "torch", ("eager",)),
    "compile-first-run": Side("torch.compile, first run", "torch", ("compile",)),
    "compile-next-run": Side("torch.compile, next run", "torch", ("compile",)),
}
ROUNDS = 1
COMMAND = "python -m benchmarks startup --torch-python=PYTHON"
KEEP_NOTHING = ("off", "eager")
PARTS = ("import", "build", "first_step")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=some_of(DEPTHS, int), default=[18, 50])
    parser.add_argument("--network", choices=NETWORKS, default="ConvShort")


def key(record: Record) -> list[Any]:
    return [record[name] for name in ("device", "cores", "network", "way")]


def measure(bench: Bench) -> Iterator[Record]:
    """A record per fresh process; with --rounds, the best of several, each with caches of its own."""
    arguments = bench.arguments
    residual, _ = NETWORKS[arguments.network]
    platforms: dict[str, Record] = {}
    for depth in arguments.depths:
        found: dict[str, list[Record]] = {name: [] for name in arguments.sides}
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as nfjax_cache, tempfile.TemporaryDirectory() as torch_cache:
                for name in arguments.sides:
                    cache = torch_cache if SIDES[name].module == "torch" else nfjax_cache
                    record = fresh(bench, SIDES[name], depth, residual, cache)
                    platforms[SIDES[name].module] = {"platform": record.pop("platform")}
                    turns.check_same_device(platforms)
                    found[name].append({"network": f"ResNet-{depth} {arguments.network}"} | record)
        yield from (min(records, key=lambda record: record["process"]) for records in found.values())


def fresh(bench: Bench, side: Side, depth: int, residual: str, cache: str) -> Record:
    """One process, and what it kept in the cache."""
    environment = {"JAX_COMPILATION_CACHE_DIR": None, "NFJAX_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    start = time.perf_counter()
    with bench.start(side, "start", environment, pause=0) as worker:
        answer = {"import": worker.ask("import_seconds")} | worker.ask("first_step", depth=depth, residual=residual)
    whole = time.perf_counter() - start
    files = [path for path in pathlib.Path(cache).rglob("*") if path.is_file() and side.options[0] not in KEEP_NOTHING]
    kept = sum(path.stat().st_size for path in files) / 2**20
    times = {name: round(answer[name], 3) for name in PARTS} | {"process": round(whole, 3)}
    told = {name: answer[name] for name in ("version", "device", "platform")}
    return {"way": side.title} | times | {"kept_mib": round(kept, 2), **told, "cores": os.cpu_count()}


def table(records: list[Record]) -> str:
    return tables.by_device(records, _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    rows = [
        [r["network"], r["way"], *(f"{r[name]:.1f}" for name in (*PARTS, "process")), f"{r['kept_mib'] or ''}"]
        for r in records
    ]
    head = ["network", "", "import", "building", "first step", "whole process", "kept, MiB"]
    versions = ", ".join(dict.fromkeys(record["version"] for record in records))
    cores = f"{records[0]['cores']} CPU cores"
    on = cores if records[0]["device"] == "cpu" else f"{records[0]['device']}, {cores}"
    note = f"Seconds in a fresh process, 8 images of 32x32, float32; {on}, {versions}. One process each, in turn."
    return f"{tables.markdown(head, rows, texts=2)}\n\n{note}{tables.busy(records)}"
