"""What nearly every recipe does: random crop, random flip, normalization."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nfjax.augment._checks import as_integer, by_channel, check_images, check_key


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads zeros on every side and cuts a window of the original size at a random place.

    Args:
        key: Of the places.
        images: [B, H, W, C] of any dtype, which the result keeps.
        padding: Zeros on every side, in pixels; the paper's: 4 on 32x32.

    Returns:
        [B, H, W, C].

    Raises:
        ValueError: The images have another shape, or with this padding a window could lie beside the image.
    """
    check_key(key)
    check_images(images)
    padding = as_integer("padding", padding, 0, min(images.shape[1:3]) - 1, ", less than the image's sides")
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1, jnp.int32)

    def cut(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], jnp.zeros_like(offset[0])), images.shape[1:])

    return jax.vmap(cut)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
        key: Of the decisions.
        images: [B, H, W, C] of any dtype, which the result keeps.

    Returns:
        [B, H, W, C].

    Raises:
        ValueError: The images have another shape.
    """
    check_key(key)
    check_images(images)
    mirrored = jax.random.bernoulli(key, jnp.float32(0.5), (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images / 255 - mean) / std, by channel.

    Args:
        images: uint8 [B, H, W, C].
        mean: Of pixels in [0, 1], one number per channel.
        std: Likewise.

    Returns:
        float32 [B, H, W, C].

    Raises:
        ValueError: The images have another dtype (floats are normalised already, or no levels) or shape, or the numbers
            are not one per channel.
    """
    check_images(images)
    if images.dtype != jnp.uint8:
        raise ValueError(
            f"images of dtype {images.dtype}: expected uint8, levels from 0 to 255; floats in [0, 1] are normalised by "
            "(images - mean) / std"
        )
    shift, scale = (by_channel(name, values, images.shape[-1]) for name, values in (("mean", mean), ("std", std)))
    return (images.astype(jnp.float32) / 255 - shift) / scale
