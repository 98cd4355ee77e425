"""The levels of an image as Pillow changes them."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def grey(images: jax.Array) -> jax.Array:
    """Luma by ITU-R 601-2 in 16-bit fixed point, `PIL.Image.convert("L")`: uint8 [B, H, W, 3] to int32 [B, H, W]."""
    red, green, blue = (images[..., i].astype(jnp.int32) for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def mean_grey(images: jax.Array) -> jax.Array:
    """The mean of `grey` to the nearest level, int32 [B]."""
    count = images.shape[1] * images.shape[2]
    total = grey(images).sum((1, 2), dtype=jnp.int32)
    return _divide(2 * total + count, 2 * count)


def smooth(images: jax.Array) -> jax.Array:
    """`PIL.ImageFilter.SMOOTH`, int32 [B, H, W, 3]: 3x3 means in which the centre counts five times; a border pixel
    stays as it is.
    """
    images = images.astype(jnp.int32)
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    of_rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    around = of_rows[:, :, :-2] + of_rows[:, :, 1:-1] + of_rows[:, :, 2:]
    rows = jax.lax.broadcasted_iota(jnp.int32, images.shape, 1)
    columns = jax.lax.broadcasted_iota(jnp.int32, images.shape, 2)
    is_inner = (rows > 0) & (rows < height - 1) & (columns > 0) & (columns < width - 1)
    # Pillow adds 0.5 and truncates in float32; of a sum of thirteenths that is this, exactly.
    return jnp.where(is_inner, _divide(around + 4 * images + 6, 13), images)


def blend(degenerate: jax.Array, images: jax.Array, factors: jax.Array) -> jax.Array:
    """`PIL.Image.blend`: degenerate + factor (image - degenerate), cut off to 0 ... 255 and rounded down, as uint8.

    degenerate: int32, images: uint8, factors: float32 and positive; shapes that broadcast.
    """
    # Pillow multiplies, rounds to float32, adds and rounds again. A compiler may fuse the two and skip the first
    # rounding, which changes the result where the sum is a whole number. So here the product is one of integers, the
    # rounding a conversion, and what follows, scaling by a power of two, is exact either way.
    bits = jax.lax.bitcast_convert_type(factors, jnp.uint32)
    mantissa = (bits & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    exponent = (bits >> 23) - jnp.uint32(23)
    scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    difference = images.astype(jnp.int32) - degenerate
    change = (mantissa * jnp.abs(difference).astype(jnp.uint32)).astype(jnp.float32) * scale
    blended = degenerate.astype(jnp.float32) + jnp.where(difference < 0, -change, change)
    return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def posterize_solarize(images: jax.Array, mask: jax.Array, threshold: jax.Array) -> jax.Array:
    """`PIL.ImageOps.posterize`, which keeps the bits of `mask`, then `solarize`, which inverts the levels from
    `threshold` on: uint8 [B, H, W, 3], with int32 [B] of each.
    """
    kept = images.astype(jnp.int32) & mask[:, None, None, None]
    return jnp.where(kept < threshold[:, None, None, None], kept, 255 - kept).astype(jnp.uint8)


# ---------------------------------------------------------------- rising tables, int32 [B, 3, 256] by channel and level


def apply_table(images: jax.Array, table: jax.Array) -> jax.Array:
    """Every level of uint8 [B, H, W, 3] replaced by that in the table of its image and channel."""
    # Where entries rise, the greater of two neighbours is the second: nothing changes, but XLA keeps such a result
    # in memory, and would otherwise compute the table anew for every pixel.
    kept = jax.lax.reduce_window(table, np.int32(0), jax.lax.max, (1, 1, 2), (1, 1, 1), [(0, 0), (0, 0), (1, 0)])

    def of_one(image: jax.Array, table: jax.Array) -> jax.Array:
        return table.at[_entries(image)].get(mode="promise_in_bounds")

    # Image by image: of a lookup over the whole batch the partitioner would not see that it stays on each device.
    return jax.vmap(of_one)(images, kept.reshape(-1, 3 * 256)).astype(jnp.uint8)


def autocontrast_table(counts: jax.Array) -> jax.Array:
    """`PIL.ImageOps.autocontrast` for the histogram `counts`."""
    up_to = jnp.cumsum(counts, -1, jnp.int32)
    low = (up_to == 0).sum(-1, dtype=jnp.int32)
    high = (up_to < up_to[..., -1:]).sum(-1, dtype=jnp.int32)
    below_whole = jnp.asarray(_below_whole())[low, high][..., None]
    low, span = low[..., None], (high - low)[..., None]
    levels = jax.lax.broadcasted_iota(jnp.int32, counts.shape, 2)
    above = 255 * jnp.clip(levels - low, 0, span)
    stretched = _divide(above, jnp.maximum(span, 1))
    stretched = stretched - jnp.where(stretched * span == above, (below_whole >> (stretched % 31)) & 1, 0)
    return jnp.where(span > 0, stretched, levels)


def equalize_table(counts: jax.Array) -> jax.Array:
    """`PIL.ImageOps.equalize` for the histogram `counts`."""
    up_to = jnp.cumsum(counts, -1, jnp.int32)
    below, total = up_to - counts, up_to[..., -1:]
    # The pixels of the brightest level that occurs are not counted; with one level alone nothing remains, nor changes.
    brightest = jnp.where(up_to == total, counts, 0).sum(-1, jnp.int32, keepdims=True)
    step = _divide(total - brightest, 255)
    # A step of few pixels would lead past 255, where Pillow stops.
    equalized = _divide(jnp.minimum(below + (step >> 1), 256 * step - 1), jnp.maximum(step, 1))
    return jnp.where(step > 0, equalized, jax.lax.broadcasted_iota(jnp.int32, counts.shape, 2))


def histogram(images: jax.Array) -> jax.Array:
    """How many pixels have each level, int32 [B, 3, 256]."""
    return jax.lax.platform_dependent(images, cpu=histogram_by_scatter, default=histogram_by_comparison)


def histogram_by_scatter(images: jax.Array) -> jax.Array:
    """One addition per pixel: what a CPU does well."""

    def of_one(image: jax.Array) -> jax.Array:
        counts = jnp.zeros(image.shape[-1] * 256, jnp.int32)
        return counts.at[_entries(image).reshape(-1)].add(jnp.int32(1), mode="promise_in_bounds")

    return jax.vmap(of_one)(images).reshape(images.shape[0], -1, 256)


def histogram_by_comparison(images: jax.Array) -> jax.Array:
    """256 comparisons per pixel, in one fused reduction without atomic additions: what a GPU or TPU does well."""
    batch, height, width, channels = images.shape
    levels = images.reshape(batch, height * width, channels, 1)
    return (levels == jnp.arange(256, dtype=jnp.uint8).reshape(1, 1, 1, 256)).sum(1, dtype=jnp.int32)


@functools.cache
def _below_whole() -> np.ndarray:
    """int32 [256, 256], by darkest and brightest level: bit n % 31 says that autocontrast should give the whole number
    n, but Pillow, in float64, falls short of it and rounds down to n - 1.

    The whole numbers of one image are multiples of 255 / g with g = gcd(255, span), all different modulo 31 while g is
    less; where g is more, nothing falls short.
    """
    table = np.zeros((256, 256), np.int32)
    for span in range(1, 256):
        divisor = math.gcd(255, span)
        low = np.arange(256 - span)
        step = np.arange(1, divisor + 1)
        whole = step * (255 // divisor)
        scale = 255.0 / span
        computed = (low[:, None] + step * (span // divisor)) * scale + -low[:, None] * scale
        table[low, low + span] = ((computed < whole) << (whole % 31)).sum(1)
    return table


def _divide(dividend: jax.Array, divisor: jax.Array | int) -> jax.Array:
    """The whole quotient of int32, of which neither is negative."""
    return jax.lax.div(dividend, jnp.broadcast_to(jnp.asarray(divisor, jnp.int32), dividend.shape))


def _entries(image: jax.Array) -> jax.Array:
    """The position of every level of [H, W, C] in a flat table [C, 256]."""
    first = jnp.arange(image.shape[-1], dtype=jnp.int32) * 256
    return first.reshape(1, 1, -1) + image.astype(jnp.int32)
