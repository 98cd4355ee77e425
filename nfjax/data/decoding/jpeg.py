"""Decodes a part of a JPEG image with libjpeg-turbo 3, where that library is at hand, and else all of it.

What lies outside the wanted rows and columns is not transformed, upsampled or converted, and the rows below them are
not read at all where the file is known to be whole. `pip install "nfjax[turbo]"` brings the library; a system's own
libturbojpeg of version 3 serves too. Without it whole images are decoded with simplejpeg: the same pixels, in a fifth
more time.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import importlib.metadata
from collections.abc import Iterator

import numpy as np

from nfjax.data.decoding.markers import MAX_SCANS


class _Region(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_int), ("width", ctypes.c_int), ("height", ctypes.c_int)]


class _Factor(ctypes.Structure):
    _fields_ = [("numerator", ctypes.c_int), ("denominator", ctypes.c_int)]


# Of turbojpeg.h, version 3.
_DECOMPRESS, _RGB, _CMYK, _WARNING = 1, 0, 11, 0
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE, _SCAN_LIMIT, _LOSSLESS = (
    0,
    4,
    5,
    6,
    7,
    8,
    13,
    15,
)
_BLOCK_WIDTHS = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # pixels, by chroma subsampling: 4:4:4, 4:2:2, 4:2:0, …
_YCBCR, _GRAY, _CMYK_COLORS, _YCCK = 1, 2, 3, 4


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
        found.tj3GetErrorCode.argtypes = [handle]
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


class DamagedError(ValueError):
    """libjpeg warns of these data: what it makes of them may be anything."""


class UnknownFormError(ValueError):
    """Nothing is known of damage: these data are of a form that is not decoded here."""


class RegionDecoder:
    """Decodes regions of JPEG images; for one thread at a time. Raises RuntimeError where there is no `library`.

    Each image gets a handle of the library of its own, which takes some microseconds: one that was used before goes on
    in the middle of the data that it failed at, and lends its tables to a file that lacks them.
    """

    def __init__(self) -> None:
        self._library = library()
        if self._library is None:
            raise RuntimeError('no libturbojpeg of version 3 was found; pip install "nfjax[turbo]" brings one')
        self._buffer = np.empty(1 << 20, np.uint8)

    def __call__(
        self, data: bytes, top: int, left: int, height: int, width: int, factor: int, checked: bool
    ) -> np.ndarray:
        """The pixels of a region, of the image at 1/factor of its size.

        Args:
            data: A JPEG file.
            top: The first row.
            left: The first column.
            height: Rows.
            width: Columns.
            factor: 1, 2, 4 or 8.
            checked: Whether the file was decoded to its end before, without complaint: what lies below the region is
                then not read.

        Returns:
            RGB uint8 [height, width, 3], a view that the next call overwrites.

        Raises:
            DamagedError: libjpeg warns of these data.
            UnknownFormError: They are to be read otherwise: CMYK, unusual chroma subsampling, what the library does not
                decode.
        """
        with self._opened(data) as handle:
            value = functools.partial(self._library.tj3Get, handle)
            block = _BLOCK_WIDTHS.get(value(_SUBSAMPLING))
            if block is None or value(_COLORSPACE) not in (_YCBCR, _GRAY):
                raise UnknownFormError("of colours or a chroma subsampling that are not decoded by parts")
            # A region begins with a block; one more pixel on either side keeps the chroma between two pixels as it is.
            block = max(1, block // factor)
            start = max(left - 1, 0) // block * block
            span = min(left + width + 1, -(-value(_WIDTH) // factor)) - start
            # Damage garbles the rows behind it, but is noticed only where the data ends, too early or too late.
            rows = height if checked else -(-value(_HEIGHT) // factor) - top
            self._decompress(handle, data, factor, _Region(start, top, span, rows), rows * span * 3, _RGB)
        pixels = self._buffer[: rows * span * 3].reshape(rows, span, 3)
        return pixels[:height, left - start : left - start + width]

    def check(self, data: bytes) -> None:
        """Decodes all of an image of any form to nothing. Raises DamagedError and UnknownFormError as above."""
        with self._opened(data) as handle:
            height, width = (-(-self._library.tj3Get(handle, side) // 8) for side in (_HEIGHT, _WIDTH))
            colors = _CMYK if self._library.tj3Get(handle, _COLORSPACE) in (_CMYK_COLORS, _YCCK) else _RGB
            self._decompress(handle, data, 8, _Region(0, 0, 0, 0), height * width * 4, colors)

    @contextlib.contextmanager
    def _opened(self, data: bytes) -> Iterator[int]:
        """A handle that has read the header of these data."""
        library = self._library
        handle = library.tj3Init(_DECOMPRESS)
        try:
            library.tj3Set(handle, _STOP_ON_WARNING, 1)
            library.tj3Set(handle, _SCAN_LIMIT, MAX_SCANS)
            if library.tj3DecompressHeader(handle, data, len(data)):
                self._fail(handle)
            if library.tj3Get(handle, _LOSSLESS) or library.tj3Get(handle, _PRECISION) != 8:
                raise UnknownFormError("lossless, or of more than 8 bits")  # not to be scaled: too large for the buffer
            yield handle
        finally:
            library.tj3Destroy(handle)

    def _decompress(self, handle: int, data: bytes, factor: int, region: _Region, size: int, colors: int) -> None:
        library = self._library
        if self._buffer.size < size:
            self._buffer = np.empty(2 * size, np.uint8)
        if (
            library.tj3SetScalingFactor(handle, _Factor(1, factor))
            or library.tj3SetCroppingRegion(handle, region)
            or library.tj3Decompress8(handle, data, len(data), self._buffer.ctypes.data, 0, colors)
        ):
            self._fail(handle)

    def _fail(self, handle: int) -> None:
        warned = self._library.tj3GetErrorCode(handle) == _WARNING
        message = self._library.tj3GetErrorStr(handle).decode(errors="replace")
        raise DamagedError(message) if warned else UnknownFormError(message)


class WholeDecoder:
    """The same with simplejpeg, which decodes whole images, with a handle of its own for each."""

    def __call__(
        self, data: bytes, top: int, left: int, height: int, width: int, factor: int, checked: bool
    ) -> np.ndarray:
        """As `RegionDecoder`, but for the time."""
        import simplejpeg

        del checked
        full_height, full_width, colors, _ = self._header(data)
        if colors not in ("YCbCr", "Gray"):
            raise UnknownFormError(f"of the colours {colors}")
        smallest = {"min_height": -(-full_height // factor), "min_width": -(-full_width // factor)}
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", **(smallest if factor > 1 else {}), min_factor=factor)
        except ValueError as error:
            raise DamagedError(str(error)) from error
        return pixels[top : top + height, left : left + width]

    def check(self, data: bytes) -> None:
        """As `RegionDecoder.check`."""
        import simplejpeg

        self._header(data)
        try:
            simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1)
        except ValueError as error:
            raise DamagedError(str(error)) from error

    def _header(self, data: bytes) -> tuple[int, int, str, str]:
        import simplejpeg

        try:
            return simplejpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError) as error:  # the latter for colours that it has no name for
            raise UnknownFormError(str(error)) from error
