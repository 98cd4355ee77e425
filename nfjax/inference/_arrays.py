"""Arrays of pixels: what is none is refused with the way out, and never misread."""

from __future__ import annotations

import numpy as np


def check(array: np.ndarray, name: str, several: bool = False) -> None:
    """Refuses what would be misread.

    Args:
        array: Expected as uint8 [H, W, 3].
        name: Of it, for the message.
        several: Whether it may be [B, H, W, 3].

    Raises:
        ValueError: It has another dtype or shape; the message says what to do.
    """
    if array.dtype != np.uint8:
        raise ValueError(
            f"{name} has the dtype {array.dtype}: expected uint8, levels from 0 to 255{_hint_of_dtype(array)}"
        )
    if array.ndim not in ((3, 4) if several else (3,)) or array.shape[-1] != 3:
        expected = "[H, W, 3] or [B, H, W, 3]" if several else "[H, W, 3]"
        raise ValueError(
            f"{name} has the shape {list(array.shape)}: expected {expected}{_hint_of_shape(array, several)}"
        )
    if not array.size:
        raise ValueError(f"{name} has the shape {list(array.shape)}: there are no pixels in it")


def _hint_of_dtype(array: np.ndarray) -> str:
    if array.dtype.kind == "f" and (finite := array[np.isfinite(array)]).size:
        if finite.min() < 0:
            return "; have they been normalised? A predictor does that itself, give it the pixels from before"
        if finite.max() <= 1:
            return "; pixels in [0, 1] become that by (255 * images).round().astype('uint8')"
    if array.dtype.kind in "iuf":
        return "; if the values are such levels, images.astype('uint8')"
    return "; a list of paths is given as a list" if array.dtype.kind in "UO" else ""


def _hint_of_shape(array: np.ndarray, several: bool) -> str:
    if array.ndim == 4 and not several:
        return "; several images in one array are given by themselves, in no list"
    if array.ndim == 2:
        return "; a grey image becomes that by numpy.stack([image] * 3, axis=-1)"
    if array.ndim in (3, 4):
        if array.shape[-3] == 3:
            return f"; channels come last: images.transpose{(1, 2, 0) if array.ndim == 3 else (0, 2, 3, 1)}"
        if array.shape[-1] == 1:
            return "; grey images become that by images.repeat(3, axis=-1)"
        if array.shape[-1] == 4:
            return "; transparency is dropped by images[..., :3]"
        if array.ndim == 3:
            return "; grey images become that by numpy.stack([images] * 3, axis=-1)"
    return ""
