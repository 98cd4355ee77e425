"""From an image to what a network sees, as in the evaluation of the run that trained it."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from nfjax import augment
from nfjax.data.decoding import crops
from nfjax.inference import _arrays

LARGEST = 2**14  # pixels of a side


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The middle of an image, in the size of the network, and normalised.

    Attributes:
        image_size: Height and width of what the network sees, in pixels.
        resize: Of the short side before the middle is cut out, in pixels.
        mean: Of pixels in [0, 1], for red, green and blue.
        std: Likewise.
        exif_orientation: Whether images are turned as the camera has noted.
    """

    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif_orientation: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= self.resize <= LARGEST:
            raise ValueError(
                f"image_size={self.image_size}, resize={self.resize}: expected 1 <= image_size <= resize <= {LARGEST}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) and 0 <= value <= 1 for value in values):
                raise ValueError(f"{name}={values}: expected three numbers of pixels in [0, 1]")
        if min(map(np.float32, self.std)) <= 0:
            raise ValueError(f"std={self.std}: expected three positive numbers")

    def of_file(self, data: bytes | bytearray | memoryview) -> np.ndarray:
        """The middle of an image file, uint8 [image_size, image_size, 3]: the pixels with which the run was scored.

        Raises:
            BadImageError: It is no image, or a damaged one.
            TypeError: These are no bytes.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(
                f"{type(data).__name__}: expected the bytes of an image file, as of Path(name).read_bytes()"
            )
        return self._crop()(bytes(data)).copy()

    def of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """The middle of an image [H, W, 3] in uint8, as of the same image in a file without loss, such as a PNG.

        Raises:
            ValueError: It has another dtype or shape.
        """
        _arrays.check(pixels, "the image")
        return self._crop().of_pixels(pixels).copy()

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] to float32 of the same shape."""
        return augment.normalize(images, self.mean, self.std)

    def _crop(self) -> crops.CentreCrop:
        return crops.CentreCrop(self.image_size, self.resize, self.exif_orientation)
