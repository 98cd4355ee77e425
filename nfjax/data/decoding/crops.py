"""From an encoded image to uint8 [size, size, 3], on the host: the random crop of training, the centre of evaluation.

What is random in them follows from (seed, position) alone, where position counts the examples of a run over all epochs:
neither the worker nor the host that does the work leaves a trace.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from nfjax.data.decoding import decode

_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Szegedy et al. 2015's training crop, with torchvision's rules: a box of `scale` of the image's area and of aspect
    `ratio` (width / height), log-uniform, resized to a square of `size` pixels.

    The resize is bilinear with antialiasing: a blur as wide as the reduction asks for, then OpenCV's bilinear
    interpolation; on ImageNet on average within one grey level (of 255) of Pillow's. Where the box is at least twice
    `size`, a JPEG is decoded at a reduced scale and the box begins at a multiple of that.

    Attributes:
        size: Of a side of the crop, in pixels.
        scale: The smallest and the largest share of the image's area.
        ratio: The smallest and the largest aspect, width / height.
        seed: Of the random numbers.
        upright: Whether the image is turned as EXIF says, first.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0
    upright: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(
                    f"{name}=({low}, {high}) of a random resized crop: expected 0 < low <= high"
                    f"{' <= 1, shares of the area' if name == 'scale' else ', such as (3/4, 4/3)'}"
                )

    def __call__(self, data: bytes, position: int, checked: bool = False) -> np.ndarray:
        """The crop of an image.

        Args:
            data: The bytes of an image file.
            position: Of the example in the run, from which the random numbers follow.
            checked: See `decode.region`.

        Returns:
            RGB uint8 [size, size, 3].

        Raises:
            BadImageError: It is no image, or a damaged one.
        """
        header = decode.header(data, self.upright)
        box = self.box(header.height, header.width, position)
        factor = reduction(box, self.size, header.reductions)
        if factor > 1:
            box = tuple(n // factor * factor for n in box)
        return resize(decode.region(data, box, factor, checked, header.orientation), self.size)

    def box(self, height: int, width: int, position: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop of an image of this size."""
        draws = np.random.Generator(np.random.Philox(key=[self.seed, position])).random((_ATTEMPTS + 1, 2)).tolist()
        low, high = (math.log(ratio) for ratio in self.ratio)
        for share, aspect in draws[:_ATTEMPTS]:
            area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + aspect * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                break
        else:  # the largest box in the middle whose aspect is allowed
            w, h = width, height
            if width < height * self.ratio[0]:
                h = max(1, round(width / self.ratio[0]))
            elif width > height * self.ratio[1]:
                w = max(1, round(height * self.ratio[1]))
            return (height - h) // 2, (width - w) // 2, h, w
        down, right = draws[-1]
        return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """The middle of an image: its short side resized to `resize` pixels, then a square of `size` pixels cut out.

    Pillow's antialiased bilinear resize, of that square only. A JPEG at least twice too large is decoded at a reduced
    scale.

    Attributes:
        size: Of a side of the square, in pixels.
        resize: Of the short side before it is cut out, in pixels.
        upright: Whether the image is turned as EXIF says, first.
    """

    size: int
    resize: int
    upright: bool = False

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ValueError(
                f"a square of {self.size} pixels cannot be cut out of an image whose short side has {self.resize}: "
                "expected resize >= size"
            )

    def __call__(self, data: bytes, position: int = 0, checked: bool = False) -> np.ndarray:
        """The middle of an image; arguments, value and errors as of `RandomResizedCrop`."""
        del position  # nothing is random
        header = decode.header(data, self.upright)

        def region(box: tuple[int, int, int, int], factor: int) -> np.ndarray:
            return decode.region(data, box, factor, checked, header.orientation)

        return self._cut(header.height, header.width, header.reductions, region)

    def of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """The middle of an image that is decoded, RGB uint8 [H, W, 3], as of a file that holds these pixels."""

        def region(box: tuple[int, int, int, int], factor: int) -> np.ndarray:
            top, left, height, width = box
            return np.ascontiguousarray(pixels[top : top + height, left : left + width])

        return self._cut(*pixels.shape[:2], (1,), region)

    def _cut(
        self,
        height: int,
        width: int,
        reductions: tuple[int, ...],
        region: Callable[[tuple[int, int, int, int], int], np.ndarray],
    ) -> np.ndarray:
        """region: the pixels in a box of the image, at a part of their size."""
        from PIL import Image

        if (height, width) == (self.size, self.size) and self.resize == self.size:
            return region((0, 0, height, width), 1)
        short = min(height, width)
        resized = [int(self.resize * n / short) for n in (height, width)]  # as torchvision rounds
        scale = [n / r for n, r in zip((height, width), resized, strict=True)]
        begin = [round((r - self.size) / 2) * s for r, s in zip(resized, scale, strict=True)]
        end = [min(b + self.size * s, n) for b, s, n in zip(begin, scale, (height, width), strict=True)]
        factor = reduction((0, 0, int(end[0] - begin[0]), int(end[1] - begin[1])), self.size, reductions)
        # What the resize reads: the square, and as much around it as its filter reaches.
        first = [max(0, int(b - 2 * s) // factor * factor) for b, s in zip(begin, scale, strict=True)]
        last = [min(n, math.ceil(e + 2 * s)) for e, s, n in zip(end, scale, (height, width), strict=True)]
        last = [min(n, -(-stop // factor) * factor) for stop, n in zip(last, (height, width), strict=True)]
        square = (first[0], first[1], last[0] - first[0], last[1] - first[1])
        pixels = region(square, factor)
        y0, x0, y1, x1 = ((v - f) / factor for v, f in zip((*begin, *end), (*first, *first), strict=True))
        box = (x0, y0, min(x1, pixels.shape[1]), min(y1, pixels.shape[0]))
        return np.asarray(Image.fromarray(pixels).resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))


def reduction(box: tuple[int, int, int, int], size: int, allowed: tuple[int, ...] = decode.REDUCTIONS) -> int:
    """The largest of those allowed by which the box can be reduced and still have `size` pixels a side."""
    return next(factor for factor in allowed if factor == 1 or min(box[2:]) >= factor * size)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """[h, w, 3] to [size, size, 3], bilinear with antialiasing: see RandomResizedCrop."""
    import cv2

    kernels = [_blur(n / size) for n in pixels.shape[:2]]
    if any(kernel.size > 1 for kernel in kernels):
        pixels = cv2.sepFilter2D(pixels, -1, kernels[1], kernels[0], borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)


def _blur(reduction: float) -> np.ndarray:
    """The kernel which, followed by bilinear interpolation, has the variance of the antialiasing triangle.

    A triangle of half width w has the variance w²/6; bilinear interpolation is one of half width 1.
    """
    variance = (reduction**2 - 1) / 6
    if variance < 0.02:
        return np.ones(1, np.float32)
    if variance <= 0.55:
        return np.array([variance / 2, 1 - variance, variance / 2], np.float32)
    half_width = math.sqrt(6 * variance)
    taps = np.arange(-math.ceil(half_width), math.ceil(half_width) + 1)
    kernel = np.maximum(0, 1 - np.abs(taps) / half_width)
    return (kernel / kernel.sum()).astype(np.float32)
