"""The arithmetic that gives a kernel its exact mean and variance, on the host and inside of a trace."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np


def standardize_values(kernel: Any, variance: float, per: str) -> Any:
    """In place for a NumPy kernel. Averages in stages (c_in, window, c_out), on the host beyond 1024 terms in float64,
    so that sums of millions of terms stay exact to float32 rounding.
    """
    taps = kernel.reshape(-1, *kernel.shape[-2:])
    host = isinstance(taps, np.ndarray)

    def mean(square: bool) -> Any:  # [1, 1, c_out], or over all channels [1, 1, 1]
        if host:
            # Without a temporary of the kernel's size: fresh memory costs more than the arithmetic.
            parts = np.array_split(taps, -(-taps.shape[1] // 1024), axis=1)
            sums = [np.einsum("kio,kio->ko", x, x) if square else x.sum(axis=1) for x in parts]
            means = np.sum(sums, axis=0, dtype=np.float64)[:, None] / taps.shape[1]
        else:
            means = (taps * taps if square else taps).mean(axis=1, keepdims=True)
        means = means.mean(axis=0, keepdims=True)
        return means if per == "channel" else means.mean(axis=2, keepdims=True)

    for _ in range(2):  # the second time takes away what rounding left of a large mean
        taps -= mean(square=False).astype(taps.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):  # of a constant kernel, which the caller refuses
        taps *= (math.sqrt(variance) / mean(square=True) ** 0.5).astype(taps.dtype)
    return taps.reshape(kernel.shape)


standardize_traced = jax.jit(standardize_values, static_argnames=("variance", "per"))
