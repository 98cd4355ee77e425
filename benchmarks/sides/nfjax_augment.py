"""nfjax.augment: RandAugment with choices that are told, and its time beside other forms of the same function."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sides import nfjax
from nfjax import augment
from nfjax.augment import _color, _geometry, _operations

BINS = 31
CHUNK = 4096  # images per call of an operation
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
machine = nfjax.machine
Form = Callable[[jax.Array, jax.Array], jax.Array]  # (key, uint8 [B, H, W, 3]) -> uint8 [B, H, W, 3]


class RandAugment:
    """As `benchmarks.sides.torchvision.RandAugment`, on the device."""

    def load(self, images: str) -> None:
        """images: a .npy file of uint8 [B, H, W, 3]."""
        self.images = np.load(images)

    def names(self) -> list[str]:
        """Of the operations, those first that move pixels and interpolate."""
        return [*GEOMETRIC, *(name for name in augment.OPERATIONS if name not in GEOMETRIC)]

    def operation(self, output: str, name: str, interpolation: str, fill: list[int]) -> None:
        """Every bin with both signs, to a .npy file of uint8 [bins * 2 * B, H, W, 3]."""
        position = list(augment.OPERATIONS).index(name)
        settings = [(i, sign) for i in range(BINS) for sign in (1, -1)]
        columns = zip(*settings, strict=True)
        bins, signs = (np.repeat(column, len(self.images)).astype(np.int32) for column in columns)
        apply, found = jitted_apply(interpolation, tuple(fill)), []
        for start in range(0, len(bins), CHUNK):
            # The last chunk is as long as the others, so that all are one program.
            at = np.minimum(np.arange(start, start + CHUNK), len(bins) - 1)
            chosen = np.full(CHUNK, position, np.int32)
            made = apply(self.images[at % len(self.images)], chosen, bins[at], signs[at])
            found.append(np.asarray(made)[: len(bins) - start])
        np.save(output, np.concatenate(found))

    def policy(self, output: str, seed: int, magnitude: int, interpolation: str, fill: list[int]) -> dict[str, Any]:
        """RandAugment with two operations, to a .npy file; returns the operations and signs that were drawn."""
        key, fill = jax.random.key(seed), tuple(fill)
        settings = {"magnitude": magnitude, "fill": fill, "interpolation": interpolation}
        np.save(output, jax.jit(functools.partial(augment.rand_augment, **settings))(key, self.images))
        chosen, signs = (np.asarray(x).tolist() for x in augment.choose(key, len(self.images), 2))
        names = list(augment.OPERATIONS)
        return {"operations": [[names[i] for i in row] for row in chosen], "signs": signs}

    def milliseconds(self, rounds: int) -> dict[str, float]:
        """Of each form for all images, medians; in turn, so that whatever else the machine does falls on all."""
        key, images = jax.random.key(0), jnp.asarray(self.images)
        compiled = {name: jax.jit(form) for name, form in forms(images.shape[1]).items()}
        expected = compiled["rand_augment, nearest"](key, images)
        for name in ("vmap(switch), nearest", "lax.map(switch), nearest"):
            np.testing.assert_array_equal(compiled[name](key, images), expected)
        times: dict[str, list[float]] = {name: [] for name in compiled}
        for _ in range(1 + rounds):
            for name, form in compiled.items():
                start = time.perf_counter()
                jax.block_until_ready(form(key, images))
                times[name].append(1e3 * (time.perf_counter() - start))
        return {name: statistics.median(values[1:]) for name, values in times.items()}

    def training_step(self, rounds: int, dtype: str) -> float:
        """Milliseconds of a step of a ResNet-18, width 64, on a batch of 128 images of 32x32."""
        steps = nfjax.Steps()
        steps.prepare(classes=10, depth=18, residual="convshort", batch=128, dtype=dtype)
        return statistics.median(1e3 * steps.take(1) for _ in range(rounds))


@functools.cache
def jitted_apply(interpolation: str, fill: tuple[int, ...]) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(augment.apply, fill=fill, interpolation=interpolation))


def forms(size: int) -> dict[str, Form]:
    """What is timed on images of `size` pixels a side."""
    found: dict[str, Form] = {"crop, flip, normalise": crop_flip_normalize}
    for interpolation in _geometry.INTERPOLATIONS:
        found |= {
            f"rand_augment, {interpolation}": functools.partial(augment.rand_augment, interpolation=interpolation),
            f"vmap(switch), {interpolation}": by_switch(lambda f, x: jax.vmap(f)(x), size, interpolation),
            f"lax.map(switch), {interpolation}": by_switch(jax.lax.map, size, interpolation),
        }
    found["histogram by scatter"] = lambda key, images: _color.histogram_by_scatter(images)
    # On a CPU the other way takes many seconds for the larger images.
    if jax.default_backend() != "cpu" or size < 64:
        found["histogram by comparison"] = lambda key, images: _color.histogram_by_comparison(images)
    return found


def crop_flip_normalize(key: jax.Array, images: jax.Array) -> jax.Array:
    keys = jax.random.split(key)
    images = augment.random_flip(keys[1], augment.random_crop(keys[0], images, 4))
    return augment.normalize(images, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


def by_switch(loop: Callable, size: int, interpolation: str) -> Form:
    """`rand_augment` with a `switch` for each image. loop: `(function, arrays) -> array` over the images."""
    branches = [branch(name, size, 9, interpolation) for name in augment.OPERATIONS]

    def function(key: jax.Array, images: jax.Array) -> jax.Array:
        chosen, signs = augment.choose(key, images.shape[0], 2)
        for i in range(2):
            is_negative = (signs[i] < 0).astype(jnp.int32)
            images = loop(lambda x: jax.lax.switch(x[1], branches, x[0], x[2]), (images, chosen[i], is_negative))
        return images

    return function


def branch(name: str, size: int, magnitude: int, interpolation: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(image, is_negative) -> image`: one operation and nothing else, on uint8 [H, W, 3]."""
    table = _operations.numbers_of_changes((augment.OPERATIONS[name],), BINS, size, size, interpolation)
    table = {key: values[0, magnitude] for key, values in table.items()}

    def alone(image: jax.Array, is_negative: jax.Array) -> jax.Array:
        images, number = image[None], {key: jnp.asarray(values)[is_negative][None] for key, values in table.items()}
        factor = number["factor"][:, None, None, None]
        if name in GEOMETRIC:
            images = _geometry.resample(images, number["matrix"], (0, 0, 0), interpolation)
        elif name == "autocontrast":
            images = _color.apply_table(images, _color.autocontrast_table(_color.histogram(images)))
        elif name == "equalize":
            images = _color.apply_table(images, _color.equalize_table(_color.histogram(images)))
        elif name in ("posterize", "solarize"):
            images = _color.posterize_solarize(images, number["mask"], number["threshold"])
        elif name == "brightness":
            images = _color.blend(jnp.zeros_like(images, jnp.int32), images, factor)
        elif name == "contrast":
            images = _color.blend(_color.mean_grey(images)[:, None, None, None], images, factor)
        elif name == "color":
            images = _color.blend(_color.grey(images)[..., None], images, factor)
        elif name == "sharpness":
            images = _color.blend(_color.smooth(images), images, factor)
        return images[0]

    return alone


MEASURES = {"augmentation": RandAugment}
