"""A pool of threads with simplejpeg and OpenCV: training crops as one would write them by hand."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg

from benchmarks.sides import _crops


def machine() -> dict[str, str]:
    return {"device": "cpu", "platform": "cpu", "version": f"OpenCV {cv2.__version__}"}


class Crops(_crops.Crops):
    def __init__(self) -> None:
        cv2.setNumThreads(0)
        self.local = threading.local()

    def crop(self, path: str) -> np.ndarray:
        if not hasattr(self.local, "rng"):
            self.local.rng = np.random.default_rng()
        with open(path, "rb") as file:
            image = simplejpeg.decode_jpeg(file.read(), "RGB", strict=False)
        y, x, h, w = _crops.box(self.local.rng, *image.shape[:2])
        image = cv2.resize(image[y : y + h, x : x + w], (_crops.SIZE, _crops.SIZE), interpolation=cv2.INTER_AREA)
        return cv2.flip(image, 1) if self.local.rng.random() < 0.5 else image

    def batches(self, paths: list[str], workers: int) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(workers) as executor:
            while True:
                batch = []
                for image in executor.map(self.crop, paths):
                    batch.append(image)
                    if len(batch) == _crops.BATCH:
                        yield np.stack(batch)
                        batch = []


MEASURES = {"crops": Crops}
