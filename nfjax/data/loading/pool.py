"""Worker processes that read and decode examples, a task at a time; one that dies or hangs is replaced.

A process that ends takes its tasks with it: they are tried again, image by image where it was at work, and an image
that alone ends two processes is given up.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from nfjax.data.loading.slots import Slots
from nfjax.data.loading.worker import READY, Failure

HUNG_AFTER = 120.0  # seconds without an answer to one task


def default_workers() -> int:
    """One process for every core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class WorkersFailedError(RuntimeError):
    """Worker processes die before they decode anything."""


@dataclasses.dataclass
class Task:
    """Some neighbouring examples of a batch.

    Attributes:
        batch: Whose they are; it stays in this process.
        start: The place of the first in the batch.
        row: Where its pixels go in the shared memory.
        examples: (reference, position in the run, whether it was decoded before without complaint) of each.
        deaths: How many processes ended at it.
    """

    batch: Any
    start: int
    row: int
    examples: list[tuple[Any, int, bool]]
    deaths: int = 0

    def singly(self) -> list[Task]:
        """A task of each example."""
        return [Task(self.batch, self.start + i, self.row + i, [one]) for i, one in enumerate(self.examples)]


# Called with a task that is done: its labels int32 [n], and (place in the task, cause, detail) of each failure.
Settle = Callable[[Task, np.ndarray, list[Failure]], None]


class Worker:
    """One process, and the tasks that it was given and has not answered.

    Attributes:
        tasks: Those; the process is at the first.
        since: When it last answered, or was given something to do, in seconds of `time.monotonic`.
        ready: Whether it has started.
    """

    def __init__(self, slots: Slots, program: bytes):
        """Starts it.

        Args:
            slots: The memory that it writes to.
            program: What it does with a task, (reader, transform), pickled: see `worker.serve`.
        """
        ours, theirs = multiprocessing.Pipe()
        # The worker imports from where this process does, and so the same package: -P keeps it from looking in the
        # current folder first, which an empty entry of sys.path stands for.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        memory = slots.file.fileno()
        command = [sys.executable, "-P", "-m", "nfjax.data.loading.worker", str(theirs.fileno()), str(memory)]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), memory), env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.pipe: Connection = ours
        self.tasks: collections.deque[Task] = collections.deque()
        self.since = time.monotonic()
        self.ready = False
        with contextlib.suppress(OSError):  # it has ended already: that is found where its answers are awaited
            self.pipe.send((program, slots.shape))

    def give(self, task: Task) -> None:
        """Sends a task. Raises OSError where the process has ended; the task is then among `tasks` all the same."""
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        self.pipe.send((task.row, task.examples))

    def stop(self, patience: float = 0.0) -> int:
        """Ends it, after `patience` seconds in which it may end by itself; returns its exit status."""
        self.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience)
        self.process.kill()
        return self.process.wait()


class Pool:
    """A fixed number of workers, and the tasks that none of them has yet.

    Attributes:
        pending: Those tasks, the next one first.
    """

    def __init__(self, size: int, slots: Slots, program: bytes, settle: Settle):
        """Starts the workers.

        Args:
            size: How many.
            slots: See `Worker`.
            program: See `Worker`.
            settle: Called with each task that is done.
        """
        self._slots, self._program, self._settle = slots, program, settle
        self.pending: collections.deque[Task] = collections.deque()
        self._false_starts = 0  # in a row
        self._workers = [self._start() for _ in range(size)]

    def _start(self) -> Worker:
        return Worker(self._slots, self._program)

    def assign(self) -> None:
        """Gives out pending tasks: one to every worker, then a second, which keeps it busy until the next call."""
        for depth in (1, 2):
            for i, worker in enumerate(self._workers):
                if self.pending and len(worker.tasks) < depth:
                    try:
                        worker.give(self.pending.popleft())
                    except OSError:
                        self._workers[i] = self._replaced(worker, "ended")

    def receive(self) -> None:
        """Gives out pending tasks, waits a second at most for answers, settles those, and replaces workers that have
        ended or hang.

        Raises:
            WorkersFailedError: They end before they have started, more often than there are workers.
        """
        self.assign()
        ready = wait([worker.pipe for worker in self._workers], timeout=1.0)
        for i, worker in enumerate(self._workers):
            if worker.pipe in ready:
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    self._workers[i] = self._replaced(worker, "ended")
                    continue
                worker.since = time.monotonic()
                if answer is READY:
                    worker.ready, self._false_starts = True, 0
                else:
                    self._settle(worker.tasks.popleft(), *answer)
            elif worker.tasks and time.monotonic() - worker.since > HUNG_AFTER:
                self._workers[i] = self._replaced(worker, f"gave no answer for {HUNG_AFTER:.0f} s")

    def _replaced(self, worker: Worker, reason: str) -> Worker:
        """Another worker, when the tasks of this one are pending again or settled."""
        status = worker.stop(patience=2.0)
        self._false_starts += not worker.ready
        if self._false_starts > len(self._workers) + 2:
            raise WorkersFailedError(
                f"{self._false_starts} worker processes ended before they decoded anything, the last with exit status "
                f"{status}; what they printed stands above. Is there enough memory? Try fewer, such as "
                "--config.data.workers=1"
            )
        tasks = list(worker.tasks)
        if tasks and worker.ready:
            tasks[0].deaths += 1  # the one it was at
        for task in reversed(tasks):
            if task.deaths and len(task.examples) > 1:  # find the image that does it
                self.pending.extendleft(reversed(task.singly()))
            elif task.deaths >= 2:
                detail = f"the process that decoded it {reason}, twice; exit status {status}"
                self._settle(task, np.zeros(1, np.int32), [(0, "ends its decoder", detail)])
            else:
                self.pending.appendleft(task)
        return self._start()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.stop()
