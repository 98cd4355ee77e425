"""What is printed never ends a run: a reader that has gone, a full disk, or letters that a terminal does not have."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any


class Sturdy:
    """A text stream that takes everything: letters that its encoding lacks become escapes, and what cannot be written
    is dropped.
    """

    def __init__(self, stream: Any):
        """Wraps a stream; None where there is none, as under pythonw."""
        self._stream = stream
        self._told = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            with self._what_fails_is_dropped():
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError, AttributeError) as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        with self._what_fails_is_dropped():
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (ValueError, AttributeError):  # closed, or none
            return False

    @contextlib.contextmanager
    def _what_fails_is_dropped(self) -> Any:
        try:
            yield
        except (OSError, ValueError, AttributeError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """A reader that has gone has seen enough; anything else is said once, where it can be."""
        gone = isinstance(error, BrokenPipeError) or not isinstance(error, OSError)
        if gone or self._told or error.errno == errno.EBADF:
            return
        self._told = True
        with contextlib.suppress(OSError):
            os.write(2, f"nfjax: what is printed cannot be written ({error.strerror})\n".encode())


def out() -> Sturdy:
    """The standard output of the moment."""
    return sys.stdout if isinstance(sys.stdout, Sturdy) else Sturdy(sys.stdout)


def err() -> Sturdy:
    """The standard error of the moment."""
    return sys.stderr if isinstance(sys.stderr, Sturdy) else Sturdy(sys.stderr)


def printable(text: str) -> str:
    """The text with an escape for what is no character of UTF-8, as in some file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def harden() -> None:
    """Makes the standard streams of this process `Sturdy`; for programs, before anything is opened or printed."""
    # Where one is closed, the next file that is opened would take its number, and what libraries print goes into it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = Sturdy(sys.stdout or open(os.devnull, "w"))  # noqa: SIM115  as long as the process lives
    sys.stderr = Sturdy(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115
