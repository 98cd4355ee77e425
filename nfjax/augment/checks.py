"""What every function here asks of its arguments."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp

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


def check_images(images: jax.Array) -> None:
    """ValueError unless `images` has the four axes [B, H, W, C]."""
    if images.ndim != 4:
        raise ValueError(
            f"images of shape {images.shape}: expected [B, H, W, C]; give a single image a batch axis with images[None]"
        )


def check_probability(name: str, value: float) -> None:
    """ValueError unless `value` is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: expected a probability from 0 to 1")


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
