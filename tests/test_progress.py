"""The progress bar on a terminal of 80 columns: how wide it is, and that nothing is printed into it."""

import contextlib
import fcntl
import logging as standard_logging
import os
import pty
import struct
import sys
import termios
import threading
import warnings

import pytest
from absl import logging

from nfjax.runs.progress import Bar, say

VALUES = {"epoch": 123.4, "loss": 2.3026, "accuracy": 0.1, "data_wait": 0.12}


@contextlib.contextmanager
def terminal(monkeypatch, columns):
    """sys.stdout and sys.stderr are a terminal; yields a list that has, behind the block, all that was written."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    attributes = termios.tcgetattr(inner)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(inner, termios.TCSANOW, attributes)
    written = []

    def read():
        with contextlib.suppress(OSError):  # what Linux says at the end
            while part := os.read(outer, 4096):
                written.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(os.dup(inner), "w") as other, os.fdopen(inner, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", other)  # as in a program: two streams to one terminal
        monkeypatch.setattr(sys, "stderr", stream)
        handler = logging.get_absl_handler()
        monkeypatch.setattr(handler.python_handler, "stream", stream)
        monkeypatch.setattr(standard_logging.getLogger(), "handlers", [handler])  # as in a program, not as in pytest
        yield written
    reader.join()
    os.close(outer)


@pytest.mark.parametrize("columns", [80, 0])
def test_the_bar_fits_80_columns_and_nothing_is_printed_into_it(monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    with terminal(monkeypatch, columns) as written:
        with Bar(first=0, total=78_125, batch_size=128, epochs=200) as bar, warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *rest, **more: print(message, file=sys.stderr)
            bar.tqdm.start_t -= 20  # of 78 125 steps 50 are done: some nine hours are left
            bar.advance(50)
            bar.settle()
            bar.rate = 12_345.6
            bar.show(VALUES)
            bar.tqdm.refresh()
            say("memory  0.12 GiB")
            logging.warning("a file is damaged")
            warnings.warn("a warning", stacklevel=1)
            sys.stderr.write("two pieces ")
            sys.stderr.write("of a line\n")
            bar.tqdm.refresh()
        assert sys.stderr.isatty()
        say("done")
    text = b"".join(written).decode()
    drawn = [part for part in text.replace("\n", "\r").split("\r") if "|" in part]
    assert len(drawn) >= 3
    assert all(len(part) <= 80 for part in drawn)
    for part in ("epoch 124/200", "left, loss 2.303 acc 10.0% 12,346 img/s wait 12%"):
        assert part in drawn[-1]
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    for line in ("memory  0.12 GiB", "a warning", "two pieces of a line", "done"):
        assert line in lines
    assert any(line.endswith("a file is damaged") and "|" not in line for line in lines)
