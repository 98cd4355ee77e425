"""From the bytes of an image file to RGB pixels: a whole image, or as much of it as a crop needs.

JPEG is decoded with libjpeg-turbo, everything else with Pillow. What is not 8-bit RGB becomes it: grey, palette and
CMYK images are converted, transparency is dropped, of 16-bit channels the high byte is kept, of an animation the first
frame. The number of pixels is checked before anything is decoded.
"""

from __future__ import annotations

import io
import threading
import warnings

import numpy as np

from nfjax.data import jpeg

MAX_BYTES = 256 * 2**20  # of a file
MAX_PIXELS = 100_000_000  # of an image; ImageNet's largest has 61 million
_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")


class BadImageError(ValueError):
    """No image that can be used. cause: a few words by which such files are counted."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


def decode(data: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3]. Raises BadImageError."""
    height, width = size(data)
    return region(data, (0, 0, height, width), 1)


def size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header. Raises BadImageError for no image, or one of too many pixels."""
    if not data:
        raise BadImageError("empty file")
    if len(data) > MAX_BYTES:
        raise BadImageError("too large", f"{len(data)} bytes, at most {MAX_BYTES} are read")
    if data.startswith(_START):
        import simplejpeg

        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except (ValueError, KeyError) as error:  # the latter for a header that ends before it names its colours
            cause = "damaged JPEG" if _END in data[-1024:] else "truncated JPEG"
            raise BadImageError(cause, str(error)) from error
    else:
        with _opened(data) as image:
            width, height = image.size
    if height * width > MAX_PIXELS:
        raise BadImageError("too many pixels", f"{width}x{height}, at most {MAX_PIXELS} are decoded")
    if not height * width:
        raise BadImageError("no pixels", f"{width}x{height}")
    return height, width


def region(data: bytes, box: tuple[int, int, int, int], factor: int, checked: bool = False) -> np.ndarray:
    """The pixels in a box of an image, RGB uint8 [height / factor, width / factor, 3]; valid until the next call in
    this thread.

    box: (top, left, height, width), within the image, every number a multiple of `factor`, except at the image's lower
    and right borders. factor: 1, 2, 4 or 8, the reduction at which a JPEG is decoded (a discrete cosine transform gives
    an image of half, a quarter or an eighth of the size at less than its full cost); 1 for other formats.

    checked: this file was decoded before without complaint, and is not searched for damage again.

    Call `size` before, which checks what must be checked first. Raises BadImageError.
    """
    top, left, height, width = box[0] // factor, box[1] // factor, -(-box[2] // factor), -(-box[3] // factor)
    if not data.startswith(_START):
        if factor != 1:
            raise ValueError(f"factor={factor}: only a JPEG can be decoded at a reduced size")
        return _with_pillow(data)[top : top + height, left : left + width]
    # A file that was cut short may hold the rows of this crop and not those of the next: it is bad for all of them.
    if not checked and _END not in data[-1024:] and not _complete(data):
        raise BadImageError("truncated JPEG")
    import simplejpeg

    decoder = _region_decoder()
    try:
        if decoder is not None:
            pixels = decoder(data, top, left, height, width, factor, checked)
            if pixels is not None:
                return pixels
        elif simplejpeg.decode_jpeg_header(data, strict=False)[2] in ("YCbCr", "Gray"):
            pixels = _with_simplejpeg(data, factor)
            return pixels[top : top + height, left : left + width]
    except ValueError as error:
        raise BadImageError("damaged JPEG", str(error)) from error
    whole = _with_pillow(data)
    if factor != 1:
        rows, columns = (range(0, n, factor) for n in whole.shape[:2])
        sums = np.add.reduceat(np.add.reduceat(whole, rows, 0, dtype=np.uint32), columns, 1, dtype=np.uint32)
        counts = np.outer(*(np.minimum(factor, n - np.arange(0, n, factor)) for n in whole.shape[:2]))[..., None]
        whole = ((sums + counts // 2) // counts).astype(np.uint8)
    return whole[top : top + height, left : left + width]


def is_jpeg(data: bytes) -> bool:
    """Whether `region` can decode it at a reduced size."""
    return data.startswith(_START)


_local = threading.local()  # a decoder has a buffer, which no two threads may share


def _region_decoder() -> jpeg.RegionDecoder | None:
    if not hasattr(_local, "decoder"):
        _local.decoder = jpeg.RegionDecoder() if jpeg.library() is not None else None
    return _local.decoder


def _with_simplejpeg(data: bytes, factor: int) -> np.ndarray:
    import simplejpeg

    if factor == 1:
        return simplejpeg.decode_jpeg(data, "RGB")
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    smallest = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
    return simplejpeg.decode_jpeg(data, "RGB", **smallest, min_factor=factor)


def _complete(data: bytes) -> bool:
    """Whether a JPEG with something behind its end can be decoded whole."""
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, "GRAY")
    except (ValueError, KeyError):
        return False
    return True


def _opened(data: bytes):
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about size comes before our limit
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadImageError("too many pixels", str(error)) from error
    except Exception as error:  # decoders raise nearly anything on corrupt bytes
        raise BadImageError("no image", "of a format that Pillow reads") from error


def _with_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    with _opened(data) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if image.width * image.height > MAX_PIXELS:
            raise BadImageError("too many pixels", f"{image.width}x{image.height}")
        try:
            if image.mode in _DEEP:
                image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            elif image.mode[0] in "IF":
                raise BadImageError("unknown range of values", f"pixels of mode {image.mode}")
            return np.asarray(image.convert("RGB"))
        except BadImageError:
            raise
        except Exception as error:
            raise BadImageError("damaged image", f"{type(error).__name__}: {error}") from error
