"""What a training step does to images on the device: augmentation, normalisation, mixing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nfjax import augment
from nfjax.training import ranges, rng
from nfjax.training.ranges import Range
from nfjax.training.step import Mix

_MIXING = Range(lambda value: value >= 0, "expected 0, for no mixing, or a positive number")


def _check_colours(name: str, values: Any, scale: bool = False) -> None:
    if len(values) != 3:
        raise ValueError(
            f"{name}={tuple(values)}: expected three numbers, for red, green and blue, such as "
            f"--config.{name}='(0.5, 0.5, 0.5)'"
        )
    values = ranges.check_numbers(name, values)
    if scale and min(map(jnp.float32, values)) <= 0:
        raise ValueError(f"{name}={values}: expected three positive numbers")
    if min(values) < 0 or max(values) > 1:
        scaled = ", ".join(f"{value / 255:.4f}" for value in values)
        hint = f"; on the scale from 0 to 255? divided by it: --config.{name}='({scaled})'" if max(values) > 1 else ""
        raise ValueError(f"{name}={values}: expected three numbers of pixels in [0, 1]{hint}")


RANGES: dict[str, Range] = {
    "data.mean": Range(check=_check_colours),
    "data.std": Range(check=functools.partial(_check_colours, scale=True)),
    "augment.crop_padding": ranges.whole(0, 2**14, "must be 0 or more pixels, for no crop or for a crop"),
    "augment.rand_operations": ranges.whole(0, 32, "must be 0 (for none) or more, and at most 32"),
    "augment.rand_magnitude": ranges.whole(0, 30),
    "augment.rand_fill": ranges.whole(0, 255),
    "augment.erasing_probability": Range(lambda value: 0 <= value <= 1, "must be a probability, from 0 to 1"),
    "augment.mixup_alpha": _MIXING,
    "augment.cutmix_alpha": _MIXING,
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that do not agree with each other or that no function takes."""
    size = config.data.image_size
    if config.augment.crop_padding >= size:
        raise ValueError(
            f"augment.crop_padding={config.augment.crop_padding} must be less than data.image_size={size}: a crop "
            "could lie beside the image"
        )
    key, images = jax.random.key(0), jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
    images = jax.eval_shape(make_preprocess(config), key, images)
    if (mix := make_mix(config)) is not None:
        jax.eval_shape(mix, key, images, jax.ShapeDtypeStruct((2,), jnp.float32))


def make_preprocess(config: ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(key of the step, uint8 [B, H, W, 3]) -> float32 [B, H, W, 3]`, augmented and normalised, for training."""
    augmented, normalize = make_augmentation(config), make_normalize(config)
    return lambda key, images: normalize(augmented(key, images))


def make_normalize(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """`uint8 [B, H, W, 3] -> float32 [B, H, W, 3]`, normalised, for evaluation."""
    return functools.partial(augment.normalize, mean=config.data.mean, std=config.data.std)


def make_augmentation(config: ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(key of the step, uint8 [B, H, W, 3]) -> uint8 [B, H, W, 3]`: what comes before normalising."""
    settings = config.augment

    def augmented(key: jax.Array, images: jax.Array) -> jax.Array:
        if settings.crop_padding:
            images = augment.random_crop(rng.stream(key, "crop"), images, settings.crop_padding)
        if settings.flip:
            images = augment.random_flip(rng.stream(key, "flip"), images)
        if settings.rand_operations:
            images = augment.rand_augment(
                rng.stream(key, "rand_augment"),
                images,
                settings.rand_operations,
                settings.rand_magnitude,
                fill=settings.rand_fill,
                interpolation=settings.rand_interpolation,
            )
        if settings.erasing_probability:
            mean = [round(255 * value) for value in config.data.mean]  # 0 once it is normalised
            erasing = rng.stream(key, "erasing")
            images = augment.random_erasing(erasing, images, settings.erasing_probability, value=mean)
        return images

    return augmented


def make_mix(config: ConfigDict) -> Mix | None:
    """`(key of the step, images, mask) -> (images, partner, weight)`, on normalised images: Mixup, CutMix, or for each
    batch one of the two; None where the config has neither.
    """
    alphas = ((augment.mixup, config.augment.mixup_alpha), (augment.cutmix, config.augment.cutmix_alpha))
    ways = [functools.partial(function, alpha=alpha) for function, alpha in alphas if alpha]

    def mixed(key: jax.Array, images: jax.Array, mask: jax.Array) -> augment.Mixed:
        key = rng.stream(key, "mixing")
        which, weights = rng.stream(key, "which"), rng.stream(key, "weights")
        if len(ways) == 1:
            return ways[0](weights, images, mask=mask)
        first, second = (lambda *args, way=way: way(args[0], args[1], mask=args[2]) for way in ways)
        return jax.lax.cond(jax.random.bernoulli(which, jnp.float32(0.5)), first, second, weights, images, mask)

    return mixed if ways else None
