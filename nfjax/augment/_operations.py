"""The operations of RandAugment, each written as a `Change`: where pixels come from, how levels are replaced, what the
image is blended with.

All images of a batch go through the same stages, each with the numbers of its own operation, most of which leave it as
it is. So no image pays for all fourteen operations, as under a `switch` in a `vmap`, and what one image is given has no
influence on the others. The pixels are Pillow's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nfjax.augment import _color, _geometry

TABLES = ("identity", "autocontrast", "equalize")
DEGENERATES = ("black", "mean_grey", "grey", "smooth")


@dataclasses.dataclass(frozen=True)
class Change:
    """What an operation does to one image, in this order; the defaults leave it as it is.

    Attributes:
        matrix: (a, b, c, d, e, f), with which the pixel at (x, y) comes from (ax + by + c, dx + ey + f), and the centre
            of the first pixel is (0.5, 0.5).
        table: How levels are replaced, "identity", "autocontrast" or "equalize".
        bits: How many bits of each level are kept, from the highest, 0 to 8.
        threshold: The level from which on levels are inverted.
        degenerate: What the image is blended with, "black", "mean_grey", "grey" or "smooth".
        factor: The positive share of the image in that blend; more than 1 leads away from `degenerate`.
    """

    matrix: _geometry.Matrix = _geometry.IDENTITY
    table: str = "identity"
    bits: int = 8
    threshold: float = 256.0
    degenerate: str = "black"
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of RandAugment.

    Attributes:
        change: `(magnitude, height, width) -> Change`.
        magnitudes: `(bins, height, width)` to the magnitude of each bin, float32 [bins]; None where nothing varies.
        signed: Whether the magnitude is negated in half of the cases.
    """

    change: Callable[[float, int, int], Change]
    magnitudes: Callable[[int, int, int], np.ndarray] | None = None
    signed: bool = False


def linspace(start: float, stop: float, bins: int) -> np.ndarray:
    """torch.linspace in float32, to the last bit: each half counts from its own end, multiply and add round once."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(bins - 1))
    i = np.arange(bins)
    return np.where(i < bins // 2, first + step * i, last - step * (bins - 1 - i)).astype(np.float32)


def _evenly(start: float, stop: float) -> Callable[[int, int, int], np.ndarray]:
    return lambda bins, height, width: linspace(start, stop, bins)


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda m, h, w: Change()),
    "shear_x": Operation(lambda m, h, w: Change(matrix=_geometry.shear_x(m)), _evenly(0, 0.3), signed=True),
    "shear_y": Operation(lambda m, h, w: Change(matrix=_geometry.shear_y(m)), _evenly(0, 0.3), signed=True),
    "translate_x": Operation(
        lambda m, h, w: Change(matrix=_geometry.translation(int(m), 0)),
        lambda bins, h, w: linspace(0, 150 / 331 * w, bins),
        signed=True,
    ),
    "translate_y": Operation(
        lambda m, h, w: Change(matrix=_geometry.translation(0, int(m))),
        lambda bins, h, w: linspace(0, 150 / 331 * h, bins),
        signed=True,
    ),
    "rotate": Operation(lambda m, h, w: Change(matrix=_geometry.rotation(m, h, w)), _evenly(0, 30), signed=True),
    "brightness": Operation(lambda m, h, w: Change(degenerate="black", factor=1 + m), _evenly(0, 0.9), signed=True),
    "color": Operation(lambda m, h, w: Change(degenerate="grey", factor=1 + m), _evenly(0, 0.9), signed=True),
    "contrast": Operation(lambda m, h, w: Change(degenerate="mean_grey", factor=1 + m), _evenly(0, 0.9), signed=True),
    "sharpness": Operation(lambda m, h, w: Change(degenerate="smooth", factor=1 + m), _evenly(0, 0.9), signed=True),
    "posterize": Operation(
        lambda m, h, w: Change(bits=int(m)),
        lambda bins, h, w: 8 - np.round(np.arange(bins, dtype=np.float32) / np.float32((bins - 1) / 4)),
    ),
    "solarize": Operation(lambda m, h, w: Change(threshold=m), _evenly(255, 0)),
    "autocontrast": Operation(lambda m, h, w: Change(table="autocontrast")),
    "equalize": Operation(lambda m, h, w: Change(table="equalize")),
}


def change_images(
    images: jax.Array, numbers: dict[str, jax.Array], fill: Sequence[int], interpolation: str
) -> jax.Array:
    """uint8 [B, H, W, 3] changed by `numbers`, arrays of one entry per example; fill: one level per channel."""
    images = _geometry.resample(images, numbers["matrix"], fill, interpolation)
    counts = _color.histogram(images)
    identity = jax.lax.broadcasted_iota(jnp.int32, counts.shape, 2)
    table = _select(numbers["table"], identity, _color.autocontrast_table(counts), _color.equalize_table(counts))
    images = _color.apply_table(images, table)
    images = _color.posterize_solarize(images, numbers["mask"], numbers["threshold"])
    degenerate = _select(
        numbers["degenerate"],
        jnp.zeros_like(images, jnp.int32),
        _color.mean_grey(images)[:, None, None, None],
        _color.grey(images)[..., None],
        _color.smooth(images),
    )
    return _color.blend(degenerate, images, numbers["factor"][:, None, None, None])


def _select(which: jax.Array, *cases: jax.Array) -> jax.Array:
    """For each image, the one of `cases` that `which`, int32 [B], says."""
    chosen = cases[0]
    for i, case in enumerate(cases[1:], 1):
        chosen = jnp.where(which.reshape(-1, *[1] * (chosen.ndim - 1)) == i, case, chosen)
    return chosen


@functools.lru_cache(maxsize=32)
def numbers_of_changes(
    operations: tuple[Operation, ...], bins: int, height: int, width: int, interpolation: str
) -> dict[str, np.ndarray]:
    """Every change in numbers: arrays [operations, bins, 2, ...], the last for magnitudes as they are and negated."""

    def of(operation: Operation, position: int, sign: int) -> dict[str, np.ndarray]:
        magnitude = 0.0
        if operation.magnitudes is not None:
            magnitude = float(operation.magnitudes(bins, height, width)[position])
        c = operation.change(sign * magnitude if operation.signed else magnitude, height, width)
        return {
            "matrix": _geometry.fixed_point(c.matrix, interpolation),
            "table": np.int32(TABLES.index(c.table)),
            "mask": np.int32(256 - 2 ** (8 - c.bits)),
            "threshold": np.int32(np.ceil(c.threshold)),
            "degenerate": np.int32(DEGENERATES.index(c.degenerate)),
            "factor": np.float32(c.factor),
        }

    rows = [[[of(o, i, sign) for sign in (1, -1)] for i in range(bins)] for o in operations]
    return {
        name: np.array([[[entry[name] for entry in pair] for pair in row] for row in rows]) for name in rows[0][0][0]
    }
