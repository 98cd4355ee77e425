"""Files of JSON lines that several processes add to, of which a crash can cut the last one short."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
from typing import Any, TypeVar

from absl import logging

from nfjax import storage

T = TypeVar("T")


def read(path: pathlib.Path, expected: type[T], what: str, lost: str) -> list[T]:
    """The entries of a file, none if there is no such file.

    Args:
        path: Of the file.
        expected: The class of an entry.
        what: An entry, for a person: "the record of a run".
        lost: What follows where one is left out: "its run is not known".

    Raises:
        ValueError: A line is no such entry; one cut short by a crash, which can only be the last, is left out, with a
            warning.
    """
    try:
        *lines, last = storage.read_bytes(path, "move it away").split(b"\n")
    except FileNotFoundError:
        return []
    if last and not _is_json(last):
        logging.warning("the last line of %s was cut short; it is left out, and %s", path, lost)
    elif last:  # an editor left it without its end
        lines.append(last)
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(storage.parse_json(line, expected, "it", "remove or mend that line"))
        except storage.DamagedFileError as error:
            raise storage.DamagedFileError(f"{path}, line {number} is not {what} ({error})") from error
    return entries


def append(path: pathlib.Path, entry: Any) -> None:
    """Adds a line, in one piece, also where several processes do; a line that a crash cut short is ended first.

    Args:
        path: Of the file.
        entry: A dataclass.

    Raises:
        OSError: It cannot be written; then nothing of it is.
    """
    with open(path, "a+b", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        before, end, last = stream.read().rpartition(b"\n")
        line = json.dumps(dataclasses.asdict(entry)).encode() + b"\n"
        if _is_json(last):  # an editor left the last line without its end
            before, end, line = before + end + last, b"", b"\n" + line
        whole = len(before + end)
        stream.truncate(whole)
        try:
            if stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(stream.fileno())
        except OSError as error:
            stream.truncate(whole)
            raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
