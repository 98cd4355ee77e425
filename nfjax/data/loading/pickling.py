"""What crosses to another Python process, which must be able to import it."""

from __future__ import annotations

import io
import pickle
import types
from typing import Any

from absl import logging

LARGE = 256 * 2**20  # bytes, of which every worker process gets a copy


def dumps(value: Any) -> bytes:
    """The value pickled, for a process that does not have the script that was started in this one.

    Args:
        value: Of functions, classes and data.

    Raises:
        ValueError: Something in it cannot be pickled, or is defined where only this process can find it.
    """
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump(value)
    except _OfTheScriptError as error:
        raise ValueError(
            f"{error} is defined in the script that was started: worker processes cannot import it from there; move it "
            "to a module of its own"
        ) from None
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{value!r} cannot be sent to worker processes ({error}): take functions and classes from a module, and "
            "open files where they are first read; or decode in this process, with --config.data.keep=device"
        ) from error
    size = stream.tell()
    if size > LARGE:
        logging.warning(
            "every worker process gets a copy of %.1f GiB of data: what is in memory already is kept there once with "
            "--config.data.keep=device or host",
            size / 2**30,
        )
    return stream.getvalue()


class _OfTheScriptError(Exception):
    """Of something that is defined in __main__."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> None:
        """Looks at everything that is pickled, and leaves it as it is."""
        named = value if isinstance(value, type | types.FunctionType) else type(value)
        if named.__module__ == "__main__":
            raise _OfTheScriptError(repr(value))
