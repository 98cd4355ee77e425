"""Batches of a split that does not fit in memory, decoded ahead of their use by worker processes.

A batch is described by an `Order`; which worker decodes which part of it changes nothing in what comes out, nor in what
order. One batch after the other gets a slot of shared memory and is cut into tasks (here); a pool of processes does the
tasks (`pool`, `worker`) and writes the pixels there (`slots`); the oldest batch, once all its tasks are done, is copied
out and its slot given to the next.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from nfjax.data.loading import pickling
from nfjax.data.loading.order import Order
from nfjax.data.loading.pool import Pool, Task, default_workers
from nfjax.data.loading.slots import Slots
from nfjax.data.loading.worker import Failure
from nfjax.data.splits import Encoded

# Images a task: long enough to hide the pipe, short enough that a batch does not wait for one worker.
CHUNK, SMALLEST_CHUNK = 16, 4
# (the bytes of an image, position in the run, whether it was decoded before without complaint) -> uint8 [H, W, 3]
Transform = Callable[[bytes, int, bool], np.ndarray]
OnFailure = Callable[[int, str, str], None]  # (index in the split, cause, detail) of an example that cannot be read


def default_ahead(workers: int, batch: int) -> int:
    """Batches decoded ahead: two at least, and enough that each of many workers has two small tasks."""
    return max(2, -(-2 * workers * SMALLEST_CHUNK // batch) - 1)


def stream(
    split: Encoded,
    transform: Transform,
    shape: tuple[int, int, int],
    orders: Iterator[Order],
    on_failure: OnFailure,
    workers: int | None = None,
    ahead: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of some orders, in their order. Close the generator to end the workers; they also end when this
    process does.

    Args:
        split: Whose examples they are.
        transform: What a worker makes of the bytes of an image file.
        shape: (H, W, C) of what it returns.
        orders: Of batches of equal size.
        on_failure: Called with (index, cause, detail) for each example that could not be read; its image is black and
            its mask 0: no other image takes its place.
        workers: Processes, by default one for every core.
        ahead: Batches that are decoded before they are asked for, which is also the memory that is taken, by default
            `default_ahead`.

    Yields:
        {"image": uint8 [B, H, W, C], "label": int32 [B], "mask": float32 [B]}

    Raises:
        ValueError: workers or ahead is less than 1, or the split's reader or the transform cannot be sent to another
            process.
        WorkersFailedError: No worker gets as far as decoding.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1 or (ahead is not None and ahead < 1):
        raise ValueError(f"workers={workers}, ahead={ahead}: expected at least 1 of both")
    program = pickling.dumps((split.reader, transform))
    first = next(orders, None)
    if first is None:
        return
    size = len(first.indices)
    orders = itertools.chain([first], orders)
    ahead = default_ahead(workers, size) if ahead is None else ahead
    pump = _Pump(split, program, orders, size, shape, on_failure, workers, ahead)
    try:
        while (batch := pump.next()) is not None:
            yield batch
    finally:
        pump.close()


@dataclasses.dataclass
class _Batch:
    """One that is being made: its pixels in a slot, and what is known of the rest."""

    order: Order
    slot: int
    labels: np.ndarray
    mask: np.ndarray
    left: int  # examples that are not decoded yet


class _Pump:
    """Batches under way, the oldest first."""

    def __init__(
        self,
        split: Encoded,
        program: bytes,
        orders: Iterator[Order],
        size: int,
        shape: tuple[int, int, int],
        on_failure: OnFailure,
        workers: int,
        ahead: int,
    ):
        self.split, self.orders, self.on_failure = split, orders, on_failure
        self.batches: collections.deque[_Batch] = collections.deque()
        self.checked = np.zeros(len(split), bool)  # images are searched for damage once, not in every epoch
        self.chunk = min(CHUNK, max(SMALLEST_CHUNK, (ahead + 1) * size // (2 * workers)))
        self.slots = Slots(ahead + 1, size, shape)
        self.pool = Pool(workers, self.slots, program, self._settle)

    def next(self) -> dict[str, np.ndarray] | None:
        """The next batch; None after the last."""
        self._plan()
        if not self.batches:
            return None
        while self.batches[0].left:
            self.pool.receive()
        batch = self._take()
        self._plan()  # the workers go on while the caller is busy with this batch
        return batch

    def _plan(self) -> None:
        """Gives each free slot to a batch, and its tasks to the pool."""
        while self.slots.free and (order := next(self.orders, None)) is not None:
            wanted = np.flatnonzero(order.mask)
            batch = _Batch(
                order,
                slot=self.slots.free.popleft(),
                labels=np.zeros(len(order.mask), np.int32),
                mask=order.mask.astype(np.float32),
                left=len(wanted),
            )
            self.batches.append(batch)
            self.slots.rows(batch.slot)[order.mask == 0] = 0
            for start in range(0, len(wanted), self.chunk):
                self.pool.pending.append(self._task(batch, wanted[start : start + self.chunk]))
        self.pool.assign()

    def _task(self, batch: _Batch, places: np.ndarray) -> Task:
        """The task of decoding the examples at these places of a batch, which are neighbours: padding is at its end."""
        indices, positions = batch.order.indices[places].tolist(), batch.order.positions[places].tolist()
        examples = [
            (self.split.reference(index), position, bool(self.checked[index]))
            for index, position in zip(indices, positions, strict=True)
        ]
        start = int(places[0])
        return Task(batch, start, batch.slot * self.slots.size + start, examples)

    def _settle(self, task: Task, labels: np.ndarray, failures: list[Failure]) -> None:
        batch, places = task.batch, slice(task.start, task.start + len(labels))
        batch.labels[places] = labels
        batch.left -= len(labels)
        indices = batch.order.indices[places]
        self.checked[indices] = True
        for i, cause, detail in failures:
            batch.mask[task.start + i] = batch.labels[task.start + i] = 0
            self.slots.rows(batch.slot)[task.start + i] = 0
            self.checked[indices[i]] = False
            self.on_failure(int(indices[i]), cause, detail)

    def _take(self) -> dict[str, np.ndarray]:
        batch = self.batches.popleft()
        image = self.slots.rows(batch.slot).copy()  # the slot is used again
        self.slots.free.append(batch.slot)
        return {"image": image, "label": batch.labels, "mask": batch.mask}

    def close(self) -> None:
        self.pool.close()
        self.slots.close()
