"""The random streams of a run, by name, and the one rule by which a key is split.

Whatever is random on the device follows from (seed, step) alone, so a run that was stopped goes on exactly: nothing of
a generator is ever saved. A run has the streams "init" and "training", a step of training has those of its
augmentation, its mixing and the network's own noise:

    seed -> init
         -> training -> fold_in(step) -> crop, flip, rand_augment, erasing, mixing (-> which, weights), noise

What is random on the host, the order of the examples and the boxes of random crops, follows from (seed, epoch) and
(seed, position) in the same way: see `nfjax.data`.
"""

from __future__ import annotations

import jax

# Each name's number among the streams of its key. A number is never changed or used again: results would change.
STREAMS = {
    "init": 0,
    "training": 1,
    "crop": 0,
    "flip": 1,
    "rand_augment": 2,
    "erasing": 3,
    "mixing": 4,
    "noise": 5,
    "which": 0,
    "weights": 1,
}


def stream(key: jax.Array, name: str) -> jax.Array:
    """The key of a named stream of `key`.

    Raises:
        KeyError: There is no stream of this name.
    """
    return jax.random.fold_in(key, STREAMS[name])


def of_seed(seed: int, name: str) -> jax.Array:
    """The key of the stream "init" or "training" of a run with this seed."""
    return stream(jax.random.key(seed), name)


def of_step(training: jax.Array, step: jax.Array | int) -> jax.Array:
    """The key of a step, from that of the stream "training"."""
    return jax.random.fold_in(training, step)
