"""Which files are images: by the ending of their name, and where that says nothing by their first bytes."""

from __future__ import annotations

import functools
import os
import re
import stat

# Pillow's names of the formats that are read, and no others: of the rest some start a program (Ghostscript for EPS) or
# open what they find with whatever fits it.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "MPO"),
    *("DIB", "DDS", "ICO", "PCX", "QOI", "SGI", "SUN", "TGA"),
)
# Files of such a name are images, whatever is in them: if they cannot be read, that is damage, and is said. Those of
# the last line are images that are not read here, which is to be said too.
ENDINGS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .apng .gif .bmp .tif .tiff .webp .ppm .pgm .pbm .pnm .avif .jp2 .j2k .jpf .jpx .mpo "
    b".dib .dds .ico .pcx .qoi .sgi .rgb .bw .ras .tga "
    b".heic .heif .jxl .psd".split()
)
SNIFFED = 32  # bytes that tell
_BEGINNINGS = (
    rb"\xff\xd8\xff",  # JPEG
    rb"\x89PNG\r\n\x1a\n",
    rb"GIF8[79]a",
    rb"BM.{4}\x00{4}.{2}\x00\x00[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00",  # with the size of its header
    rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+",  # TIFF
    rb"RIFF.{4}WEBP",
    rb"P[1-6]\s+[\d#]",  # PBM, PGM, PPM
    rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",  # JPEG 2000
    rb".{4}ftyp(?:avif|avis|heic|heix|heim|heis|hevc|mif1|msf1)",
    rb"qoif|DDS |\x59\xa6\x6a\x95|8BPS\x00\x01|\x00\x00\x00\x0cJXL ",
)
_BEGINNING = re.compile(b"|".join(b"(?:%b)" % one for one in _BEGINNINGS), re.DOTALL)


def is_image(path: str | bytes | os.PathLike[str]) -> bool:
    """Whether this is to be listed as an image: by its ending, and where that is none of an image, by its first bytes.

    What cannot be opened counts as one, so that reading it says why; a pipe, a socket or a device does not.
    """
    path = os.fsencode(path)
    if ending(path) in ENDINGS:
        return True
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            return stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and begins_like_one(stream.read(SNIFFED))
    except OSError:
        return True


def begins_like_one(data: bytes) -> bool:
    """Whether these are the first bytes of an image, `SNIFFED` of them at least where there are as many."""
    return _BEGINNING.match(data) is not None


def ending(path: bytes) -> bytes:
    """b".jpg" of b"a/B.JPG", b"" where there is none."""
    return os.path.splitext(path)[1].lower()


@functools.cache
def for_pillow() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow has, for `PIL.Image.open(..., formats=for_pillow())`."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
