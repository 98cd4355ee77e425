"""From the bytes of an image file to RGB pixels: a whole image, or as much of it as a crop needs.

JPEG is decoded with libjpeg-turbo, everything else with Pillow, of the formats in `formats.FORMATS`; what libjpeg-turbo
is not asked for here, such as CMYK or an unusual chroma subsampling, goes to Pillow too. What is not 8-bit RGB becomes
it: grey, palette and CMYK images are converted, transparency is dropped, of 16-bit channels the high byte is kept, of
an animation the first frame. The number of pixels is checked before anything is decoded.

The orientation that EXIF notes is ignored, as in Pillow and torchvision, unless it is asked for: see `header`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from nfjax.data.decoding import formats, jpeg, markers

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
# Raise it when other files count as damaged than before, or their pixels change: what was decoded by another rule and
# kept is not used again.
RULE = 2
MAX_BYTES = 256 * 2**20  # of a file
MAX_PIXELS = 100_000_000  # of an image; ImageNet's largest has 61 million
REDUCTIONS = (8, 4, 2, 1)
_START, _END = markers.START, b"\xff\xd9"
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
# What makes an image upright, by EXIF's number: whether rows become columns first, then rows or columns are reversed.
_TURNS = {
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip
_NOTED = (b"Exif", b"EXIF", b"eXIf", b"exif", b"Orientation")  # nothing is noted where none of them stands


class BadImageError(ValueError):
    """No image that can be used.

    Attributes:
        cause: A few words by which such files are counted.
    """

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


def decode(data: bytes) -> np.ndarray:
    """All pixels of an image file, RGB uint8 [H, W, 3].

    Raises:
        BadImageError: It is no image, or a damaged one.
    """
    height, width = size(data)
    return region(data, (0, 0, height, width), 1)


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known of an image before it is decoded.

    Attributes:
        height: In pixels.
        width: In pixels.
        reductions: At which parts of its size it can be decoded, such as (8, 4, 2, 1).
        orientation: 1 to 8 as EXIF counts; not 1 where height and width are those of the upright image.
    """

    height: int
    width: int
    reductions: tuple[int, ...] = (1,)
    orientation: int = 1


def header(data: bytes, upright: bool = False) -> Header:
    """What is known before anything is decoded.

    Args:
        data: The bytes of an image file.
        upright: Whether the image is to be turned and mirrored as EXIF says, as `PIL.ImageOps.exif_transpose` does.

    Raises:
        BadImageError: It is no image, or has too many pixels.
    """
    height, width = size(data)
    reductions = REDUCTIONS if data.startswith(_START) else (1,)
    orientation = _orientation(data) if upright else 1
    swap, reverse_rows, reverse_columns = _TURNS[orientation]
    if swap:
        height, width = width, height
    # Reversed, a block of pixels that become one begins elsewhere, unless the blocks fill the image.
    reversed_sides = [side for side, is_ in ((height, reverse_rows), (width, reverse_columns)) if is_]
    reductions = tuple(n for n in reductions if all(side % n == 0 for side in reversed_sides))
    return Header(height, width, reductions, orientation)


def size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header; otherwise as `header`."""
    if not data:
        raise BadImageError("empty file")
    if len(data) > MAX_BYTES:
        raise BadImageError("too large", f"{len(data)} bytes, at most {MAX_BYTES} are read")
    if data.startswith(_START):
        try:
            frame = markers.frame(data)
        except ValueError as error:
            cause = "damaged JPEG" if _END in data[-1024:] else "truncated JPEG"
            raise BadImageError(cause, str(error)) from error
        height, width = frame.height, frame.width
    else:
        with _opened(data) as image:
            width, height = image.size
    if height * width > MAX_PIXELS:
        raise BadImageError("too many pixels", f"{width}x{height}, at most {MAX_PIXELS} are decoded")
    if not height * width:
        raise BadImageError("no pixels", f"{width}x{height}")
    return height, width


def region(
    data: bytes, box: tuple[int, int, int, int], factor: int, checked: bool = False, orientation: int = 1
) -> np.ndarray:
    """The pixels in a box of an image. Call `size` or `header` before, which check what must be checked first.

    Args:
        data: The bytes of an image file.
        box: (top, left, height, width), within the image, every number a multiple of `factor`, except at the image's
            lower and right borders.
        factor: One of `Header.reductions`, at which a JPEG is decoded (a discrete cosine transform gives an image of
            half, a quarter or an eighth of the size at less than its full cost); 1 for other formats.
        checked: Whether this file was decoded before without complaint; it is not searched for damage again.
        orientation: Of `header`; the box is one of the upright image.

    Returns:
        RGB uint8 [height / factor, width / factor, 3], valid until the next call in this thread.

    Raises:
        BadImageError: The file is damaged.
    """
    if orientation != 1:
        return _turned(data, box, factor, checked, orientation)
    top, left, height, width = box[0] // factor, box[1] // factor, -(-box[2] // factor), -(-box[3] // factor)
    if not data.startswith(_START):
        if factor != 1:
            raise ValueError(f"factor={factor}: only a JPEG can be decoded at a reduced size")
        return _with_pillow(data)[top : top + height, left : left + width]
    if not checked:
        # A file that was cut short may hold the rows of this crop and not those of the next: it is bad for all of them.
        if _END not in data[-1024:] and not markers.has_end(data):
            raise BadImageError("truncated JPEG")
        if markers.has_too_many_scans(data):
            raise BadImageError("too many scans", f"more than {markers.MAX_SCANS}")
    decoder = _region_decoder() or _WHOLE
    try:
        if not markers.frame(data).common:
            raise jpeg.UnknownFormError("lossless, or of more than 8 bits")
        return _mended(data, lambda data: decoder(data, top, left, height, width, factor, checked))
    except jpeg.UnknownFormError as error:
        whole = _with_pillow_from_jpeg(data, decoder, checked, error)
    if factor != 1:
        rows, columns = (range(0, n, factor) for n in whole.shape[:2])
        sums = np.add.reduceat(np.add.reduceat(whole, rows, 0, dtype=np.uint32), columns, 1, dtype=np.uint32)
        counts = np.outer(*(np.minimum(factor, n - np.arange(0, n, factor)) for n in whole.shape[:2]))[..., None]
        whole = ((sums + counts // 2) // counts).astype(np.uint8)
    return whole[top : top + height, left : left + width]


def _turned(data: bytes, box: tuple[int, int, int, int], factor: int, checked: bool, orientation: int) -> np.ndarray:
    """`region` of an image that is not stored upright: that box of what is stored, turned."""
    swap, reverse_rows, reverse_columns = _TURNS[orientation]
    stored = size(data)
    (full_height, full_width), (top, left, height, width) = stored[::-1] if swap else stored, box
    top = full_height - top - height if reverse_rows else top
    left = full_width - left - width if reverse_columns else left
    pixels = region(data, (left, top, width, height) if swap else (top, left, height, width), factor, checked)
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    return np.ascontiguousarray(pixels[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1])


def _mended(data: bytes, decode: Callable[[bytes], T]) -> T:
    """decode(data), or of the same image in a file without oddities where that is what it warns of.

    Raises BadImageError for damage, and UnknownFormError.
    """
    for _ in range(3):  # of several oddities, libjpeg names the first
        try:
            return decode(data)
        except jpeg.DamagedError as error:
            mended, complaint = markers.mended(data, str(error)), error
        if mended in (None, data):
            break
        data = mended
    raise BadImageError("damaged JPEG", str(complaint)) from complaint


def _with_pillow_from_jpeg(
    data: bytes, decoder: jpeg.RegionDecoder | jpeg.WholeDecoder, checked: bool, reason: Exception
) -> np.ndarray:
    """Pillow's pixels of a JPEG that is not decoded otherwise, because of `reason`; Pillow passes over damage."""
    if not checked and markers.frame(data).common:
        with contextlib.suppress(jpeg.UnknownFormError):  # of these nobody says whether they are whole
            _mended(data, decoder.check)
    try:
        return _with_pillow(data)
    except BadImageError as error:
        cause = "damaged JPEG" if markers.frame(data).usual else "unknown kind of JPEG"
        raise BadImageError(cause, f"{reason}; Pillow: {error}") from error


_WHOLE = jpeg.WholeDecoder()
_local = threading.local()  # a decoder has a buffer, which no two threads may share


def _region_decoder() -> jpeg.RegionDecoder | None:
    if not hasattr(_local, "decoder"):
        _local.decoder = jpeg.RegionDecoder() if jpeg.library() is not None else None
    return _local.decoder


def _orientation(data: bytes) -> int:
    """EXIF's number of how an image is stored, 1 for upright. Pillow turns a TIFF by itself, always."""
    if not any(word in data for word in _NOTED):
        return 1
    from PIL import ExifTags

    try:
        with _opened(data) as image, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            noted = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what is wrong with it is found when it is decoded
        return 1
    return noted if noted in _TURNS else 1


def with_orientation(data: bytes, orientation: int) -> bytes:
    """A JPEG with its orientation noted.

    Args:
        data: The bytes of a JPEG that has no EXIF data.
        orientation: 1 to 8 as EXIF counts; 1, upright, needs no note.
    """
    if orientation == 1:
        return data
    from PIL import ExifTags, Image

    noted = Image.Exif()
    noted[ExifTags.Base.Orientation] = orientation
    segment = noted.tobytes()
    return data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment + data[2:]


def _opened(data: bytes):
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about size comes before our limit
            return Image.open(io.BytesIO(data), formats=formats.for_pillow())
    except Image.DecompressionBombError as error:
        raise BadImageError("too many pixels", str(error)) from error
    except Exception as error:  # decoders raise nearly anything on corrupt bytes
        raise BadImageError("no image", f"of a format that is read: {', '.join(formats.FORMATS)}") from error


def _with_pillow(data: bytes) -> np.ndarray:
    with _opened(data) as image:
        return rgb(image)


def rgb(image: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image.

    Args:
        image: Of any mode; it may be one that is still to be decoded.

    Returns:
        RGB uint8 [H, W, 3].

    Raises:
        BadImageError: It has too many pixels, it cannot be decoded, or its mode does not say what is white.
    """
    from PIL import Image

    if image.width * image.height > MAX_PIXELS:
        raise BadImageError("too many pixels", f"{image.width}x{image.height}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if image.mode in _DEEP or (image.mode == "I" and image.format == "PPM"):  # the latter from 0 to 65 535 too
                image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            elif image.mode[0] in "IF":
                raise BadImageError("unknown range of values", f"pixels of mode {image.mode}")
            return np.asarray(image.convert("RGB"))
        except BadImageError:
            raise
        except Exception as error:
            raise BadImageError("damaged image", f"{type(error).__name__}: {error}") from error
