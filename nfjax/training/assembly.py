"""From the settings of a config to objects: here, and only here, names become functions and numbers become arguments.

Signatures check most of them; `check` does it for all, before anything is written, loaded or decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nfjax import augment, data, resnet
from nfjax.data.decoding import crops
from nfjax.data.identity import identity
from nfjax.data.loading import memory, skips, stream
from nfjax.training import feed as feeds
from nfjax.training import footprint, ranges
from nfjax.training import optimizers as optim
from nfjax.training import sharding as meshes
from nfjax.training.step import Mix

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
KEEP = ("device", "host", "disk")
Feed = feeds.OnDevice | feeds.FromHost
# Bytes of an activation of the first stage for which a CPU's caches suffice, and parts of a batch that still pay, by
# benchmarks/tried.md.
CACHED = 4 * 2**20
CPU_PARTS = (1, 2, 4)


def check(config: ConfigDict) -> None:
    """ValueError for settings that cannot work, before anything is written or loaded."""
    ranges.check(config)
    parts = jax.device_count() * config.train.accumulate_steps
    if config.batch_size % parts:
        near = max(config.batch_size // parts, 1) * parts
        accumulated = f" in {config.train.accumulate_steps} parts" if config.train.accumulate_steps > 1 else ""
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided over {jax.device_count()} devices{accumulated}; choose "
            f"a multiple, such as --config.batch_size={near}, or another --config.train.accumulate_steps"
        )
    try:
        meshes.make(config.train.state_shards)
    except ValueError as error:
        raise ValueError(f"train.state_shards={config.train.state_shards}: {error}") from None
    if config.model.dtype not in DTYPES:
        raise ValueError(f"unknown model.dtype={config.model.dtype!r}: expected one of {', '.join(DTYPES)}")
    if config.optim.warmup_epochs > config.epochs:
        raise ValueError(f"optim.warmup_epochs={config.optim.warmup_epochs} must be from 0 to epochs={config.epochs}")
    if config.augment.crop_padding >= config.data.image_size:
        raise ValueError(
            f"augment.crop_padding={config.augment.crop_padding} must be less than "
            f"data.image_size={config.data.image_size}: a crop could lie beside the image"
        )
    if config.data.resize is not None and config.data.resize < config.data.image_size:
        raise ValueError(
            f"data.resize={config.data.resize}: a square of {config.data.image_size} pixels cannot be cut out of an "
            f"image whose short side has {config.data.resize}; expected at least data.image_size, or none for it"
        )
    every = config.log.signal_every_steps
    if every is not None and every % config.log.every_steps:
        raise ValueError(
            f"log.signal_every_steps={every} must be a positive multiple of log.every_steps={config.log.every_steps}"
        )
    if config.data.keep not in KEEP:
        raise ValueError(f"unknown data.keep={config.data.keep!r}: expected one of {', '.join(KEEP)}")
    if (config.steps_per_dispatch or 1) > 1 and config.data.keep != "device":
        raise ValueError(
            f"steps_per_dispatch={config.steps_per_dispatch} must be positive, and 1 unless data.keep=device"
        )
    if config.augment.resized_crop_scale is not None and config.data.keep != "disk":
        raise ValueError(
            f"augment.resized_crop_scale={tuple(config.augment.resized_crop_scale)} needs the original images: set "
            "--config.data.keep=disk"
        )
    _check_memory(config)
    for name in ("train", "test"):
        make_transform(config, name)
    size = config.data.image_size
    shaped = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
    shaped = jax.eval_shape(preprocessing(config, train=True), jax.random.key(0), shaped)
    if (mix := mixing(config)) is not None:
        jax.eval_shape(mix, jax.random.key(0), shaped, jax.ShapeDtypeStruct((2,), jnp.float32))
    # A wrong name in the model or the optimizer is found here, at no cost, and not after the images are decoded.
    nnx.eval_shape(lambda: build_model(config, num_classes=2, key=jax.random.key(0)))
    build_optimizer(config, epoch_ends=[1])
    data.loader(config.data.source)


def _check_memory(config: ConfigDict) -> None:
    """ValueError for sizes that are beyond any doubt too large for a device, from shapes alone."""
    there = footprint.available(jax.local_devices()[0])
    if there is None:
        return
    images = config.batch_size // jax.device_count() * config.data.image_size**2 * 3 * 4  # in float32
    _check_fits("a device's part of a batch, in float32", images, there, config, ("batch_size", "data.image_size"))
    encoded = (config.data.ahead or 1) * config.batch_size // jax.process_count() * config.data.image_size**2 * 3
    _check_fits("the batches decoded ahead", encoded, there * jax.local_device_count(), config, ("data.ahead",))
    # Zeros: random numbers are drawn in blocks, of which large kernels have too many for a check.
    settings = config.model.to_dict() | {"init": jax.nn.initializers.zeros}
    model = nnx.eval_shape(lambda: build_model(config, num_classes=2, key=jax.random.key(0), settings=settings))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    state = 4 * numbers + 8 * numbers // config.train.state_shards  # the gradient; parameters and momentum
    _check_fits(f"{numbers:,} parameters with their gradient", state, there, config, ("model.width", "model.depth"))


def _check_fits(what: str, needed: int, there: int, config: ConfigDict, names: Sequence[str]) -> None:
    if needed > there:
        values = ", ".join(f"{name}={functools.reduce(getattr, name.split('.'), config)}" for name in names)
        raise ValueError(
            f"{values}: {what} would take {needed / 2**30:,.0f} GiB, of {there / 2**30:,.1f} GiB that there are: "
            "choose less"
        )


def count_parts(config: ConfigDict) -> int:
    """In how many parts a step computes its batch: as many as the config says, but on CPU more than one where that lets
    a part stay in the caches. Not with batch norm, whose statistics are those of a part.
    """
    given = config.train.accumulate_steps
    if given > 1 or jax.default_backend() != "cpu" or config.model.norm not in (None, "none"):
        return given
    batch = config.batch_size // jax.device_count()
    side = config.data.image_size // (4 if config.model.stem == "imagenet" else 1)
    depth = config.model.depth if config.model.stage_sizes is None else None
    block, _ = resnet.stages(depth, config.model.stage_sizes, config.model.block)
    features = config.model.width * block.expansion
    activation = batch * side**2 * features * jnp.dtype(DTYPES[config.model.dtype]).itemsize
    dividing = [n for n in CPU_PARTS if batch % n == 0]
    return next((n for n in dividing if activation / n <= CACHED), dividing[-1])


def build_model(
    config: ConfigDict, num_classes: int, key: jax.Array, settings: dict[str, Any] | None = None
) -> nnx.Module:
    """The network that a config describes, its parameters drawn from `key`. settings: instead of `config.model`."""
    settings = dict(config.model.to_dict() if settings is None else settings)
    if settings["stage_sizes"] is not None:
        settings["depth"] = None
    settings["norm"] = None if settings["norm"] == "none" else settings["norm"]
    settings["dtype"] = DTYPES[settings["dtype"]]
    rngs = nnx.Rngs(params=key)
    return resnet.PreActResNet(**settings, num_classes=num_classes, image_size=config.data.image_size, rngs=rngs)


def build_optimizer(
    config: ConfigDict, epoch_ends: Sequence[int]
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config, and its learning rate by step. epoch_ends: the step at which each epoch is done."""
    settings = config.optim
    scale = config.batch_size / (settings.reference_batch_size or config.batch_size)
    peak, warmup = settings.learning_rate * scale, settings.warmup_epochs * epoch_ends[-1] / len(epoch_ends)
    schedules = {
        "epoch": lambda: optim.cosine_by_epoch(peak, epoch_ends),
        "step": lambda: optim.cosine_by_step(peak, epoch_ends[-1]),
    }
    if settings.anneal not in schedules:
        raise ValueError(f"unknown optim.anneal={settings.anneal!r}: expected one of {', '.join(schedules)}")
    schedule = optim.warmed_up(schedules[settings.anneal](), round(warmup))
    clipping = {"clip_norm": settings.clip_norm, "adaptive_clip": settings.adaptive_clip}
    return optim.sgd(schedule, settings.momentum, settings.weight_decay, **clipping), schedule


def open_data(config: ConfigDict, directory: str) -> data.Dataset:
    """The data set of a config: decoded into memory, or as it lies on the disk, whatever the config says.

    Its identity is that of what it was decoded from.
    """
    dataset = data.load(config.data.source, directory, config.data.image_size).thinned(config.data.share)
    dataset = dataclasses.replace(dataset, identity=functools.partial(identity, dataset))
    if config.data.keep == "disk":
        if isinstance(dataset.train, data.Images):
            raise ValueError(
                f"data.keep=disk: {config.data.source} has no image files to decode; set --config.data.keep=device"
            )
        return dataset
    size, upright = config.data.image_size, _upright(config)
    cut, middle = crops.CentreCrop(size, size, upright), crops.CentreCrop(size, config.data.resize or size, upright)
    decoded = memory.decoded(dataset, cut, middle, config.data.max_skipped)
    return dataclasses.replace(decoded, identity=dataset.identity)


def make_transform(config: ConfigDict, name: str) -> stream.Transform:
    """What the host does to each encoded image of the split "train" or "test"."""
    size, scale = config.data.image_size, config.augment.resized_crop_scale
    if name == "train" and scale is not None:
        ratio = tuple(config.augment.resized_crop_ratio)
        return crops.RandomResizedCrop(size, tuple(scale), ratio, config.seed, _upright(config))
    resize = config.data.resize if name == "test" else None
    return crops.CentreCrop(size, resize or size, _upright(config))


def _upright(config: ConfigDict) -> bool:
    return getattr(config.data, "exif_orientation", False)  # runs of earlier versions do not have it


def first_images(config: ConfigDict, split: data.Encoded) -> np.ndarray:
    """The middle of the first images of a split that can be read, a batch of them, uint8 [B, H, W, 3].

    What cannot be read is named where training meets it. Raises ValueError where nothing can be read.
    """
    middle, images = crops.CentreCrop(config.data.image_size, config.data.image_size, _upright(config)), []
    for index in range(len(split)):
        with contextlib.suppress(Exception):  # any file may be bad in any way
            images.append(middle(split.reader(split.reference(index))[0]).copy())
        if len(images) == config.batch_size:
            break
    if not images:
        raise ValueError(f"none of the {len(split)} training images can be read, {split.name(0)} the first")
    return np.stack(images)


def make_feed(config: ConfigDict, dataset: data.Dataset, name: str, mesh: Mesh, folder: pathlib.Path | None) -> Feed:
    """Batches of the split "train" or "test" from where the config keeps the images. folder: gets skipped.jsonl."""
    split = getattr(dataset, name)
    if isinstance(split, data.Images):
        return feeds.OnDevice(split, mesh) if config.data.keep == "device" else feeds.FromHost(feeds.taken(split), mesh)
    size = config.data.image_size
    skipped = skips.Skips(name, split.name, len(split), config.data.max_skipped, folder)

    def streamed(orders: Iterator[data.Order]) -> Iterator[feeds.HostBatch]:
        wanted: list[int] = []

        def noted() -> Iterator[data.Order]:
            for order in orders:
                wanted.append(int(order.mask.sum()))
                yield order

        shape, transform = (size, size, 3), make_transform(config, name)
        batches = stream.stream(split, transform, shape, noted(), skipped, config.data.workers, config.data.ahead)
        try:
            for number, batch in enumerate(batches):
                skipped.check(int(batch["mask"].sum()), wanted[number])
                yield batch
        finally:
            batches.close()

    return feeds.FromHost(streamed, mesh)


def augmentation(config: ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(key, images) -> images`, uint8 [B, H, W, 3]: what a training step does to images before normalising."""
    settings = config.augment

    def augmented(key: jax.Array, images: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        if settings.crop_padding:
            images = augment.random_crop(crop_key, images, settings.crop_padding)
        if settings.flip:
            images = augment.random_flip(flip_key, images)
        if settings.rand_operations:
            images = augment.rand_augment(
                jax.random.fold_in(key, 2),
                images,
                settings.rand_operations,
                settings.rand_magnitude,
                fill=settings.rand_fill,
                interpolation=settings.rand_interpolation,
            )
        if settings.erasing_probability:
            mean = [round(255 * value) for value in config.data.mean]  # 0 once it is normalised
            images = augment.random_erasing(
                jax.random.fold_in(key, 3), images, settings.erasing_probability, value=mean
            )
        return images

    return augmented


def preprocessing(config: ConfigDict, train: bool) -> Callable[..., jax.Array]:
    """uint8 [B, H, W, 3] to normalised float32: `(key, images)` with augmentation for training, `(images)` for
    evaluation.
    """
    augmented = augmentation(config)

    def normalize(images: jax.Array) -> jax.Array:
        return augment.normalize(images, config.data.mean, config.data.std)

    return (lambda key, images: normalize(augmented(key, images))) if train else normalize


def mixing(config: ConfigDict) -> Mix | None:
    """`(key, images, mask) -> (images, partner, weight)`, on normalised images: Mixup, CutMix, or for each batch one of
    the two; None where the config has neither.
    """
    mixup_alpha, cutmix_alpha = config.augment.mixup_alpha, config.augment.cutmix_alpha
    ways = [
        functools.partial(function, alpha=alpha)
        for function, alpha in ((augment.mixup, mixup_alpha), (augment.cutmix, cutmix_alpha))
        if alpha
    ]

    def mixed(key: jax.Array, images: jax.Array, mask: jax.Array) -> augment.Mixed:
        way_key, key = jax.random.split(jax.random.fold_in(key, 4))
        if len(ways) == 1:
            return ways[0](key, images, mask=mask)
        first, second = (lambda *args, way=way: way(args[0], args[1], mask=args[2]) for way in ways)
        return jax.lax.cond(jax.random.bernoulli(way_key, jnp.float32(0.5)), first, second, key, images, mask)

    return mixed if ways else None
