"""Which device holds what: a batch is divided over all devices, the state is on each of them or divided as well."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nfjax.training import ranges
from nfjax.training.ranges import Range

AXES = ("data", "shard")

RANGES: dict[str, Range] = {
    "train.accumulate_steps": ranges.whole(1, 2**24, "must be positive"),
    "train.state_shards": ranges.whole(1, 2**24, "must be positive"),
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for a batch or a state that cannot be divided over the devices."""
    parts = jax.device_count() * config.train.accumulate_steps
    if config.batch_size % parts:
        near = max(config.batch_size // parts, 1) * parts
        accumulated = f" in {config.train.accumulate_steps} parts" if config.train.accumulate_steps > 1 else ""
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided over {jax.device_count()} devices{accumulated}; choose "
            f"a multiple, such as --config.batch_size={near}, or another --config.train.accumulate_steps"
        )
    try:
        make(config.train.state_shards)
    except ValueError as error:
        raise ValueError(f"train.state_shards={config.train.state_shards}: {error}") from None


def make(shards: int = 1) -> Mesh:
    """All devices of all processes on two axes, "data" and "shard", the second of length `shards`.

    Parameters are repeated along "data" and divided along "shard"; a batch is divided along both.
    Raises ValueError where `shards` does not divide the number of devices.
    """
    devices = jax.device_count()
    if shards < 1 or devices % shards:
        fitting = [str(n) for n in range(1, devices + 1) if devices % n == 0]
        raise ValueError(
            f"the state cannot be divided over {shards} of {devices} devices: expected {' or '.join(fitting)}"
        )
    return jax.make_mesh((devices // shards, shards), AXES, axis_types=(AxisType.Auto,) * 2)


def by_batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of it on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_state(state: Any, mesh: Mesh) -> Any:
    """A sharding for each array of a pytree: its longest axis that can be divided along "shard", else all of it
    everywhere.
    """
    shards = mesh.shape["shard"]

    def of(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size >= shards and size % shards == 0]
        if shards == 1 or not fitting:
            return replicated(mesh)
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "shard"))

    return jax.tree.map(of, state)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has in full, as arrays of all processes; each device gets its part.

    shardings: one for all, or a pytree of them.
    """

    def placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: placed(leaf, shardings), tree)
    return jax.tree.map(placed, tree, shardings)


def local_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Which rows of a batch of `size` lie on the devices of this process, ascending, int64."""
    parts = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part[0]] for part in parts]))


def from_local(sharding: NamedSharding, rows: np.ndarray, size: int) -> jax.Array:
    """An array of `size` rows of which this process has only its `local_rows`."""
    return jax.make_array_from_process_local_data(sharding, rows, (size, *rows.shape[1:]))


def everywhere(tree: Any) -> Any:
    """The arrays in full, on one device of this process."""

    def whole(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_replicated:
            leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(whole, tree)
