"""What is done differently on a CPU, each with its reason.

What is part of a network is chosen when it is lowered, by the platform that it is lowered for; the other functions take
that platform ("cpu", "gpu", "tpu"). Nothing here depends on the machine that traces a program, so one that is exported
holds no trace of it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

# Bytes of an activation of the first stage for which a CPU's caches suffice, and parts of a batch that still pay, as
# measured for docs/results/speed.md.
CACHED = 4 * 2**20
PARTS = (1, 2, 4)


def pointwise_convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Any, **settings: Any
) -> jax.Array:
    """A 1x1 convolution without padding, called as `jax.lax.conv_general_dilated` is: [B, H, W, C], [1, 1, C, D] -> [B,
    H', W', D].

    XLA takes up to four times as long for it on a CPU as for the matrix product that it is.
    """

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = x[:, :: strides[0], :: strides[1]]
        precision = {name: settings.get(name) for name in ("precision", "preferred_element_type")}
        product = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0], **precision)
        return product.reshape(*x.shape[:-1], -1)

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)

    return jax.lax.platform_dependent(x, kernel, cpu=product, default=convolution)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling with stride 2 and a border of 1, [B, H, W, C] -> [B, H', W', C], H' = ceil(H / 2).

    XLA takes eight times as long for the gradient of a window on a CPU as for that of nine shifted images. Where values
    are equal, these share the gradient that the first one would get.
    """
    height, width = ((n - 1) // 2 + 1 for n in x.shape[1:3])

    def shifted(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        shifts = [(i, j) for i in range(3) for j in range(3)]
        images = [padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i, j in shifts]
        return functools.reduce(jnp.maximum, images)

    def window(x: jax.Array) -> jax.Array:
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    return jax.lax.platform_dependent(x, cpu=shifted, default=window)


def platform_of(mesh: Mesh) -> str:
    """The platform that a program over these devices is lowered for."""
    return mesh.devices.flat[0].platform


def parts(platform: str, batch: int, side: int, features: int, dtype: jnp.dtype) -> int:
    """In how many parts a device computes its part of a batch, so that the activations of a part stay in the caches.

    Args:
        platform: On all but a CPU it is one part.
        batch: Images of one device.
        side: Height and width of the activations of the first stage, in pixels.
        features: Their channels.
        dtype: Theirs.
    """
    if platform != "cpu":
        return 1
    activation = batch * side**2 * features * jnp.dtype(dtype).itemsize
    dividing = [n for n in PARTS if batch % n == 0]
    return next((n for n in dividing if activation / n <= CACHED), dividing[-1])


def unroll(platform: str, length: int) -> int:
    """How many turns of a loop over convolutions stand in the program: XLA runs those inside a loop many times slower
    than outside on a CPU, because only the entry computation gets the layouts that its kernels take.
    """
    return length if platform == "cpu" else 1


def steps_per_dispatch(platform: str, on_device: bool, most: int) -> int:
    """Steps taken in one dispatch where the config does not say: `most` of them where the images lie on the device of
    an accelerator; 1 on a CPU, where they would be a loop (see `unroll`).
    """
    return most if on_device and platform != "cpu" else 1
