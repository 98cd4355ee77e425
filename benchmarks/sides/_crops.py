"""Random resized crops from JPEG files, and how many of them come in a second; for the interpreters of all sides."""

from __future__ import annotations

import itertools
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

SIZE, BATCH = 224, 100
TIMED = 4  # epochs: what was prefetched before them counts little then


class Crops:
    """What a user would run: subclasses say how batches are made."""

    def batches(self, paths: list[str], workers: int) -> Iterator[Any]:
        """Yields batches of BATCH crops for ever."""
        raise NotImplementedError

    def rate(self, folder: str, workers: int) -> float:
        """Images per second over four epochs, after one to warm up."""
        paths = files(folder)
        batches, steps = iter(self.batches(paths, workers)), len(paths) // BATCH
        if not steps:
            raise ValueError(f"{folder} holds {len(paths)} files: a batch has {BATCH}")
        for _ in itertools.islice(batches, steps):
            pass
        start = time.perf_counter()
        images = sum(len(batch) for batch in itertools.islice(batches, TIMED * steps))
        return images / (time.perf_counter() - start)


def files(folder: str) -> list[str]:
    """All files below a folder."""
    return sorted(str(path) for path in pathlib.Path(folder).rglob("*") if path.is_file())


def box(rng: Any, height: int, width: int) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) by torchvision's rules; rng: a NumPy generator."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side
