"""What every function here asks of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_SIDE = 2048  # the 16.16 coordinates and the sums of grey levels stay within 32 bits


def check_rgb(images: jax.Array) -> None:
    """ValueError unless `images` is uint8 [B, H, W, 3] with sides from 1 to MAX_SIDE pixels."""
    check_images(images)
    if images.dtype != jnp.uint8:
        raise ValueError(
            f"images of dtype {images.dtype}: expected uint8; augment before `normalize`, which makes float32 of them"
        )
    if images.shape[-1] != 3:
        raise ValueError(
            f"images of shape {images.shape}: expected 3 channels, red, green and blue, on the last axis; repeat a "
            "single channel three times with jnp.repeat(images, 3, axis=-1)"
        )
    if not 1 <= min(images.shape[1:3]) <= max(images.shape[1:3]) <= MAX_SIDE:
        raise ValueError(
            f"images of shape {images.shape}: expected sides of 1 to {MAX_SIDE} pixels; resize the images first"
        )


def check_key(key: jax.Array) -> None:
    """ValueError unless `key` is one key of JAX's, new or old style."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not new and not (dtype == jnp.uint32 and len(shape) == 1):
        given = type(key).__name__ if dtype is None else f"{dtype}{list(shape)}"
        raise ValueError(f"key of type {given}: expected one key, such as jax.random.key(0)")


def check_images(images: jax.Array) -> None:
    """ValueError unless `images` is an array with the four axes [B, H, W, C]."""
    if not isinstance(images, jax.Array | np.ndarray):
        raise ValueError(f"images of type {type(images).__name__}: expected an array [B, H, W, C]")
    if images.ndim != 4:
        raise ValueError(
            f"images of shape {images.shape}: expected [B, H, W, C]; give a single image a batch axis with images[None]"
        )


def check_probability(name: str, value: float) -> None:
    """ValueError unless `value` is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: expected a probability from 0 to 1")


def check_mask(mask: jax.Array | None, batch: int) -> None:
    """ValueError unless `mask` is None or has one entry per example."""
    if mask is not None and jnp.shape(mask) != (batch,):
        raise ValueError(f"mask of shape {jnp.shape(mask)}: expected one entry per image, [{batch}]")


def by_channel(name: str, values: Sequence[float], channels: int) -> jax.Array:
    """float32 [1, 1, 1, C] of a mean or a standard deviation; ValueError unless there is one for each channel, and they
    are of pixels in [0, 1].
    """
    if not isinstance(values, jax.core.Tracer):
        known = np.asarray(values)
        is_number = known.dtype.kind in "iuf" or known.dtype == jnp.bfloat16
        if known.shape != (channels,) or not is_number:
            raise ValueError(f"{name}={values}: expected {channels} numbers, one per channel")
        least = "0" if name == "mean" else "more than 0"
        if not ((known >= 0 if name == "mean" else known > 0) & (known <= 1)).all():
            raise ValueError(
                f"{name}={values}: expected {least} to 1, of pixels in [0, 1]; those of levels are to be divided by 255"
            )
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, channels)


def check_range(name: str, values: tuple[float, float], low: float, high: float) -> None:
    """ValueError unless `values` are two numbers in order, more than `low` and at most `high`."""
    if len(values) != 2 or not low < values[0] <= values[1] <= high:
        raise ValueError(f"{name}={tuple(values)}: expected (least, most) with {low} < least <= most <= {high}")


def as_integer(name: str, value: int, least: int, most: int | None, advice: str = "") -> int:
    """`value`; ValueError unless it is an integer from `least` to `most`, or without an end where that is None."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: expected a Python integer") from None
    if number < least or (most is not None and number > most):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}={value}: expected {wanted}{advice}")
    return number
