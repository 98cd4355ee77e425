"""Curves of figure 2, measured by nfjax and by PyTorch eager, in turn.

    python -m benchmarks signal_propagation --torch-python=PYTHON

One curve is everything that one line of the figure takes: five seeds, each with new parameters drawn and standardized,
new noise, a forward pass with the statistics of every block and of its residual branch, and a backward pass with those
of the gradient. The processes live through the whole run and take turns; what nfjax compiles on the way is part of its
time. PyTorch computes in its default memory format and in the faster one, channels last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from benchmarks import tables, turns
from benchmarks.runner import DEPTHS, Bench, Side, some_of
from benchmarks.tables import Record

SIDES = {
    "nfjax": Side("nfjax", "nfjax"),
    "torch": Side("PyTorch", "torch", ("contiguous",)),
    "torch_channels_last": Side("PyTorch, channels last", "torch", ("channels_last",)),
}
ROUNDS = 5  # seeds of a curve
COMMAND = "python -m benchmarks signal_propagation --torch-python=PYTHON"
CURVES = [
    ("identity", None, "he_fan_in"),
    ("identity", None, "he_fan_out"),
    ("identity", "batch", "he_fan_in"),
    ("identity", "batch", "he_fan_out"),
    ("idshort", None, "he_fan_out"),
    ("learnscalar", None, "he_fan_out"),
    ("convshort", None, "he_fan_out"),
    ("idshort", None, "brock"),
    ("learnscalar", None, "brock"),
    ("convshort", None, "brock"),
]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=some_of(DEPTHS, int), default=[50, 101])
    parser.add_argument("--curves", type=int, default=len(CURVES), help="how many of the ten of each depth")
    parser.add_argument("--shape", type=lambda text: [*map(int, text.split(","))], default=[32, 32, 32, 3])


def key(record: Record) -> list[Any]:
    return [record[name] for name in ("depth", "residual", "norm", "init", "seeds", "device")]


def measure(bench: Bench) -> Iterator[Record]:
    arguments = bench.arguments
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(bench.start(SIDES[name], "curves")) for name in arguments.sides}
        machines = {name: worker.ask("machine") for name, worker in workers.items()}
        turns.check_same_device(machines)
        told = {"device": next(iter(machines.values()))["device"], "cores": os.cpu_count()}
        for depth in arguments.depths:
            for rule, norm, init in CURVES[: arguments.curves]:
                curve = {"depth": depth, "norm": norm, "init": init, "seeds": arguments.rounds}
                asked = {"rule": rule, "shape": arguments.shape} | curve
                found = {name: worker.ask("curve", **asked) for name, worker in workers.items()}
                for side in found.values():
                    side |= {"seconds": round(side["seconds"], 2), "peak_gib": round(side.pop("peak_bytes") / 2**30, 2)}
                yield curve | {"residual": rule} | told | found


def table(records: list[Record]) -> str:
    return tables.by_device(records, _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    names = [name for name in SIDES if any(name in record for record in records)]
    head = ["curve", *(SIDES[name].title for name in names)]
    head += [f"nfjax / {SIDES[name].title.removeprefix('PyTorch, ')}" for name in names if name != "nfjax"]
    rows, totals = [], dict.fromkeys(names, 0.0)
    for record in records:
        seconds = {name: record[name]["seconds"] for name in names if name in record}
        totals = {name: total + seconds.get(name, 0.0) for name, total in totals.items()}
        norm = " with batch norm" if record["norm"] else ""
        rows.append(_row(f"ResNet-{record['depth']} {record['residual']}{norm}, {record['init']}", names, seconds))
    rows.append(_row("all", names, totals))
    last = records[-1]
    versions = dict.fromkeys(last[name]["version"] for name in names if name in last)
    note = (
        f"Seconds for a curve of {last['seeds']} seeds, 32x32x32x3, {tables.device_name(last)}, {', '.join(versions)} "
        "(eager); in turn, one run. The first curve of a network includes nfjax's compilation."
    )
    return f"{tables.markdown(head, rows)}\n\n{note}{tables.busy(records)}"


def _row(name: str, sides: list[str], seconds: dict[str, float]) -> list[str]:
    times = [f"{seconds[side]:.1f}" if side in seconds else "" for side in sides]
    ours = seconds.get("nfjax")
    rivals = [seconds.get(side) for side in sides if side != "nfjax"]
    return [name, *times, *(f"{ours / theirs:.2f}" if ours and theirs else "" for theirs in rivals)]
