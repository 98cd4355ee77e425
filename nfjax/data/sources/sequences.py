"""A data set of your own, from two things that have a length and give (image, label) for an index."""

from __future__ import annotations

import io
import operator
import sys
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nfjax.data.decoding import decode
from nfjax.data.splits import Dataset, Numbered

EXPECTED = "a pair (image, label), the image as uint8 array [H, W, 3], [H, W, 1] or [H, W], Pillow image, or file bytes"


class Examples(Protocol):
    """What `from_sequences` takes: a list of pairs, a PyTorch or grain data set, or a class of a few lines."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """(image, label) of example `index`, from 0, the same at every call."""


def from_sequences(train: Examples, test: Examples, class_names: Sequence[str]) -> Dataset:
    """The data set of two sequences of (image, label).

    An image is the content of an image file as bytes, a uint8 array [H, W, 3], [H, W, 1] or [H, W] with values from 0
    to 255, or a Pillow image; sizes may differ. A label is a number from 0 to len(class_names) - 1. The same index must
    give the same example every time: what is random belongs to the augmentation on the device.

    With --config.data.keep=device or host every example is asked for once, at the start, by one thread at a time.
    With disk they are asked for in every epoch, by worker processes: each gets a copy of the sequence, which must
    therefore be picklable, of a class that can be imported (not one of the script that was started), and had better
    open its files where it first reads them.

    Args:
        train: The examples to train with.
        test: Those to evaluate with.
        class_names: Of label 0, label 1 and so on; two at least.

    Raises:
        ValueError: A sequence is empty or is none, a name is no text or stands there twice, or the first example is not
            what it should be. Of the others that is found when they are read: they count as damaged images.
    """
    names = tuple(class_names)
    wrong = [name for name in names if not isinstance(name, str) or not name or names.count(name) > 1]
    if isinstance(class_names, str) or wrong:
        raise ValueError(f"class_names={class_names!r}: expected a name for each label, each a text of its own")
    return Dataset(_split("train", train, len(names)), _split("test", test, len(names)), names)


def _split(name: str, examples: Examples, num_classes: int) -> Numbered:
    if not hasattr(examples, "__getitem__") or not hasattr(examples, "__len__"):
        raise ValueError(f"{name} is {_described(examples)}: expected something with __len__ and __getitem__")
    if not len(examples):
        raise ValueError(f"{name} has no examples")
    reader = SequenceReader(name, examples, num_classes)
    reader(0)
    return Numbered(reader, len(examples))


class SequenceReader:
    """Reads example n of a sequence: (the bytes of an image file, label), pixels as PPM, which stores them as they are.

    One thread at a time asks the sequence, which need not be made for more. Raises `BadImageError` that names the
    example, what was got and what was expected.
    """

    def __init__(self, split: str, examples: Examples, num_classes: int) -> None:
        self._split, self._examples, self._num_classes = split, examples, num_classes
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def name(self, index: int) -> str:
        return f"{self._split} example {index}"

    def __call__(self, reference: int) -> tuple[bytes, int]:
        with self._lock:
            example = self._examples[reference]
        name = self.name(reference)
        if not isinstance(example, tuple | list) or len(example) != 2:
            what = _described(example)
            raise decode.BadImageError("not an image and a label", f"{name} is {what}: expected {EXPECTED}")
        image, label = example
        return _encoded(image, name), self._checked(label, name)

    def _checked(self, label: Any, name: str) -> int:
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if isinstance(label, bool | np.bool_) or not 0 <= number < self._num_classes:
            raise decode.BadImageError(
                "wrong label",
                f"{name} has the label {label!r}: expected a number from 0 to {self._num_classes - 1}, one for each of "
                "class_names",
            )
        return number


def _encoded(image: Any, name: str) -> bytes:
    """The image as the bytes of an image file."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if _is_pillow(image):
        return _of_pillow(image)
    if not isinstance(image, np.ndarray) and hasattr(image, "__array__"):  # of PyTorch or JAX
        image = np.asarray(image)
    if not isinstance(image, np.ndarray):
        raise decode.BadImageError("not an image", f"{name} is {_described(image)}: expected {EXPECTED}")
    grey = image[..., None] if image.ndim == 2 else image
    if grey.dtype != np.uint8 or grey.ndim != 3 or grey.shape[-1] not in (1, 3) or not grey.size:
        raise decode.BadImageError(
            "not an image", f"{name} is {_described(image)}: expected uint8 [H, W, 3] or [H, W]{_way_out(grey)}"
        )
    return _ppm(np.broadcast_to(grey, (*grey.shape[:2], 3)))


def _way_out(image: np.ndarray) -> str:
    if image.dtype.kind == "f" and image.size:
        if image.min() >= 0 and image.max() <= 1:
            return "; values from 0 to 1 become it by np.uint8(255 * image + 0.5)"
        return "; values from 0 to 255, as they are before they are normalised"
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] not in (1, 3):
        return "; channels come last, as in image.transpose(1, 2, 0)"
    return ""


def _is_pillow(image: Any) -> bool:
    """Whether this is a Pillow image. Where nobody has imported Pillow, there is none."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _of_pillow(image: Any) -> bytes:
    pixels = decode.rgb(image)
    orientation = image.getexif().get(0x0112, 1)  # as EXIF numbers it
    if orientation == 1:
        return _ppm(pixels)
    from PIL import Image

    noted, stream = Image.Exif(), io.BytesIO()
    noted[0x0112] = orientation
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1, exif=noted)
    return stream.getvalue()


def _ppm(pixels: np.ndarray) -> bytes:
    return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}{' with ' + ', '.join(map(str, list(value)[:5])) if isinstance(value, dict) else ''}"
