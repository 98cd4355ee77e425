"""Signal propagation of a network while it trains: what measures it, and whether its blocks can be found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from nfjax import spp


def check(config: ConfigDict, model: nnx.Module) -> None:
    """Raises ValueError where the blocks to watch are not there, or not clear. model: with shapes for arrays."""
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.float32)
    if (monitor := build(config, images)) is not None:
        with asking_for_blocks():
            monitor.check(model)


def build(config: ConfigDict, images: Any) -> spp.Monitor | None:
    """What measures signal propagation, None where the config asks for none. images: normalised, [B, H, W, 3]."""
    if config.log.signal_every_steps is None:
        return None
    return spp.Monitor(images, where=blocks(config), seed=config.seed)


def blocks(config: ConfigDict) -> tuple[str, ...] | None:
    """The class names that the config gives, None where blocks are to be found."""
    where = config.log.signal_where
    return where and tuple(filter(None, (name.strip() for name in where.split(","))))


@contextlib.contextmanager
def asking_for_blocks(of: str = "the signal") -> Iterator[None]:
    """Within it, an error about the choice of blocks says which setting chooses them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (of {of}, where= is --config.log.signal_where)") from error
