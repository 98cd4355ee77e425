"""Made-up images to try things with: they need no files, and a network can learn them."""

from __future__ import annotations

import numpy as np

from nfjax.data.splits import Dataset, Images

CLASSES, TRAIN, TEST = 10, 1024, 250


def load(image_size: int) -> Dataset:
    """1 024 training and 250 test images in 10 classes: a fixed 4x4 colour pattern per class, scaled up, under strong
    noise.

    Args:
        image_size: Height and width in pixels.
    """
    rng = np.random.default_rng(0)
    patterns = rng.uniform(64, 192, (CLASSES, 4, 4, 3))
    cells = np.arange(image_size) * 4 // image_size
    patterns = patterns[:, cells][:, :, cells]

    def split(size: int) -> Images:
        labels = (np.arange(size) % CLASSES).astype(np.int32)
        noise = rng.standard_normal((size, image_size, image_size, 3), dtype=np.float32) * 50
        return Images(np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels)

    return Dataset(split(TRAIN), split(TEST), tuple(f"pattern {i}" for i in range(CLASSES)))
