"""An epoch of CIFAR-10 as a user experiences it: nfjax's trainer against two PyTorch loops, in turn.

    python -m benchmarks epoch --torch-python=PYTHON --data=DIR --dtype=bfloat16

Crop, flip, RandAugment (2 operations, magnitude 9), ResNet-18, SGD with momentum. nfjax keeps the images on the device
and augments them in the training step. The PyTorch loops: DataLoader with worker processes and torchvision's
transforms, and all on the device. Without --data (folders of images, one per class, below train/) the images are
random, which takes the same time. --examples shortens the epoch. The first epoch of each side, which compiles, is told
apart from the --rounds of which the median is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import tables, turns
from benchmarks.networks import NETWORKS, title
from benchmarks.runner import Bench, Side
from benchmarks.tables import Record

SIDES = {
    "nfjax": Side("nfjax", "nfjax"),
    "dataloader": Side("PyTorch, DataLoader", "torch", ("dataloader",)),
    "device": Side("PyTorch, data on the device", "torch", ("device",)),
}
ROUNDS = 3
COMMAND = "python -m benchmarks epoch --torch-python=PYTHON --dtype=bfloat16"
CIFAR = 50_000  # training images


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="folder with train/<class> and test/<class>")
    parser.add_argument("--examples", type=int, default=CIFAR, help="in an epoch")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--network", choices=NETWORKS, default="ConvShort")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--operations", type=int, default=2, help="of RandAugment; 0 leaves it out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the DataLoader")
    parser.add_argument("--torch-mode", choices=("eager", "compile"), default="compile")


def key(record: Record) -> list[Any]:
    names = ("depth", "network", "width", "batch", "dtype", "operations", "torch_mode", "examples")
    return [*(record[name] for name in names), device(record)]


def measure(bench: Bench) -> Iterator[Record]:
    """One record: all sides in turn, an epoch each."""
    arguments = bench.arguments
    residual, norm = NETWORKS[arguments.network]
    names = ("depth", "width", "batch", "dtype", "operations", "workers")
    settings = {name: getattr(arguments, name) for name in names}
    sides: dict[str, Record] = {name: {"epochs": []} for name in arguments.sides}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/images.npz"
        np.savez(path, **images(arguments.data, arguments.examples))
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        workers = {name: stack.enter_context(bench.start(SIDES[name], "epochs", memory)) for name in sides}
        chosen = {name: getattr(arguments, name) for name in ("network", "examples", "torch_mode")}
        machines = {name: worker.ask("machine") for name, worker in workers.items()}
        if bench.has(key(settings | chosen | {"sides": machines})):
            return
        for name, worker in workers.items():
            mode = {} if name == "nfjax" else {"mode": arguments.torch_mode}
            sides[name] |= worker.ask("prepare", images=path, residual=residual, norm=norm, **settings, **mode)
        turns.check_same_device(sides)
        for _ in range(1 + arguments.rounds):
            for name, worker in workers.items():
                sides[name]["epochs"].append(worker.ask("epoch"))
                print(SIDES[name].title, sides[name]["epochs"][-1], flush=True)
        if "nfjax" in workers:
            workers["nfjax"].ask("end")
    yield settings | chosen | {"data": bool(arguments.data), "cores": os.cpu_count(), "sides": sides}


def images(directory: str | None, examples: int) -> dict[str, np.ndarray]:
    """Training images uint8 [N, 32, 32, 3] and their labels int32 [N]."""
    if directory is None:
        rng = np.random.default_rng(0)
        shape = (examples, 32, 32, 3)
        return {"images": rng.integers(0, 256, shape, np.uint8), "labels": rng.integers(0, 10, examples, np.int32)}
    from benchmarks.sides import nfjax

    return nfjax.cifar_images(directory, examples)


def device(record: Record) -> str:
    return next(iter(record["sides"].values()))["device"]


def seconds(record: Record, side: str) -> float | None:
    """Of an epoch, the median of all but the first."""
    epochs = record["sides"].get(side, {}).get("epochs", [])
    return statistics.median(epoch["seconds"] for epoch in epochs[1:]) if len(epochs) > 1 else None


def table(records: list[Record]) -> str:
    return tables.by_device([record | {"device": device(record)} for record in records], _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    texts, rivals = ["network", "device", "PyTorch", "batch, precision"], [name for name in SIDES if name != "nfjax"]
    head = [*texts, "images of an epoch", *(f"{side.title}, s" for side in SIDES.values())]
    head += [f"{SIDES[name].title} / nfjax" for name in rivals]
    rows = []
    for record in records:
        times = {name: seconds(record, name) for name in SIDES}
        mode = "torch.compile" if record["torch_mode"] == "compile" else record["torch_mode"]
        cells = [title(record["depth"], record["network"], record["width"]), tables.device_name(record), mode]
        cells += [f"{record['batch']}, {record['dtype']}", f"{record['examples']:,}"]
        cells += [f"{time:.1f}" if time else "" for time in times.values()]
        ours = times["nfjax"]
        cells += [f"{times[name] / ours:.2f}" if times[name] and ours else "" for name in rivals]
        rows.append(cells)
    last = records[-1]
    epochs = {SIDES[name].title: side["epochs"] for name, side in last["sides"].items()}
    versions = ", ".join(dict.fromkeys(side["version"] for side in last["sides"].values()))
    first = "; ".join(f"{name} {found[0]['seconds']:.1f}" for name, found in epochs.items())
    losses = "; ".join(f"{name} {found[0]['loss']:.3f} to {found[-1]['loss']:.3f}" for name, found in epochs.items())
    note = (
        f"Seconds of an epoch, the median after the first; PyTorch channels last, "
        f"{last['workers']} workers; {versions}. The first epoch of the last row, with compilation: {first}. "
        f"Its mean training loss from the first epoch to the last: {losses}. "
        f"RandAugment of PyTorch on the device treats all images of a batch alike.{tables.busy(records)}"
    )
    return f"{tables.markdown(head, rows, len(texts))}\n\n{note}"
