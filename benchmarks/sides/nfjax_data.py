"""nfjax.data: training crops from image files, from files that are met for the first time, and from packed records."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.sides import _crops
from nfjax.data.decoding import crops, decode
from nfjax.data.loading import order, stream
from nfjax.data.packing import pack
from nfjax.data.sources import records
from nfjax.data.splits import Dataset


def machine() -> dict[str, str]:
    return {"device": "cpu", "platform": "cpu", "version": f"nfjax {importlib.metadata.version('nfjax')}"}


class Files:
    """All files below a folder as a split, label 0, each `copies` times."""

    def __init__(self, folder: str, copies: int = 1):
        self.paths = _crops.files(folder) * copies
        self.reader = read

    def __len__(self) -> int:
        return len(self.paths)

    def reference(self, index: int) -> str:
        return self.paths[index]

    def name(self, index: int) -> str:
        return self.paths[index]


def read(path: str) -> tuple[bytes, int]:
    with open(path, "rb") as file:
        return file.read(), 0


class Crops:
    """source: "files", "first" for files of the first epoch, or "records"."""

    def __init__(self, source: str = "files"):
        self.source = source

    def rate(self, folder: str, workers: int) -> float:
        """Images per second over four epochs, after one to warm up.

        In the first epoch images are searched for damage: there they are met four times, under as many names, and those
        of the first quarter are not counted.
        """
        split = records.load(folder).train if self.source == "records" else Files(folder)
        warm = len(split) // _crops.BATCH
        if self.source == "first":
            split = Files(folder, copies=4)
        timed = 4 * warm if self.source != "first" else 3 * warm
        made = batches(split, warm + timed, workers)
        for _ in itertools.islice(made, warm):
            pass
        start = time.perf_counter()
        for _ in made:
            pass
        return timed * _crops.BATCH / (time.perf_counter() - start)

    def pack(self, folder: str, out: str) -> None:
        """Packed records of the files, whose short side has 256 pixels."""
        files = Files(folder)
        dataset = Dataset(files, files, ("image",), fingerprint=lambda: folder)
        pack.pack(dataset, out, source="folder", short_side=256, quality=90)

    def pixel_difference(self, folder: str, count: int) -> tuple[float, float]:
        """Mean and largest mean difference of a crop to Pillow's antialiased one, in grey levels of 255."""
        from PIL import Image

        transform, differences = crops.RandomResizedCrop(_crops.SIZE), []
        for position, path in enumerate(_crops.files(folder)[:count]):
            data, _ = read(path)
            box = transform.box(*decode.size(data), position)
            factor = crops.reduction(box, _crops.SIZE)
            top, left, height, width = (n // factor * factor for n in box)
            image = Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB")
            image = image.crop((left, top, left + width, top + height))
            exact = np.asarray(image.resize((_crops.SIZE, _crops.SIZE), Image.Resampling.BILINEAR), np.int16)
            differences.append(float(np.abs(transform(data, position) - exact).mean()))
        return statistics.mean(differences), max(differences)

    def memory_growth(self, folder: str, count: int) -> dict[str, float]:
        """MiB of this process and its workers at the end of the second and of the last of `count` epochs."""
        split, sizes = Files(folder), []
        steps = len(split) // _crops.BATCH
        for number, _ in enumerate(batches(split, count * steps), 1):
            if number % steps == 0:
                sizes.append(sum(map(resident, [os.getpid(), *children()])) / 2**20)
        return {"epoch_2": sizes[1], f"epoch_{count}": sizes[-1], "highest": max(sizes)}


def batches(split: Files, count: int, workers: int | None = None) -> Iterator[object]:
    """`count` batches of training crops of a split."""

    def report(index: int, cause: str, detail: str) -> None:
        print(f"skipped {split.name(index)}: {cause} {detail}", file=sys.stderr)

    shape = (_crops.SIZE, _crops.SIZE, 3)
    orders = order.train_orders(0, len(split), _crops.BATCH, 0, count)
    return stream.stream(split, crops.RandomResizedCrop(_crops.SIZE), shape, orders, report, workers)


def resident(pid: int) -> int:
    """Bytes of memory of a process, 0 once it has ended."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def children() -> list[int]:
    """The processes that this one has started."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found += [int(entry.name)] if parent == os.getpid() else []
    return found


MEASURES = {"crops": Crops}
