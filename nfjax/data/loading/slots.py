"""Memory that worker processes write pixels to and this process reads them from, in slots of one batch each."""

from __future__ import annotations

import collections
import math
import mmap
import os
import pathlib
import tempfile
from typing import Any

import numpy as np


class Slots:
    """Rows of pixels in memory that other processes can map.

    Attributes:
        file: Of the memory; its descriptor is what another process needs.
        shape: (number of slots * rows of each, height, width, channels) of all of it, uint8.
        free: The numbers of the slots that are not in use.
    """

    def __init__(self, count: int, size: int, shape: tuple[int, int, int]):
        """Takes the memory.

        Args:
            count: How many slots.
            size: Rows of each, the images of a batch.
            shape: Of a row, (height, width, channels).
        """
        self.size, self.shape = size, (count * size, *shape)
        total = math.prod(self.shape)
        self.file = _anonymous_file(max(1, total))
        self._mapped = mmap.mmap(self.file.fileno(), max(1, total))
        self._rows = np.frombuffer(self._mapped, np.uint8, total).reshape(self.shape)
        self.free = collections.deque(range(count))

    def rows(self, slot: int) -> np.ndarray:
        """The memory of a slot, uint8 [size, H, W, C]: no copy."""
        return self._rows[slot * self.size : (slot + 1) * self.size]

    def close(self) -> None:
        """Gives the memory back; nobody may hold any of its rows."""
        del self._rows
        self._mapped.close()
        self.file.close()


def _anonymous_file(size: int) -> Any:
    """A file in memory without a name: nothing is left behind however this process ends."""
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("nfjax", os.MFD_CLOEXEC), "r+b")
    else:
        shared = pathlib.Path("/dev/shm")
        file = tempfile.TemporaryFile(dir=shared if shared.is_dir() else None)  # noqa: SIM115 (closed by Slots)
    file.truncate(size)
    return file
