"""The random numbers behind every kernel, drawn fast.

A kernel is the first `prod(shape)` numbers of the sequence `normal(fold_in(key, 0)), normal(fold_in(key, 1)), ...` in
blocks of 2**16, reshaped in C order: it depends on the key and the number of elements only, and is the same traced and
eager.

Eagerly, JAX compiles every operation once per shape, which takes most of the time of building a ResNet. Here one small
sampler is compiled and serves all shapes, and what follows is done with NumPy on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 2**16  # numbers per key of the stream
_MANY = 16  # blocks per call where a kernel has that many


@functools.partial(jax.jit, static_argnames="count")
def _sample_blocks(key: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """`count` blocks of the stream, from block `start` on."""
    blocks = start + jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (_BLOCK,), jnp.float32))(blocks).reshape(-1)


def sample(key: jax.Array, shape: Sequence[int]) -> jax.Array | np.ndarray:
    """N(0, 1) in float32, untruncated: a NumPy array, or a traced one where the key or the surroundings are traced."""
    size = math.prod(shape)
    count = math.ceil(size / _BLOCK)
    # Two compiled sizes serve every kernel: many blocks together are drawn faster, single ones waste less.
    many = count - count % _MANY
    drawn = [_sample_blocks(key, np.uint32(i), _MANY) for i in range(0, many, _MANY)]
    drawn += [_sample_blocks(key, np.uint32(i), 1) for i in range(many, count)]
    if isinstance(drawn[0], jax.core.Tracer):
        return jnp.concatenate(drawn)[:size].reshape(shape)
    out, start = _aligned_empty(size), 0
    for part in map(np.asarray, drawn):
        out[start : start + part.size] = part[: size - start]
        start += part.size
    return out.reshape(shape)


def _aligned_empty(size: int) -> np.ndarray:
    """float32 memory at the 64-byte boundary from which JAX on CPU takes over an array without a copy."""
    raw = np.empty(4 * size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + 4 * size].view(np.float32)
