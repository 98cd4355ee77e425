"""The order in which training and evaluation visit the examples of a split.

The order of training is a function of (seed, position): example number p of a run, counted over all epochs, is number p
mod n of the permutation of epoch p // n. Batches are cut from this endless stream, so every epoch visits each example
exactly once, a batch may span two epochs, and the position in a run is a single number.

Where classes are drawn equally, the epochs are as long, and one holds as many examples of each class as of any other,
give or take one: those of a class follow on each other as the permutations of that class do, from one epoch into the
next, so that each of them comes as often as the others of its class.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """The examples of a split by class.

    Attributes:
        members: Of each class that has any, its label and the indices of its examples, int32 [n].
    """

    members: tuple[tuple[int, np.ndarray], ...]

    @classmethod
    def of(cls, labels: np.ndarray) -> Classes:
        """From the label of each example, int [N]; those whose label is negative are of no class, and never drawn.

        Raises:
            ValueError: None of them has a class.
        """
        found = np.unique(labels[labels >= 0])
        if not len(found):
            raise ValueError(f"none of the {len(labels)} examples has a class that could be drawn")
        return cls(tuple((int(label), np.flatnonzero(labels == label).astype(np.int32)) for label in found))

    def epoch(self, seed: int, epoch: int, size: int) -> np.ndarray:
        """The `size` examples of an epoch, int32, in their order."""
        count = len(self.members)
        each, extra = divmod(size, count)  # the places that are left over go round the classes
        drawn = []
        for number, (label, indices) in enumerate(self.members):
            start = epoch * each + max(0, -(-(epoch * extra - number) // count))
            stop = start + each + ((number - epoch * extra) % count < extra)
            rounds = range(start // len(indices), -(-stop // len(indices)))
            ordered = [indices[_of_class(seed, label, turn, len(indices))] for turn in rounds]
            first = rounds.start * len(indices)
            drawn.append(np.concatenate([indices[:0], *ordered])[start - first : stop - first])
        return np.concatenate(drawn)[np.random.default_rng((seed, epoch)).permutation(size)]


def _of_class(seed: int, label: int, turn: int, size: int) -> np.ndarray:
    # Four numbers, the last of which is not 0: a seed that is shorter is filled up with zeros.
    return np.random.default_rng((seed, label, turn, 1)).permutation(size) if size > 1 else np.zeros(1, np.int64)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, size: int, classes: Classes | None) -> np.ndarray:
    if classes is not None:
        return classes.epoch(seed, epoch, size)
    return np.random.default_rng((seed, epoch)).permutation(size)


def train_indices(
    seed: int, size: int, batch_size: int, step: int, steps: int, classes: Classes | None = None
) -> np.ndarray:
    """The examples of some training steps.

    Args:
        seed: Of the order.
        size: Examples of the split.
        batch_size: Examples of a step.
        step: The first of these steps, from 0.
        steps: How many.
        classes: Of the split, which are then drawn equally; None for every example once in an epoch.

    Returns:
        Indices int32 [steps, batch_size].
    """
    positions = np.arange(step * batch_size, (step + steps) * batch_size, dtype=np.int64)
    indices = np.empty(len(positions), np.int32)
    for epoch in range(int(positions[0] // size), int(positions[-1] // size) + 1):
        here = positions // size == epoch
        indices[here] = _epoch(seed, epoch, size, classes)[positions[here] % size]
    return indices.reshape(steps, batch_size)


def train_orders(
    seed: int, size: int, batch_size: int, step: int, last: int, classes: Classes | None = None
) -> Iterator[Order]:
    """The batches of training steps `step` to `last - 1`; the rest as in `train_indices`."""
    for number in range(step, last):
        positions = np.arange(number * batch_size, (number + 1) * batch_size, dtype=np.int64)
        (indices,) = train_indices(seed, size, batch_size, number, 1, classes)
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
