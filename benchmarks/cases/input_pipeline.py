"""How fast training crops come from image files: nfjax beside what a user would run instead, in turn.

    python -m benchmarks input_pipeline --data=DIR --torch-python=PYTHON --tf-python=PYTHON

DIR holds JPEG files, in folders or not. Every side makes random resized crops of 224 pixels (area 0.08 to 1, aspect 3/4
to 4/3, bilinear) in batches of 100, with as many workers as there are cores, in a process of its own; an epoch to warm
up, four timed; the sides take turns, the median over the rounds counts. The rivals flip half of the images, which nfjax
does on the device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import tables
from benchmarks.runner import Bench, Side
from benchmarks.tables import Record

SIDES = {
    "pool": Side("thread pool, simplejpeg and OpenCV (area)", "pool"),
    "dataloader": Side("PyTorch DataLoader, PIL", "torchvision"),
    "tf": Side("tf.data, decode_and_crop_jpeg, no antialiasing", "tf"),
    "tf_antialiased": Side("tf.data, decode_and_crop_jpeg, antialiased", "tf", ("antialias",)),
    "grain": Side("grain, worker processes, nfjax's crop", "grain"),
    "nfjax": Side("nfjax", "nfjax_data"),
}
ROUNDS = 3
EPOCHS = 20  # over which the memory is watched


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of JPEG files, at least 100")


def key(record: Record) -> list[Any]:
    return [record["cores"]]


def measure(bench: Bench) -> Iterator[Record]:
    """One record, of all rounds."""
    data, cores, nfjax = bench.arguments.data, os.cpu_count(), SIDES["nfjax"]
    record: Record = {"cores": cores}
    if bench.has(key(record)):
        return
    with tempfile.TemporaryDirectory() as folder:
        # (side, where the images are, workers) by the name in the table
        runs = {name: (SIDES[name], data, cores) for name in bench.arguments.sides if name != "nfjax"}
        if "nfjax" in bench.arguments.sides:
            with bench.start(nfjax, "crops") as worker:
                record["memory_mib"] = worker.ask("memory_growth", folder=data, count=EPOCHS)
                record["pixel_difference"] = worker.ask("pixel_difference", folder=data, count=1000)
                worker.ask("pack", folder=data, out=f"{folder}/records")
            first, packed = (Side(nfjax.title, nfjax.module, (source,)) for source in ("first", "records"))
            runs["nfjax, 1 worker"] = (nfjax, data, 1)
            runs[ours(cores)] = (nfjax, data, cores)
            runs[f"{ours(cores)}, in the first epoch"] = (first, data, cores)
            runs["nfjax, packed records of 256 pixels"] = (packed, f"{folder}/records", cores)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(bench.arguments.rounds):
            for name, (side, source, workers) in runs.items():
                worker = bench.start(side, "crops")
                try:
                    rates[name].append(worker.ask("rate", folder=source, workers=workers))
                finally:
                    worker.close(patience=0)  # the workers of some sides take long to end
            print(f"round {number + 1}:", {name: round(values[-1]) for name, values in rates.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    yield record | {"images_per_second": medians, "rounds": rates}


def ours(cores: int) -> str:
    """The name of the line that all others are compared with."""
    return f"nfjax, {cores} workers"


def table(records: list[Record]) -> str:
    head = ["training crops of 224 pixels", "images/s", "images/s per core", "nfjax / this"]
    return "\n\n".join(f"{tables.markdown(head, _rows(record))}\n\n{_note(record)}" for record in records) + "\n"


def _rows(record: Record) -> Iterator[list[str]]:
    rates = record["images_per_second"]
    reference = rates.get(ours(record["cores"]))
    for name, rate in rates.items():
        used = 1 if name.endswith("1 worker") else record["cores"]
        called = SIDES[name].title if name in SIDES else name
        yield [called, f"{rate:,.0f}", f"{rate / used:,.0f}", f"{reference / rate:.2f}" if reference else ""]


def _note(record: Record) -> str:
    rounds = len(next(iter(record["rounds"].values())))
    note = f"{record['cores']} CPU cores, median of {rounds} rounds, in turn."
    if "pixel_difference" in record:
        (mean, worst), memory = record["pixel_difference"], record["memory_mib"]
        note += (
            f" Difference to Pillow's antialiased crop: {mean:.2f} grey levels of 255 on average, {worst:.2f} for the "
            f"worst image. Memory of all processes: {memory['epoch_2']:,.0f} MiB after 2 epochs, "
            f"{memory[f'epoch_{EPOCHS}']:,.0f} MiB after {EPOCHS}."
        )
    return note + tables.busy([record])
