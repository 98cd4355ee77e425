"""How many taps a strided, padded convolution really has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

Padding = str | int | Sequence[int | tuple[int, int]]


def effective_taps(
    window: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    spatial_size: int | Sequence[int] | None = None,
) -> float:
    """The mean number of output positions that one input position feeds: at most `prod(window)`, less where strides or
    borders drop taps.

    Args:
        window: Of the kernel, one entry per spatial axis.
        stride: Likewise, or one integer for all.
        padding: "SAME", "VALID", "CIRCULAR" (no tap is lost), an integer, or one integer or `(low, high)` per axis.
        spatial_size: Of the input in pixels, as `stride`; None for an image without borders.

    Raises:
        ValueError: The arguments do not fit each other, or the window does not fit the input.
    """
    rank = len(window)
    strides = _per_axis("stride", stride, rank)
    if any(s < 1 for s in strides):
        raise ValueError(f"stride={stride} must be positive")
    if rank == 0 or spatial_size is None or (isinstance(padding, str) and padding.upper() == "CIRCULAR"):
        return math.prod(k / s for k, s in zip(window, strides, strict=True))
    sizes = _per_axis("spatial_size", spatial_size, rank)
    total = 1.0
    for k, s, size, (low, high) in zip(window, strides, sizes, _padding(padding, window, strides, sizes), strict=True):
        outputs = (size + low + high - k) // s + 1
        if size < 1 or outputs < 1:
            raise ValueError(f"a window of {k} with padding {(low, high)} does not fit an input of {size} pixels")
        positions = s * np.arange(outputs)[:, None] + np.arange(k)[None, :] - low
        total *= np.count_nonzero((positions >= 0) & (positions < size)) / size
    return total


def _per_axis(what: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"{what}={value} has {len(values)} entries for a window with {rank} axes")
    return values


def _padding(
    padding: Padding, window: Sequence[int], strides: Sequence[int], sizes: Sequence[int]
) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                f"unknown padding {padding!r}: expected 'SAME', 'VALID', 'CIRCULAR', an integer or one pair per axis"
            )
        return [tuple(p) for p in jax.lax.padtype_to_pads(sizes, window, strides, padding.upper())]
    if isinstance(padding, int):
        padding = (padding,) * len(window)
    pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    if len(pairs) != len(window):
        raise ValueError(f"padding={padding} has {len(pairs)} entries for a window with {len(window)} axes")
    return pairs
