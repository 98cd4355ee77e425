"""A split of made-up records for test_stream: importable by the worker processes. Record i is the byte i."""

import dataclasses
import os
import pathlib
import tempfile
import time

import numpy as np

from nfjax.data.decoding.decode import BadImageError


@dataclasses.dataclass(frozen=True)
class Reader:
    """What may go wrong with a record, by its index."""

    missing: frozenset
    bad: frozenset
    deadly: frozenset
    deadly_once: frozenset
    hangs: frozenset
    mark: str

    def __call__(self, index):
        if index in self.missing:
            raise FileNotFoundError(f"record {index}")
        if index in self.bad:
            raise BadImageError("bad record", f"record {index}")
        if index in self.deadly:
            os._exit(9)
        if index in self.hangs:
            time.sleep(60)
        if index in self.deadly_once and not os.path.exists(self.mark):
            pathlib.Path(self.mark).touch()
            os._exit(9)
        return bytes([index]), index % 7


class Split:
    def __init__(self, size, **trouble):
        self.size = size
        mark = tempfile.mktemp(prefix="streamed-")
        names = ("missing", "bad", "deadly", "deadly_once", "hangs")
        self.reader = Reader(*(frozenset(trouble.get(name, ())) for name in names), mark)

    def __len__(self):
        return self.size

    def reference(self, index):
        return index

    def name(self, index):
        return f"record {index}"


def pixels(data, position, checked):
    """The record's byte, and the position in the run."""
    return np.broadcast_to(np.array([data[0], position % 256, 1], np.uint8), (2, 2, 3))


def noted(data, position, checked):
    """The record's byte, and whether it was decoded before without complaint; the byte 9 is always bad."""
    if data[0] == 9:
        raise BadImageError("damaged", "" if not checked else "and yet it counts as checked")
    return np.broadcast_to(np.array([data[0], checked, 1], np.uint8), (2, 2, 3))


def large(data, position, checked):
    return np.full((64, 64, 3), data[0], np.uint8)
