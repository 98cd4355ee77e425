"""What a kernel can be: its shape, its groups, its dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Shape = Sequence[int]


def check_groups(groups: Any) -> int:
    """`feature_group_count` as an int. Raises ValueError unless it is a positive one."""
    if not isinstance(groups, int | np.integer) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"feature_group_count={groups!r} must be a positive integer")
    return int(groups)


def per_group(shape: Shape, c_out: int, groups: int) -> int:
    """The output channels of one group. Raises ValueError where the groups do not divide them."""
    if c_out % groups:
        raise ValueError(
            f"feature_group_count={groups} does not divide the {c_out} output channels of a kernel of shape "
            f"{tuple(shape)}"
        )
    return c_out // groups


def size_at(shape: Shape, axis: int) -> int:
    """The size of an axis. Raises ValueError where there is none."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} does not exist in a kernel of shape {tuple(shape)}")
    return shape[axis]


def check_dtype(dtype: Any) -> None:
    """Raises ValueError for a dtype that holds no fractions."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype {jnp.dtype(dtype).name} cannot hold a kernel, whose weights are fractions: expected a "
            "floating-point dtype, such as float32 or bfloat16"
        )


def check_kernel(shape: Shape) -> tuple[int, int]:
    """(c_in, c_out) of a kernel `[*window, c_in, c_out]`. Raises ValueError for a shape that is none."""
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"shape {tuple(shape)} is no kernel: expected [*window, c_in, c_out], rank 2 or more, no empty axis"
        )
    return shape[-2], shape[-1]
