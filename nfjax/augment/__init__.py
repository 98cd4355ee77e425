"""Augmentation on the device: pure functions of a key and a batch, each example with its own randomness.

What changes pixels works on uint8 [B, H, W, C] and gives back the same: `random_crop`, `random_flip`, `rand_augment`,
`random_erasing`. Then `normalize` makes float32 of them, and `mixup` or `cutmix` combines pairs of examples::

    keys = jax.random.split(key, 4)
    images = augment.random_flip(keys[1], augment.random_crop(keys[0], images, padding=4))
    images = augment.rand_augment(keys[2], images, num_operations=2, magnitude=9)
    images, partner, weight = augment.mixup(keys[3], augment.normalize(images, mean, std), alpha=0.2)

Shapes are static and nothing is read but the arguments: the functions may be jitted, and a batch that is divided over
several devices is augmented as it would be on one.
"""

from nfjax.augment._erasing import random_erasing
from nfjax.augment._mixing import Mixed, cutmix, mixup
from nfjax.augment._operations import OPERATIONS, Change, Operation
from nfjax.augment._randaugment import apply, choose, rand_augment
from nfjax.augment._standard import normalize, random_crop, random_flip

__all__ = [
    "OPERATIONS",
    "Change",
    "Mixed",
    "Operation",
    "apply",
    "choose",
    "cutmix",
    "mixup",
    "normalize",
    "rand_augment",
    "random_crop",
    "random_erasing",
    "random_flip",
]


def __dir__() -> list[str]:
    return __all__
