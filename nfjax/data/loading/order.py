"""The order in which training and evaluation visit the examples of a split.

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
class Order:
    """One batch to be made.

    Attributes:
        positions: In the run, int64 [B].
        indices: Of the examples there, int32 [B].
        mask: float32 [B], 0 for padding, which comes last.
    """

    positions: np.ndarray
    indices: np.ndarray
    mask: np.ndarray

    def take(self, rows: np.ndarray) -> Order:
        """The part of it that one of several processes makes: the examples at `rows`, [b]."""
        return Order(self.positions[rows], self.indices[rows], self.mask[rows])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def train_indices(seed: int, size: int, batch_size: int, step: int, steps: int) -> np.ndarray:
    """The examples of some training steps.

    Args:
        seed: Of the order.
        size: Examples of the split.
        batch_size: Examples of a step.
        step: The first of these steps, from 0.
        steps: How many.

    Returns:
        Indices int32 [steps, batch_size].
    """
    positions = np.arange(step * batch_size, (step + steps) * batch_size, dtype=np.int64)
    indices = np.empty(len(positions), np.int32)
    for epoch in range(int(positions[0] // size), int(positions[-1] // size) + 1):
        here = positions // size == epoch
        indices[here] = _permutation(seed, epoch, size)[positions[here] % size]
    return indices.reshape(steps, batch_size)


def train_orders(seed: int, size: int, batch_size: int, step: int, last: int) -> Iterator[Order]:
    """The batches of training steps `step` to `last - 1`; the rest as in `train_indices`."""
    for number in range(step, last):
        positions = np.arange(number * batch_size, (number + 1) * batch_size, dtype=np.int64)
        (indices,) = train_indices(seed, size, batch_size, number, 1)
        yield Order(positions, indices, np.ones(batch_size, np.float32))


def eval_orders(size: int, batch_size: int) -> Iterator[Order]:
    """The batches of an evaluation: every example once, the last batch padded with masked entries."""
    for start in range(0, size, batch_size):
        positions = np.arange(start, start + batch_size, dtype=np.int64)
        indices = np.minimum(positions, size - 1).astype(np.int32)
        yield Order(positions, indices, (positions < size).astype(np.float32))


def epoch_end(epoch: int, size: int, batch_size: int) -> int:
    """The number of steps after which `epoch` whole passes over `size` examples are done."""
    return -(-epoch * size // batch_size)
