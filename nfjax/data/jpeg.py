"""Decodes a part of a JPEG image with libjpeg-turbo 3, where that library is at hand.

What lies outside the wanted rows and columns is not transformed, upsampled or converted, and the rows below them are
not read at all where the file is known to be whole. `pip install "nfjax[turbo]"` brings the library; a system's own
libturbojpeg of version 3 serves too. Without it `nfjax.data.decode` decodes whole images with simplejpeg: the same
pixels, in a fifth more time.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata

import numpy as np


class _Region(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_int), ("width", ctypes.c_int), ("height", ctypes.c_int)]


class _Factor(ctypes.Structure):
    _fields_ = [("numerator", ctypes.c_int), ("denominator", ctypes.c_int)]


# Of turbojpeg.h, version 3.
_DECOMPRESS, _RGB = 1, 0
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT, _COLORSPACE, _SCAN_LIMIT = 0, 4, 5, 6, 8, 13
_BLOCK_WIDTHS = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # pixels, by chroma subsampling: 4:4:4, 4:2:2, 4:2:0, …
_YCBCR, _GRAY = 1, 2
_MAX_SCANS = 100  # a progressive file of thousands of scans costs minutes


@functools.cache
def library() -> ctypes.CDLL | None:
    """libturbojpeg of version 3 or newer, from the turbojpeg package or from the system; None if there is none."""
    for path in _candidates():
        try:
            found = ctypes.CDLL(path)
            found.tj3Init.restype = ctypes.c_void_p
        except (OSError, AttributeError):  # not to be loaded, or of version 2
            continue
        handle, data = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        found.tj3DecompressHeader.argtypes = data
        found.tj3Get.argtypes = [handle, ctypes.c_int]
        found.tj3Set.argtypes = [handle, ctypes.c_int, ctypes.c_int]
        found.tj3SetScalingFactor.argtypes = [handle, _Factor]
        found.tj3SetCroppingRegion.argtypes = [handle, _Region]
        found.tj3Decompress8.argtypes = [*data, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        found.tj3GetErrorStr.argtypes, found.tj3GetErrorStr.restype = [handle], ctypes.c_char_p
        found.tj3Destroy.argtypes, found.tj3Destroy.restype = [handle], None
        return found
    return None


def _candidates() -> list[str]:
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = [str(file.locate()) for file in files if file.name.startswith("libturbojpeg")]
    system = ctypes.util.find_library("turbojpeg")
    return packaged + ([system] if system else [])


class RegionDecoder:
    """Decodes regions of JPEG images; for one thread at a time. Raises RuntimeError where there is no `library`."""

    def __init__(self) -> None:
        self._library = library()
        if self._library is None:
            raise RuntimeError('no libturbojpeg of version 3 was found; pip install "nfjax[turbo]" brings one')
        self._handle = self._library.tj3Init(_DECOMPRESS)
        self._library.tj3Set(self._handle, _STOP_ON_WARNING, 1)
        self._library.tj3Set(self._handle, _SCAN_LIMIT, _MAX_SCANS)
        self._buffer = np.empty(1 << 20, np.uint8)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.tj3Destroy(self._handle)

    def __call__(
        self, data: bytes, top: int, left: int, height: int, width: int, factor: int, checked: bool
    ) -> np.ndarray | None:
        """RGB uint8 [height, width, 3], a view that the next call overwrites, of the image at 1/factor of its size.

        factor: 1, 2, 4 or 8. checked: the file was decoded to its end before, without complaint: what lies below the
        region is then not read. None for what this library reads otherwise: CMYK, unusual chroma subsampling.
        Raises ValueError for damaged data.
        """
        library, handle = self._library, self._handle
        if library.tj3DecompressHeader(handle, data, len(data)):
            self._fail()
        block = _BLOCK_WIDTHS.get(library.tj3Get(handle, _SUBSAMPLING))
        if block is None or library.tj3Get(handle, _COLORSPACE) not in (_YCBCR, _GRAY):
            return None
        full_width, full_height = library.tj3Get(handle, _WIDTH), library.tj3Get(handle, _HEIGHT)
        # A region begins with a block; one more pixel on either side keeps the chroma between two pixels as it is.
        block = max(1, block // factor)
        start = max(left - 1, 0) // block * block
        span = min(left + width + 1, -(-full_width // factor)) - start
        # Damage garbles the rows behind it, but is noticed only where the data ends, too early or too late.
        rows = height if checked else -(-full_height // factor) - top
        library.tj3SetScalingFactor(handle, _Factor(1, factor))
        if library.tj3SetCroppingRegion(handle, _Region(start, top, span, rows)):
            self._fail()
        size = rows * span * 3
        if self._buffer.size < size:
            self._buffer = np.empty(2 * size, np.uint8)
        if library.tj3Decompress8(handle, data, len(data), self._buffer.ctypes.data, 0, _RGB):
            self._fail()
        return self._buffer[:size].reshape(rows, span, 3)[:height, left - start : left - start + width]

    def _fail(self) -> None:
        raise ValueError(self._library.tj3GetErrorStr(self._handle).decode(errors="replace"))
