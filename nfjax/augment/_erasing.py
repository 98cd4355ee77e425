"""Random erasing (Zhong et al. 2020, arXiv 1708.04896)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nfjax.augment._checks import check_images, check_key, check_probability, check_range

TRIES = 10


def random_erasing(
    key: jax.Array,
    images: jax.Array,
    probability: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float | Sequence[float] | str = 0,
) -> jax.Array:
    """Overwrites a random rectangle of each image, with the given probability.

    The defaults are torchvision's; as there, an image stays as it is where none of ten rectangles fits.

    Args:
        key: Of the rectangles, and of the noise.
        images: [B, H, W, C] of any dtype, which the result keeps.
        probability: With which an image gets a rectangle.
        scale: The least and the greatest share of the image's area, drawn uniformly.
        ratio: The least and the greatest height divided by width, drawn log-uniformly.
        value: What is written, in the units of `images` (on normalised ones 0 is the mean): a number, one per channel,
            or "random" for N(0, 1) noise on floats.

    Raises:
        ValueError: Settings or images cannot be used.
    """
    check_key(key)
    check_images(images)
    check_probability("probability", probability)
    check_range("scale", scale, 0, 1)
    check_range("ratio", ratio, 0, np.inf)
    batch, height, width, channels = images.shape
    decide_key, area_key, ratio_key, place_key, value_key = jax.random.split(key, 5)

    def uniform(key: jax.Array, low: float, high: float) -> jax.Array:
        return jax.random.uniform(key, (batch, TRIES), jnp.float32, low, high)

    area = uniform(area_key, *scale) * (height * width)
    tallness = jnp.exp(uniform(ratio_key, *np.log(ratio).tolist()))
    sides = (jnp.round(jnp.sqrt(a)).astype(jnp.int32) for a in (area * tallness, area / tallness))
    tall, wide = (jnp.maximum(side, 1) for side in sides)
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits, 1, keepdims=True)
    tall, wide = (jnp.take_along_axis(side, first, 1)[:, 0] for side in (tall, wide))
    is_erased = jax.random.bernoulli(decide_key, jnp.float32(probability), (batch,)) & fits.any(1)

    place = jax.random.uniform(place_key, (batch, 2), jnp.float32)
    inside = is_erased[:, None, None]
    for axis, (size, length) in enumerate(((height, tall), (width, wide))):
        free = jnp.maximum(size - length, 0)
        start = jnp.minimum((place[:, axis] * (free + 1).astype(jnp.float32)).astype(jnp.int32), free)
        positions = jax.lax.broadcasted_iota(jnp.int32, (1, height, width), axis + 1)
        inside &= (positions >= start[:, None, None]) & (positions < (start + length)[:, None, None])
    return jnp.where(inside[..., None], _written(value_key, images, value, channels), images)


def _written(key: jax.Array, images: jax.Array, value: float | Sequence[float] | str, channels: int) -> jax.Array:
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    if isinstance(value, str):
        if value != "random" or not is_float:
            raise ValueError(
                f"value={value!r} for images of dtype {images.dtype}: expected a number, one per channel, or "
                '"random" on floats, that is, after `normalize`'
            )
        return jax.random.normal(key, images.shape, images.dtype)
    levels = np.asarray(value)
    if levels.shape not in ((), (channels,)):
        raise ValueError(f"value={value}: expected one number or {channels}, one per channel")
    if not is_float:
        limits = jnp.iinfo(images.dtype)
        if (levels != np.round(levels)).any() or levels.min() < limits.min or levels.max() > limits.max:
            raise ValueError(f"value={value}: expected integers from {limits.min} to {limits.max} for {images.dtype}")
    return jnp.broadcast_to(jnp.asarray(levels, images.dtype), (1, 1, 1, channels))
