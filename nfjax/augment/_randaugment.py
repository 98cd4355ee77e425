"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) on the device, with the operations and the scale of
torchvision.transforms.RandAugment and the pixels of Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nfjax import _names
from nfjax.augment import _geometry
from nfjax.augment._checks import as_integer, check_key, check_rgb
from nfjax.augment._operations import OPERATIONS, change_images, numbers_of_changes


def rand_augment(
    key: jax.Array,
    images: jax.Array,
    num_operations: int = 2,
    magnitude: int = 9,
    bins: int = 31,
    fill: int | Sequence[int] = 0,
    interpolation: str = "nearest",
) -> jax.Array:
    """Random operations on each image, one after the other; they and their signs are drawn by `choose`.

    All but `key` and `images` are Python values; the defaults are torchvision's.

    Args:
        key: Of the operations and signs.
        images: uint8 [B, H, W, 3].
        num_operations: On each image.
        magnitude: The bin of all operations, 0 (weakest) to bins - 1.
        bins: How many magnitudes there are.
        fill: The level of what is moved in from outside of the image, or one per channel.
        interpolation: "nearest" or "bilinear", of rotate, shear and translate.

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        ValueError: Settings or images cannot be used.
    """
    check_key(key)
    check_rgb(images)
    magnitude = as_integer("magnitude", magnitude, 0, bins - 1, "; `bins` sets how many there are" if bins > 1 else "")
    num_operations = as_integer("num_operations", num_operations, 0, None)
    operations, signs = choose(key, images.shape[0], num_operations)
    for i in range(num_operations):
        images = apply(images, operations[i], magnitude, signs[i], bins, fill, interpolation)
    return images


def choose(key: jax.Array, batch: int, num_operations: int) -> tuple[jax.Array, jax.Array]:
    """What `rand_augment` draws, each example for itself.

    Args:
        key: As there.
        batch: B, the number of images.
        num_operations: As there.

    Returns:
        Positions in OPERATIONS, and signs, 1 or -1; both int32 [num_operations, B].
    """
    operation_key, sign_key = jax.random.split(key)
    shape = (num_operations, batch)
    operations = jax.random.randint(operation_key, shape, 0, len(OPERATIONS), jnp.int32)
    return operations, jnp.where(jax.random.bernoulli(sign_key, jnp.float32(0.5), shape), jnp.int32(-1), jnp.int32(1))


def apply(
    images: jax.Array,
    operations: jax.Array | Sequence[str] | str,
    magnitudes: jax.Array | int,
    signs: jax.Array | int = 1,
    bins: int = 31,
    fill: int | Sequence[int] = 0,
    interpolation: str = "nearest",
) -> jax.Array:
    """Given operations, one per example.

    Under `jit` an operation or magnitude beyond the ends is the nearest that there is.

    Args:
        images: uint8 [B, H, W, 3].
        operations: int32 [B], positions in OPERATIONS, or names, or the one of all examples.
        magnitudes: Bins, int32 [B] or one integer, 0 to bins - 1.
        signs: int32 [B] or one integer, of which the sign counts, and only for signed operations.
        bins: How many magnitudes there are.
        fill: As in `rand_augment`.
        interpolation: Likewise.

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        ValueError: Settings or images cannot be used.
    """
    check_rgb(images)
    batch, height, width, _ = images.shape
    bins = as_integer("bins", bins, 2, None)
    fill = _fill(fill)
    _names.lookup("interpolation", interpolation, dict.fromkeys(_geometry.INTERPOLATIONS), callables=False)
    operations = _per_example("operations", _positions(operations), batch, len(OPERATIONS))
    is_negative = (_per_example("signs", signs, batch) < 0).astype(jnp.int32)
    table = numbers_of_changes(tuple(OPERATIONS.values()), bins, height, width, interpolation)
    if isinstance(magnitudes, (int, np.integer)):  # one bin for all: the others need not be on the device
        magnitude = as_integer("magnitudes", magnitudes, 0, bins - 1)
        table = {name: values[:, magnitude : magnitude + 1] for name, values in table.items()}
        magnitudes = 0
    magnitudes = _per_example("magnitudes", magnitudes, batch, bins)
    numbers = {name: jnp.asarray(values)[operations, magnitudes, is_negative] for name, values in table.items()}
    return change_images(images, numbers, fill, interpolation)


def _positions(operations: jax.Array | Sequence[str] | str) -> jax.Array | np.ndarray | int:
    if isinstance(operations, str) or (
        isinstance(operations, Sequence) and all(isinstance(name, str) for name in operations)
    ):
        given = [operations] if isinstance(operations, str) else operations
        numbers = {name: number for number, name in enumerate(OPERATIONS)}
        positions = [_names.lookup("operation", name, numbers, callables=False) for name in given]
        return positions[0] if isinstance(operations, str) else np.array(positions, np.int32)
    return operations


def _per_example(name: str, values: jax.Array | int, batch: int, count: int | None = None) -> jax.Array:
    """int32 [B]; values that are known already are checked to be at least 0 and less than `count`."""
    dtype = values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} of dtype {dtype}: expected integers, int32 [{batch}] or one for all examples")
    if np.shape(values) not in ((), (batch,)):
        raise ValueError(
            f"{name} of shape {np.shape(values)}: expected one per image, [{batch}], or a single one for all of them"
        )
    if count is not None and not isinstance(values, jax.core.Tracer):
        known = np.asarray(values)
        if known.size and not 0 <= known.min() <= known.max() < count:
            raise ValueError(f"{name} from {known.min()} to {known.max()}: expected 0 to {count - 1}")
    return jnp.broadcast_to(jnp.asarray(values, jnp.int32), (batch,))


def _fill(fill: int | Sequence[int]) -> tuple[int, int, int]:
    levels = tuple(np.ravel(fill).tolist())
    levels = levels * 3 if np.ndim(fill) == 0 else levels
    if len(levels) != 3 or any(level != int(level) or not 0 <= level <= 255 for level in levels):
        raise ValueError(f"fill={fill}: expected an integer from 0 to 255, or three, for red, green and blue")
    return tuple(int(level) for level in levels)
