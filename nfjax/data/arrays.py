"""Image data in memory, and the order in which training and evaluation visit it.

The order of training is a function of (seed, position): example number p of a run, counted over all epochs, is number p
mod n of the permutation of epoch p // n. Batches are cut from this endless stream, so every epoch visits each example
exactly once, a batch may span two epochs, and the position in a run is a single number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Images:
    """images: uint8 [N, H, W, 3]; labels: int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if (
            self.images.dtype != np.uint8
            or self.images.ndim != 4
            or self.images.shape[-1] != 3
            or len(self.images) != len(self.labels)
        ):
            raise ValueError(
                f"images {self.images.dtype} {self.images.shape} with {len(self.labels)} labels: "
                "expected uint8 [N, H, W, 3] and N labels"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of these examples: {"image", "label"}."""
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split with the names of their classes. skipped: files that could not be read."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def train_indices(seed: int, size: int, batch_size: int, step: int, steps: int) -> np.ndarray:
    """The examples of training steps `step` to `step + steps - 1` out of `size` examples, int32 [steps, batch_size]."""
    positions = np.arange(step * batch_size, (step + steps) * batch_size, dtype=np.int64)
    indices = np.empty(len(positions), np.int32)
    for epoch in range(int(positions[0] // size), int(positions[-1] // size) + 1):
        here = positions // size == epoch
        indices[here] = _permutation(seed, epoch, size)[positions[here] % size]
    return indices.reshape(steps, batch_size)


def epoch_end(epoch: int, size: int, batch_size: int) -> int:
    """The number of steps after which `epoch` whole passes over the data are done."""
    return -(-epoch * size // batch_size)


def eval_indices(size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices, mask) of each evaluation batch, [batch_size]: every example once, the last batch padded with masked
    entries.
    """
    for start in range(0, size, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(indices, size - 1), (indices < size).astype(np.float32)
