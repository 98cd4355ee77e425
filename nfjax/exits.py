"""How the commands end: with which code, and what Ctrl-C and SIGTERM do before and after a run heeds them itself."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from typing import Any

from nfjax import streams

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
    save, `progress.Interrupts` heeds the signals in place of this.
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
