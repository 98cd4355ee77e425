"""What a predictor takes as an image, and what it refuses because it would misread it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nfjax.data.decoding import decode
from nfjax.data.loading import skips
from nfjax.data.sources.folder import FileReader
from nfjax.inference import _arrays
from nfjax.inference.preprocessing import Preprocessing

if TYPE_CHECKING:
    import PIL.Image

# A path, the bytes of an image file, a Pillow image, or uint8 [H, W, 3].
Image: TypeAlias = "str | os.PathLike[str] | bytes | PIL.Image.Image | np.ndarray"

EXPECTED = "expected a path, the bytes of an image file, a Pillow image, or uint8 [H, W, 3]"
_read = FileReader("")


def separate(images: Any) -> tuple[Iterator[Image], int | None]:
    """(the images one by one, how many they are); None where only their end will tell.

    Args:
        images: One, or several in a list, a generator or another iterable, or in one array [B, H, W, 3].

    Raises:
        ValueError: There are none, or what was given is refused, as by `check`.
        TypeError: It is nothing of the kind.
    """
    if _is_array(images):
        images = np.asarray(images)
        _arrays.check(images, "the array", several=True)
        images = images if images.ndim == 4 else images[None]
    elif _is_one(images):
        images = [images]
    elif not isinstance(images, Iterable) or isinstance(images, Mapping) or hasattr(images, "read"):
        raise TypeError(f"images of type {type(images).__name__}: {EXPECTED}, one or several of them")
    count = len(images) if isinstance(images, Sized) else None
    if count == 0:
        raise ValueError(f"there are no images: {EXPECTED}, one or several of them")
    return iter(images), count


def check(image: Any, name: str) -> None:
    """Refuses what would be misread.

    Args:
        image: Anything.
        name: Of it, for messages.

    Raises:
        TypeError: It is no image.
        ValueError: It is an array of another dtype or shape; the message says what to do.
    """
    if not _is_array(image):
        if not _is_one(image):
            raise TypeError(f"{name} is of type {type(image).__name__}: {EXPECTED}")
        return
    _arrays.check(np.asarray(image), name)


def name_of(image: Image, number: int) -> str:
    """How a message calls an image: by its path, or as the one of that number, from 0."""
    return skips.printable(os.fspath(image)) if isinstance(image, str | os.PathLike) else f"image {number}"


def pixels(image: Image, preprocessing: Preprocessing) -> np.ndarray:
    """What the network sees of an image before it is normalised, uint8 [S, S, 3].

    Raises:
        OSError: The file cannot be read.
        BadImageError: It is no image, or a damaged one.
    """
    if isinstance(image, str | os.PathLike):
        image, _ = _read((os.fsencode(os.path.expanduser(image)), 0))
    if isinstance(image, bytes | bytearray | memoryview):
        return preprocessing.of_file(bytes(image))
    if _is_array(image):
        return preprocessing.of_pixels(np.asarray(image))
    return preprocessing.of_pixels(_of_pillow(image, preprocessing.exif_orientation))


def _of_pillow(image: PIL.Image.Image, upright: bool) -> np.ndarray:
    if upright and image.format != "TIFF" and image.width * image.height <= decode.MAX_PIXELS:
        from PIL import ExifTags, ImageOps  # a TIFF is turned by Pillow itself

        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    return decode.rgb(image)


def _is_array(image: Any) -> bool:
    return hasattr(image, "__array__") and hasattr(image, "dtype")


def _is_one(image: Any) -> bool:
    """Whether this is an image that is no array."""
    if isinstance(image, str | os.PathLike | bytes | bytearray | memoryview):
        return True
    import PIL.Image

    return isinstance(image, PIL.Image.Image)
