"""How the commands end: with which code, and what Ctrl-C and SIGTERM do before and after a run heeds them itself."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nfjax import _streams as streams

if TYPE_CHECKING:
    import jax

INTERRUPTED = 130  # as shells report Ctrl-C
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the scripts in launch/ start the same command again
PATIENCE = 0.5  # seconds in which the main thread usually comes to a signal
_heard = -math.inf  # when it last did
_ENDS = {
    signal.SIGINT: (INTERRUPTED, "interrupted"),
    signal.SIGTERM: (START_AGAIN, "stopped by SIGTERM"),
}


def begin(*numbers: signal.Signals) -> None:
    """What a command does first, before it imports anything that takes long: prints and signals are in good hands."""
    streams.harden()
    heed(*numbers)


def heed(*numbers: signal.Signals) -> None:
    """From here on Ctrl-C and SIGTERM (or the `numbers` given) end the process at once: one line on stderr, no
    traceback, and the code of the signal.

    Nothing is lost: what a run saves while it starts is written in full or not at all, and once there is something to
    save, `preemption.Interrupts` heeds the signals in place of this.
    """
    # Python runs handlers between two instructions of the main thread, which may be minutes away inside of a compiler
    # or a connection. So a second thread hears of signals as well.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading,), daemon=True, name="signals").start()
    for number in numbers or _ENDS:
        signal.signal(number, end)


def end(number: int, frame: Any = None) -> None:
    """Ends the process as `heed` says; a signal handler."""
    code, what = _ENDS[signal.Signals(number)]
    at_once(code, f"nfjax: {what}: start the same command again")


def heard() -> None:
    """To be called by any other handler of Ctrl-C or SIGTERM: the signal has come to where it is heeded."""
    global _heard
    _heard = time.monotonic()


def at_once(code: int, message: str = "") -> None:
    """Ends the process from any thread, without waiting for the others, after what was printed is out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or in the middle of a line that this one interrupts
            stream.flush()
    if message:
        with contextlib.suppress(OSError):
            os.write(2, f"{message}\n".encode("utf-8", "backslashreplace"))
    os._exit(code)


def _listen(pipe: int) -> None:
    while numbers := os.read(pipe, 64):
        since = time.monotonic() - PATIENCE
        time.sleep(PATIENCE)
        for number in numbers:
            # Another handler, of a run that saves, takes the time it needs, and may have given way to this one since.
            if number in _ENDS and signal.getsignal(number) is end and _heard < since:
                end(number)


class TrainingInterruptedError(RuntimeError):
    """Ctrl-C: the run was saved and can go on."""


class TrainingPreemptedError(TrainingInterruptedError):
    """SIGTERM, here or in another process of the run: it was saved and should be started again."""


class PeerLostError(TrainingPreemptedError):
    """Another process of the run has ended: what was saved is whole, and the run should be started again."""


class Interrupts(contextlib.AbstractContextManager):
    """Within it, the first Ctrl-C or SIGTERM sets `pending`, the signal; a second one does what it did before.

    late: only from the call of `heed` on, when there is something to save.

    SIGTERM is what SLURM, Kubernetes and a TPU's maintenance send before they take the machine away. Python lets only
    the main thread handle signals: in any other there are none to hear of.
    """

    def __init__(self, late: bool = False) -> None:
        self.pending: signal.Signals | None = None
        self._late = late
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if not self._late:
            self.heed()
        return self

    def heed(self) -> None:
        """From here on, until the end of the `with`, signals are heard of."""
        if self._before or self.pending or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:  # None: a program around this one has its own, not in Python
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        heard()
        self.pending = signal.Signals(number)
        for known, handler in self._before.items():
            signal.signal(known, handler)
        name = "Ctrl-C" if number == signal.SIGINT else self.pending.name
        print(f"{name}: finishing this step and saving; once more to stop at once", file=streams.err(), flush=True)


def interruption(interrupts: Interrupts, step: int, total: int, where: str) -> TrainingInterruptedError:
    """Why a run stopped at this step of so many, and how it goes on. where: its workdir."""
    kind, reason = TrainingPreemptedError, "stopped together with another process"
    if interrupts.pending == signal.SIGINT:
        kind, reason = TrainingInterruptedError, "interrupted"
    elif interrupts.pending:
        reason = "stopped by SIGTERM"
    return kind(f"{reason}: saved at step {step:,} of {total:,} in {where}; the same command goes on from there")


class Votes:
    """Whether any process wants to stop, known to all of them at the same step.

    A signal reaches the processes of a run at different moments, and not all of them. So beside every dispatch the
    processes add up how many of them want to stop, and all look at the same sum.
    """

    def __init__(self, mesh: jax.sharding.Mesh, wants_to_stop: Callable[[], bool]):
        import jax  # here: a command heeds signals before it imports what takes long

        self._wants_to_stop, self._alone = wants_to_stop, jax.process_count() == 1
        self._here, self._everywhere = jax.local_device_count(), jax.device_count()
        self._divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        self._count = jax.jit(
            lambda votes: votes.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        )

    def cast(self) -> jax.Array | None:
        """The number of devices whose process wants to stop, to be known once all have cast; None where there is only
        this process.
        """
        if self._alone:
            return None
        import jax
        import numpy as np

        votes = np.full(self._here, self._wants_to_stop(), np.int32)
        return self._count(jax.make_array_from_process_local_data(self._divided, votes, (self._everywhere,)))

    def stop(self, cast: jax.Array | None) -> bool:
        """Whether to stop. cast: what `cast` gave beside a dispatch that is done, None before the first one."""
        if self._alone:
            return self._wants_to_stop()
        return cast is not None and int(cast) > 0
