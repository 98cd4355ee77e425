"""What is done differently on a CPU, each with its reason.

Every function takes the platform that a program is made for ("cpu", "gpu", "tpu"), never that of the machine that
traces it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh

# Bytes of an activation of the first stage for which a CPU's caches suffice, and parts of a batch that still pay, as
# measured for docs/results/speed.md.
CACHED = 4 * 2**20
PARTS = (1, 2, 4)


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
