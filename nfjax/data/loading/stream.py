"""Batches of a split that does not fit in memory, decoded ahead of their use by worker processes.

A batch is described by an `Order`; which worker decodes which part of it changes nothing in what comes out, nor in what
order. A worker that dies or hangs is replaced and its images are tried again, one by one; an image that alone ends
two workers is skipped like one that cannot be decoded.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from nfjax.data.loading.order import Order
from nfjax.data.loading.worker import READY
from nfjax.data.splits import Encoded

# Images a task: long enough to hide the pipe, short enough that a batch does not wait for one worker.
CHUNK, SMALLEST_CHUNK = 16, 4
HUNG_AFTER = 120.0  # seconds without an answer to one task
# (the bytes of an image, position in the run, whether it was decoded before without complaint) -> uint8 [H, W, 3]
Transform = Callable[[bytes, int, bool], np.ndarray]


def default_workers() -> int:
    """One process for every core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def default_ahead(workers: int, batch: int) -> int:
    """Batches decoded ahead: two at least, and enough that each of many workers has two small tasks."""
    return max(2, -(-2 * workers * SMALLEST_CHUNK // batch) - 1)


class WorkersFailedError(RuntimeError):
    """Worker processes die before they decode anything."""


@dataclasses.dataclass
class _Task:
    batch: int  # number of its batch
    start: int  # of its examples in the batch
    first: int  # row of the shared memory
    examples: list[tuple[Any, int, bool]]  # (reference, position, checked)
    deaths: int = 0


@dataclasses.dataclass
class _Batch:
    order: Order
    slot: int
    labels: np.ndarray
    mask: np.ndarray
    left: int  # examples not yet decoded


class _Worker:
    def __init__(self, memory: int, greeting: Any):
        ours, theirs = multiprocessing.Pipe()
        # This process may have been started with a changed sys.path: the worker imports the same package.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "nfjax.data.loading.worker", str(theirs.fileno()), str(memory)]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), memory), env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.pipe: Connection = ours
        self.tasks: collections.deque[_Task] = collections.deque()
        self.since = time.monotonic()
        self.ready = False
        with contextlib.suppress(OSError):  # it has ended already: that is found where its answers are awaited
            self.pipe.send(greeting)

    def give(self, task: _Task) -> None:
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        self.pipe.send((task.first, task.examples))

    def stop(self, patience: float = 0.0) -> int:
        """Ends it, after `patience` seconds in which it may end by itself; returns its exit status."""
        self.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience)
        self.process.kill()
        return self.process.wait()


def stream(
    split: Encoded,
    transform: Transform,
    shape: tuple[int, int, int],
    orders: Iterator[Order],
    on_failure: Callable[[int, str, str], None],
    workers: int | None = None,
    ahead: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `orders`, in order: {"image" uint8 [B, *shape], "label" int32 [B], "mask" float32 [B]}.

    shape: of what the transform returns. on_failure(index, cause, detail) is called for each example that could not be
    read; its image is black and its mask 0: no other image takes its place. workers: processes, by default one for
    every core. ahead: batches that are decoded before they are asked for, which is also the memory that is taken, by
    default `default_ahead`.

    Close the generator to end the workers; they also end when this process does. Raises WorkersFailedError.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1 or (ahead is not None and ahead < 1):
        raise ValueError(f"workers={workers}, ahead={ahead}: expected at least 1 of both")
    for part in (split.reader, transform):
        if "__main__" in (getattr(part, "__module__", None), type(part).__module__):
            raise ValueError(
                f"{part!r} is defined in the script that was started: worker processes cannot import it from there; "
                "move it to a module of its own"
            )
    pump = _Pump(split, transform, shape, orders, on_failure, workers, ahead)
    try:
        while (batch := pump.next()) is not None:
            yield batch
    finally:
        pump.close()


class _Pump:
    def __init__(
        self,
        split: Encoded,
        transform: Transform,
        shape: tuple[int, int, int],
        orders: Iterator[Order],
        on_failure: Callable[[int, str, str], None],
        workers: int,
        ahead: int | None,
    ):
        self.split, self.orders, self.on_failure = split, orders, on_failure
        self.first = next(orders, None)
        self.size = 0 if self.first is None else len(self.first.indices)
        ahead = ahead or default_ahead(workers, max(1, self.size))
        self.chunk = min(CHUNK, max(SMALLEST_CHUNK, (ahead + 1) * self.size // (2 * workers)))
        shape = ((ahead + 1) * self.size, *shape)
        self.file = _anonymous_file(max(1, int(np.prod(shape))))
        self.mapped = mmap.mmap(self.file.fileno(), max(1, int(np.prod(shape))))
        self.rows = np.frombuffer(self.mapped, np.uint8, int(np.prod(shape))).reshape(shape)
        self.greeting = (split.reader, transform, shape)
        self.free = collections.deque(range(ahead + 1))
        self.pending: collections.deque[_Task] = collections.deque()
        self.batches: dict[int, _Batch] = {}
        self.checked = np.zeros(len(split), bool)  # images are searched for damage once, not in every epoch
        self.planned = self.taken = 0
        self.false_starts = 0  # in a row
        self.workers = [self._start() for _ in range(workers if self.size else 0)]

    def _start(self) -> _Worker:
        return _Worker(self.file.fileno(), self.greeting)

    def next(self) -> dict[str, np.ndarray] | None:
        """The next batch; None after the last."""
        while True:
            self._plan()
            self._assign()
            batch = self.batches.get(self.taken)
            if batch is None:
                return None
            if not batch.left:
                return self._take(batch)
            self._receive()

    def _plan(self) -> None:
        while self.free and self.first is not None:
            order, slot, number = self.first, self.free.popleft(), self.planned
            wanted = np.flatnonzero(order.mask)
            self.batches[number] = _Batch(
                order, slot, np.zeros(self.size, np.int32), order.mask.astype(np.float32), len(wanted)
            )
            self.rows[slot * self.size : (slot + 1) * self.size][order.mask == 0] = 0
            for start in range(0, len(wanted), self.chunk):
                places = wanted[start : start + self.chunk]  # consecutive: the padding of a batch is at its end
                indices, positions = order.indices[places].tolist(), order.positions[places].tolist()
                examples = [
                    (self.split.reference(index), position, bool(self.checked[index]))
                    for index, position in zip(indices, positions, strict=True)
                ]
                begin = int(places[0])
                self.pending.append(_Task(number, begin, slot * self.size + begin, examples))
            self.planned += 1
            self.first = next(self.orders, None)

    def _assign(self) -> None:
        for depth in (1, 2):  # every worker gets one task before any gets a second, which keeps it busy meanwhile
            for i, worker in enumerate(self.workers):
                if self.pending and len(worker.tasks) < depth:
                    task = self.pending.popleft()
                    try:
                        worker.give(task)
                    except OSError:
                        self.workers[i] = self._replace(worker, "ended")

    def _receive(self) -> None:
        ready = wait([worker.pipe for worker in self.workers], timeout=1.0)
        for i, worker in enumerate(self.workers):
            if worker.pipe in ready:
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    self.workers[i] = self._replace(worker, "ended")
                    continue
                worker.since = time.monotonic()
                if answer is READY:
                    worker.ready, self.false_starts = True, 0
                    continue
                labels, failures = answer
                task = worker.tasks.popleft()
                self._settle(task, labels, failures)
            elif worker.tasks and time.monotonic() - worker.since > HUNG_AFTER:
                self.workers[i] = self._replace(worker, f"gave no answer for {HUNG_AFTER:.0f} s")

    def _settle(self, task: _Task, labels: np.ndarray, failures: list[tuple[int, str, str]]) -> None:
        batch = self.batches[task.batch]
        batch.labels[task.start : task.start + len(labels)] = labels
        batch.left -= len(labels)
        indices = batch.order.indices[task.start : task.start + len(labels)]
        self.checked[indices] = True
        for i, cause, detail in failures:
            batch.mask[task.start + i] = 0
            batch.labels[task.start + i] = 0
            self.checked[indices[i]] = False
            self.on_failure(int(indices[i]), cause, detail)

    def _replace(self, worker: _Worker, reason: str) -> _Worker:
        status = worker.stop(patience=2.0)
        self.false_starts += not worker.ready
        if self.false_starts > len(self.workers) + 2:
            raise WorkersFailedError(
                f"{self.false_starts} worker processes ended before they decoded anything, the last with exit status "
                f"{status}; is there enough memory? Try fewer, such as --config.data.workers=1"
            )
        tasks = list(worker.tasks)
        if tasks and worker.ready:
            tasks[0].deaths += 1  # the one it was at
        for task in reversed(tasks):
            if task.deaths and len(task.examples) > 1:  # find the image that does it
                self.pending.extendleft(
                    _Task(task.batch, task.start + i, task.first + i, [example])
                    for i, example in reversed(list(enumerate(task.examples)))
                )
            elif task.deaths >= 2:
                self.rows[task.first] = 0
                detail = f"the process that decoded it {reason}, twice; exit status {status}"
                self._settle(task, np.zeros(1, np.int32), [(0, "ends its decoder", detail)])
            else:
                self.pending.appendleft(task)
        return self._start()

    def _take(self, batch: _Batch) -> dict[str, np.ndarray]:
        del self.batches[self.taken]
        self.taken += 1
        image = self.rows[batch.slot * self.size : (batch.slot + 1) * self.size].copy()  # the slot is used again
        self.free.append(batch.slot)
        self._plan()  # the workers go on while the caller is busy with this batch
        self._assign()
        return {"image": image, "label": batch.labels, "mask": batch.mask}

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        del self.rows
        self.mapped.close()
        self.file.close()


def _anonymous_file(size: int) -> Any:
    """Memory that other processes can map: without a name, so nothing is left behind however this process ends."""
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("nfjax", os.MFD_CLOEXEC), "r+b")
    else:
        shared = pathlib.Path("/dev/shm")
        file = tempfile.TemporaryFile(dir=shared if shared.is_dir() else None)  # noqa: SIM115 (closed by the pump)
    file.truncate(size)
    return file
