"""Affine resampling as Pillow does it, in integers: the same pixels on every device, whatever it does with floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

INTERPOLATIONS = ("nearest", "bilinear")
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
FINE = 16  # further bits behind those of 16.16, for bilinear interpolation

Matrix = tuple[float, float, float, float, float, float]


def rotation(degrees: float, height: int, width: int) -> Matrix:
    """Counter-clockwise about the middle of the image, as `PIL.Image.rotate` makes its matrix."""
    angle = -math.radians(degrees % 360.0)
    if angle == 0:
        return IDENTITY
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y)


def shear_x(slope: float) -> Matrix:
    """Rows move to the side by `slope` pixels per row, the top edge stays, as torchvision does with `center=[0, 0]`."""
    # By way of degrees, as torchvision: what the detour rounds differently counts where an edge falls on a pixel.
    return (1.0, math.tan(math.radians(math.degrees(math.atan(slope)))), 0.0, 0.0, 1.0, 0.0)


def shear_y(slope: float) -> Matrix:
    """Columns move down or up by `slope` pixels per column, the left edge stays."""
    angle = math.radians(math.degrees(math.atan(slope)))
    one = math.cos(-angle) / math.cos(angle)
    return (1.0, 0.0, 0.0, -math.sin(-angle) / math.cos(angle), one, 0.0)


def translation(right: int, down: int) -> Matrix:
    """By whole pixels."""
    return (1.0, 0.0, float(-right), 0.0, 1.0, float(-down))


def fixed_point(matrix: Matrix, interpolation: str) -> np.ndarray:
    """int32 [2, 6]: the matrix in 16.16 fixed point, and what that leaves out in units of 2^-32; behind each row of the
    matrix the constant for the centre of the first pixel.

    Pillow computes nearest in 16.16, so nothing may be left out there; it computes bilinear in float64.
    """
    a, b, c, d, e, f = matrix
    values = np.array([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5])
    if interpolation == "nearest":
        coarse = np.floor(values * 2**16 + 0.5)
        return np.stack([coarse, np.zeros(6)]).astype(np.int32)
    coarse = np.floor(values * 2**16)
    return np.stack([coarse, np.round((values * 2**16 - coarse) * 2**FINE)]).astype(np.int32)


def resample(images: jax.Array, matrices: jax.Array, fill: Sequence[int], interpolation: str) -> jax.Array:
    """Each output pixel from where its matrix points to, or `fill` where that is outside of the image.

    images: uint8 [B, H, W, 3]. matrices: int32 [B, 2, 6] of `fixed_point`. fill: one level per channel.
    """
    batch, height, width, _ = images.shape
    rows = jax.lax.broadcasted_iota(jnp.int32, (1, height, width), 1)
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, height, width), 2)

    def along(axis: int, part: int) -> jax.Array:
        a, b, c = (matrices[:, part, 3 * axis + i, None, None] for i in range(3))
        return a * columns + b * rows + c

    x, y = along(0, 0), along(1, 0)
    if interpolation == "bilinear":
        fine_x, fine_y = along(0, 1), along(1, 1)
        x, y = x + (fine_x >> FINE), y + (fine_y >> FINE)
    inside = (x >= 0) & (x < width << 16) & (y >= 0) & (y < height << 16)

    # A pixel is one number of 32 bits: one gather moves all of its channels.
    padded = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)))
    packed = jax.lax.bitcast_convert_type(padded, jnp.uint32).reshape(batch, height * width)

    def pixels(row: jax.Array, column: jax.Array) -> jax.Array:
        row, column = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
        index = (row * width + column).reshape(batch, height * width)
        found = jnp.take_along_axis(packed, index, axis=1, mode="promise_in_bounds")
        return jax.lax.bitcast_convert_type(found, jnp.uint8)[..., :3].reshape(images.shape)

    if interpolation == "nearest":
        found = pixels(y >> 16, x >> 16)
    else:
        found = _between(pixels, (x - 2**15, fine_x), (y - 2**15, fine_y))
    return jnp.where(inside[..., None], found, jnp.array(fill, jnp.uint8).reshape(1, 1, 1, 3))


def _between(
    pixels: Callable[[jax.Array, jax.Array], jax.Array],
    x: tuple[jax.Array, jax.Array],
    y: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Bilinear interpolation between pixel centres, rounded down as Pillow does; x, y: in 16.16, and what is finer."""

    def share(difference: jax.Array, position: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The fraction of `position` times the difference, rounded down."""
        # By the fraction's four digits to the base 256, from the last: no sum needs more than 32 bits.
        coarse, fine = (part[..., None] for part in position)
        total = jnp.zeros_like(difference)
        for digit in (fine, fine >> 8, coarse, coarse >> 8):
            total = (difference * (digit & 0xFF) + total) >> 8
        return total

    column, row = x[0] >> 16, y[0] >> 16
    # Levels with 15 bits behind the point.
    corners = [[pixels(row + i, column + j).astype(jnp.int32) << 15 for j in (0, 1)] for i in (0, 1)]
    upper, lower = (left + share(right - left, x) for left, right in corners)
    return ((upper + share(lower - upper, y)) >> 15).astype(jnp.uint8)
