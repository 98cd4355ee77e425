"""Whether what is read from a checkpoint is what was saved: a number for each array, and one for what they are called.

They are saved beside the arrays and compared by every reader. At first only the arrays of JAX had one, and the names
had none: checkpoints of that time are compared as far as theirs go.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The last stage of MurmurHash3 (Appleby), so that changes of several numbers do not cancel: shifts and factors.
MIXING = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
PLACE = 0x9E3779B9
CHUNK = 2**16  # numbers that are mixed at a time on the host: they stay in its caches


@jax.jit
def checksums(leaves: list[jax.Array]) -> jax.Array:
    """uint32, for each array a number that changes when a bit of it does; whatever devices hold it."""

    def of(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:  # these two cannot be taken for numbers of the same bits
            leaf = leaf.astype(jnp.uint8)
        elif jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, word)
        position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
        for axis in reversed(range(bits.ndim)):
            position += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            stride *= bits.shape[axis]
        mixed = bits.astype(jnp.uint32) ^ (position * jnp.uint32(PLACE))
        for shift, factor in MIXING:
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return mixed.sum(dtype=jnp.uint32)

    return jnp.stack([of(leaf) for leaf in leaves])


def on_host(leaves: list[np.ndarray]) -> np.ndarray:
    """`checksums` of NumPy arrays, without compiling anything."""
    return np.array([_on_host(_words(leaf)) for leaf in leaves], np.uint32)


def _on_host(words: np.ndarray) -> int:
    total = 0
    for start in range(0, words.size, CHUNK):
        part = words[start : start + CHUNK].astype(np.uint32)
        mixed = part ^ (np.arange(start, start + part.size, dtype=np.uint32) * np.uint32(PLACE))
        for shift, factor in MIXING:
            mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**32


def _words(leaf: np.ndarray | np.generic) -> np.ndarray:
    """The bits of an array, flat, as unsigned numbers of at most 32 bits."""
    flat = np.ascontiguousarray(leaf).reshape(-1)
    return flat.view({1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, np.uint32))


def seal(tree: Any) -> jax.Array:
    """The checksums of a pytree, uint32 [1 + number of leaves]: first that of its names, types and shapes, then those
    of its leaves, in the order of their names. Computed where the leaves are; returns before it is done.
    """
    return checksums([_for_device(leaf) for leaf in (_digest(tree), *_named(tree).values())])


def damage(tree: Any, stored: np.ndarray) -> str | None:
    """What is not as it was when `stored` was its seal; None if all is. Keys may be strings for integers."""
    leaves = list(_named(tree).values())
    known = [leaf for leaf in leaves if leaf.dtype.itemsize <= 4]
    if stored.shape == (len(known),):  # saved before names and wider numbers were sealed, and in another order
        found, stored = np.sort(_found(known)), np.sort(stored)
    elif stored.shape == (1 + len(leaves),):
        found = _found([_digest(tree), *leaves])
        if found[0] != stored[0]:
            return "names, types or shapes of its arrays are not those that were saved"
    else:
        return f"it holds {len(leaves)} arrays and {stored.size} checksums, which do not belong together"
    wrong = int((found != stored).sum())
    return f"{wrong} of its {len(leaves)} arrays are not those that were saved" if wrong else None


def _found(leaves: list[Any]) -> np.ndarray:
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        return np.asarray(checksums([_for_device(leaf) for leaf in leaves]))
    return on_host(leaves)


def _for_device(leaf: Any) -> Any:
    """JAX would make float32 of NumPy's float64."""
    return leaf if isinstance(leaf, jax.Array) else _words(leaf)


def described(tree: Any) -> list[Any]:
    """[[name, dtype, shape], ...] of the leaves, arrays or what stands for them, in the order of their names."""
    return [[name, str(np.dtype(leaf.dtype)), list(leaf.shape)] for name, leaf in _named(tree).items()]


def _digest(tree: Any) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(json.dumps(described(tree)).encode()).digest(), np.uint8)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by name, sorted: "state/params/blocks/0/kernel". A name is the same whatever holds the leaf, so that
    of a dataclass or a list, too, when it comes back as a dict.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves))
