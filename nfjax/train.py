"""The training loop: reads a config, writes a workdir.

The workdir holds config.json, data.json (class names, sizes, skipped files), versions.json (one entry per start),
parameters.txt, metrics.jsonl, TensorBoard events, checkpoints/, damaged_checkpoints/ where there are any, and
curves.png. Whatever is random or ordered in a run follows from (seed, step), so a run that was stopped goes on from its
newest checkpoint as if it had never been stopped.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nfjax import augment, checkpoint, cost, data, metrics, optim, resnet, spp, steps
from nfjax import feed as feeds
from nfjax import workdir as workdirs
from nfjax.data import crops, memory, skips, stream
from nfjax.progress import Bar, Interrupts, Progress
from nfjax.steps import State, Sums

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
KEEP = ("device", "host", "disk")
Feed = feeds.OnDevice | feeds.FromHost


class TrainingDivergedError(RuntimeError):
    """The loss, its gradient or the update stopped being finite."""


class TrainingInterruptedError(RuntimeError):
    """Ctrl-C: the run was saved and can go on."""


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains what `config` describes, or goes on where the run in `workdir` stopped; prints a summary and returns it.

    The summary: "steps", "test_accuracy" at the end, "best_test_accuracy" and "best_epoch" of all epochs.

    Raises ValueError or OSError for settings, data or a workdir that cannot be used, TrainingDivergedError,
    TrainingInterruptedError.
    """
    check(config)
    folder = workdirs.open_for(config, workdir)
    dataset = open_data(config, config.data.dir)
    size = len(dataset.train)
    if size < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {size} training images; choose a smaller one"
        )
    workdirs.start(folder, config, dataset)

    mesh = make_mesh()
    init_key, augment_key = jax.random.split(jax.random.key(config.seed))
    model = build_model(config, len(dataset.class_names), init_key)
    print(header(config, folder, dataset, model), flush=True)
    network, params, batch_stats = steps.as_functions(model)
    workdirs.note_parameters(folder, params)
    progress = Progress(size, config.batch_size, config.epochs, config.log.every_steps)
    optimizer, schedule = build_optimizer(config, progress.epoch_ends)
    state = jax.device_put(steps.initial_state(params, batch_stats, optimizer), NamedSharding(mesh, PartitionSpec()))
    del model, params, batch_stats

    checkpoints = checkpoint.Checkpoints(folder, config.checkpoint.keep)
    restored = checkpoints.restore_newest(checkpoint.template({"state": state, "sums": progress.sums}))
    if restored is not None:
        progress.step, tree = restored
        state, progress.sums = tree["state"], tree["sums"]
        print(f"resumed at step {progress.step:,}, epoch {progress.epoch:.2f}", flush=True)
    workdirs.note_start(folder, progress.step)

    train_step = steps.make_train_step(
        network, optimizer, preprocessing(config, train=True), augment_key, config.optim.label_smoothing
    )
    train_feed = make_feed(config, dataset, "train", mesh, folder)
    test_feed = make_feed(config, dataset, "test", mesh, folder)
    run_steps = make_runner(config, train_feed, train_step, size, progress.total)
    evaluate = make_evaluation(config, test_feed, network, len(dataset.test))
    measure_signal = make_signal_measurement(config, dataset.train, network)
    writer = metrics.Writer(folder, progress.step)
    if measure_signal and progress.step == 0:
        writer.write("signal", 0, measure_signal(state))
    start = time.perf_counter()
    try:
        with Interrupts() as interrupts, Bar(progress) as bar:
            while progress.step < progress.total and not interrupts.pending:
                stop = progress.next_stop()
                parts = []
                for after, sums in run_steps(state, progress.step, stop):
                    state = after
                    parts.append(sums)
                    bar.advance(np.size(sums["count"]))
                    if interrupts.pending:
                        break
                sums = steps.fetch(parts)
                bar.settle()
                first, progress.step = progress.step, progress.step + len(sums["count"])
                # A step that was not finite did not count, nor did any behind it: see make_train_step.
                if (reached := int(state["step"])) < progress.step:
                    raise TrainingDivergedError(divergence(reached, sums, reached - first, checkpoints, config))
                progress.add(sums)
                if progress.step < stop:
                    break  # interrupted between two log steps
                values = progress.take("interval")
                values = {"epoch": progress.epoch, "learning_rate": float(schedule(progress.step - 1))} | values
                waited, train_feed.waited = train_feed.waited, 0.0
                values |= {"images_per_second": round(bar.rate, 1), "data_wait": round(waited / bar.seconds, 4)}
                writer.write("train", progress.step, values)
                if measure_signal and progress.step % config.log.signal_every_steps == 0:
                    writer.write("signal", progress.step, measure_signal(state))
                bar.show(values)
                if (number := progress.epochs_ended()) is None:
                    continue
                tested = evaluate(state)
                if not np.isfinite(tested["loss"]):
                    raise TrainingDivergedError(
                        advice(f"after epoch {number} the test loss is not finite", checkpoints)
                    )
                values = {"epoch": number, **prefixed("train", progress.take("epoch")), **prefixed("test", tested)}
                writer.write("epoch", progress.step, values)
                bar.line(values)
                if number % config.checkpoint.every_epochs == 0 or progress.step == progress.total:
                    checkpoints.save(progress.step, {"state": state, "sums": progress.sums}, tested["accuracy"])
            checkpoints.wait()
            if progress.step < progress.total:
                if progress.step not in checkpoints.steps():
                    checkpoints.save(progress.step, {"state": state, "sums": progress.sums})
                    checkpoints.wait()
                raise TrainingInterruptedError(
                    f"interrupted: saved at step {progress.step:,} of {progress.total:,} in {folder}; the same "
                    "command goes on from there"
                )
            best_step = checkpoints.best_step()
    finally:
        train_feed.close()
        test_feed.close()
        writer.close()
        checkpoints.close()
    return finish(config, folder, dataset, best_step, time.perf_counter() - start, bar.overall_rate)


# ---------------------------------------------------------------- from settings to objects


def check(config: ConfigDict) -> None:
    """ValueError for settings that cannot work, before anything is written or loaded."""
    for name in ("batch_size", "epochs", "log.every_steps", "checkpoint.every_epochs", "checkpoint.keep"):
        value = functools.reduce(getattr, name.split("."), config)
        if value < 1:
            raise ValueError(f"{name}={value} must be positive")
    if config.batch_size % jax.device_count():
        near = max(config.batch_size // jax.device_count(), 1) * jax.device_count()
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided over {jax.device_count()} devices; choose a multiple, "
            f"such as --config.batch_size={near}"
        )
    if config.model.dtype not in DTYPES:
        raise ValueError(f"unknown model.dtype={config.model.dtype!r}: expected one of {', '.join(DTYPES)}")
    for name, values in (("mean", config.data.mean), ("std", config.data.std)):
        if len(values) != 3:
            raise ValueError(f"data.{name}={tuple(values)}: expected three numbers, for red, green and blue")
    if min(config.data.std) <= 0:
        raise ValueError(f"data.std={tuple(config.data.std)}: expected three positive numbers")
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must be 0 or more")
    if not config.optim.learning_rate > 0:
        raise ValueError(f"optim.learning_rate={config.optim.learning_rate} must be positive")
    if not 0 <= config.optim.momentum < 1:
        raise ValueError(f"optim.momentum={config.optim.momentum} must be at least 0 and less than 1")
    for name, value in (("clip_norm", config.optim.clip_norm), ("adaptive_clip", config.optim.adaptive_clip)):
        if value is not None and not value > 0:
            raise ValueError(f"optim.{name}={value} must be positive, or left out for no clipping")
    if config.augment.crop_padding < 0:
        raise ValueError(f"augment.crop_padding={config.augment.crop_padding} must be 0 or more pixels")
    if not 0 <= config.optim.label_smoothing < 1:
        raise ValueError(f"optim.label_smoothing={config.optim.label_smoothing} must be at least 0 and less than 1")
    every = config.log.signal_every_steps
    if every is not None and (every < 1 or every % config.log.every_steps):
        raise ValueError(
            f"log.signal_every_steps={every} must be a positive multiple of log.every_steps={config.log.every_steps}"
        )
    if config.steps_per_dispatch is not None and (
        config.steps_per_dispatch < 1 or (config.steps_per_dispatch > 1 and config.data.keep != "device")
    ):
        raise ValueError(
            f"steps_per_dispatch={config.steps_per_dispatch} must be positive, and 1 unless data.keep=device"
        )
    if config.data.keep not in KEEP:
        raise ValueError(f"unknown data.keep={config.data.keep!r}: expected one of {', '.join(KEEP)}")
    if config.augment.resized_crop_scale is not None and config.data.keep != "disk":
        raise ValueError(
            f"augment.resized_crop_scale={tuple(config.augment.resized_crop_scale)} needs the original images: set "
            "--config.data.keep=disk"
        )
    for name, least in (("workers", 1), ("ahead", 1)):
        value = getattr(config.data, name)
        if value is not None and value < least:
            raise ValueError(f"data.{name}={value} must be at least {least}")
    if not 0 <= config.data.max_skipped <= 1:
        raise ValueError(f"data.max_skipped={config.data.max_skipped} must be a share, from 0 to 1")
    for name in ("train", "test"):
        make_transform(config, name)
    if config.augment.rand_operations < 0:
        raise ValueError(f"augment.rand_operations={config.augment.rand_operations} must be 0 (for none) or more")
    size = config.data.image_size
    jax.eval_shape(augmentation(config), jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8))
    # A wrong name in the model or the optimizer is found here, at no cost, and not after the images are decoded.
    nnx.eval_shape(lambda: build_model(config, num_classes=2, key=jax.random.key(0)))
    build_optimizer(config, epoch_ends=[1])
    data.loader(config.data.source)


def make_mesh() -> Mesh:
    """All devices on one axis, "data": a batch is divided over it, parameters are replicated."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def build_model(config: ConfigDict, num_classes: int, key: jax.Array) -> nnx.Module:
    """The network that a config describes, its parameters drawn from `key`."""
    settings = config.model.to_dict()
    settings["norm"] = None if settings["norm"] == "none" else settings["norm"]
    settings["dtype"] = DTYPES[settings["dtype"]]
    rngs = nnx.Rngs(params=key)
    return resnet.PreActResNet(**settings, num_classes=num_classes, image_size=config.data.image_size, rngs=rngs)


def build_optimizer(
    config: ConfigDict, epoch_ends: Sequence[int]
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config, and its learning rate by step. epoch_ends: the step at which each epoch is done."""
    settings = config.optim
    schedules = {
        "epoch": lambda: optim.cosine_by_epoch(settings.learning_rate, epoch_ends),
        "step": lambda: optim.cosine_by_step(settings.learning_rate, epoch_ends[-1]),
    }
    if settings.anneal not in schedules:
        raise ValueError(f"unknown optim.anneal={settings.anneal!r}: expected one of {', '.join(schedules)}")
    schedule = schedules[settings.anneal]()
    clipping = {"clip_norm": settings.clip_norm, "adaptive_clip": settings.adaptive_clip}
    return optim.sgd(schedule, settings.momentum, settings.weight_decay, **clipping), schedule


def open_data(config: ConfigDict, directory: str) -> data.Dataset:
    """The data set of a config: decoded into memory, or as it lies on the disk, whatever the config says."""
    dataset = data.load(config.data.source, directory, config.data.image_size)
    if config.data.keep == "disk":
        if isinstance(dataset.train, data.Images):
            raise ValueError(
                f"data.keep=disk: {config.data.source} has no image files to decode; set --config.data.keep=device"
            )
        return dataset
    size = config.data.image_size
    cut, middle = crops.CentreCrop(size, size), crops.CentreCrop(size, config.data.resize or size)
    return memory.decoded(dataset, cut, middle, config.data.max_skipped)


def make_transform(config: ConfigDict, name: str) -> stream.Transform:
    """What the host does to each encoded image of the split "train" or "test"."""
    size, scale = config.data.image_size, config.augment.resized_crop_scale
    if name == "train" and scale is not None:
        return crops.RandomResizedCrop(size, tuple(scale), tuple(config.augment.resized_crop_ratio), config.seed)
    resize = config.data.resize if name == "test" else None
    return crops.CentreCrop(size, resize or size)


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
                skipped.check()
                skipped.check_batch(int(batch["mask"].sum()), wanted[number])
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


def make_runner(
    config: ConfigDict, feed: Feed, train_step: steps.Step, size: int, last: int
) -> Callable[[State, int, int], Iterator[tuple[State, Sums]]]:
    """`run(state, step, stop)` trains from `step` to `stop` and yields the state and the sums of each dispatch.

    size: of the training split. last: step at which the run ends. Each call goes on where the one before it stopped.
    """
    per_dispatch = config.steps_per_dispatch
    if per_dispatch is None:
        many_pay = config.data.keep == "device" and jax.default_backend() != "cpu"
        per_dispatch = config.log.every_steps if many_pay else 1
    items: Iterator[feeds.Item] | None = None
    before: Sums | None = None

    def idle() -> bool:
        return before is None or all(x.is_ready() for x in before.values())

    def run_each(state: State, step: int, stop: int) -> Iterator[tuple[State, Sums]]:
        nonlocal items, before
        if items is None:
            items = feed.items(data.train_orders(config.seed, size, config.batch_size, step, last), idle)
        for number in range(step, stop):
            item = next(items)
            running = before
            state, before = each(state, item, step=np.int32(number))
            # One step runs while the next is prepared, and no more: the bar and Ctrl-C stay close to the device.
            jax.block_until_ready(running)
            yield state, before

    def run_many(state: State, step: int, stop: int) -> Iterator[tuple[State, Sums]]:
        for number in range(step, stop, per_dispatch):
            taken = min(per_dispatch, stop - number)
            indices = data.train_indices(config.seed, size, config.batch_size, number, taken)
            state, sums = many(state, indices, number)
            yield state, sums

    if per_dispatch > 1:
        many = feed.many(train_step, per_dispatch)
        return run_many
    each = feed.each(train_step, donate=True)
    return run_each


def make_evaluation(
    config: ConfigDict, feed: Feed, network: steps.Network, size: int
) -> Callable[[State], dict[str, float]]:
    """`evaluate(state) -> {"loss", "accuracy", "images"}` over all `size` examples of the feed, each counted exactly
    once, but for those that cannot be read.
    """
    step = feed.each(steps.make_eval_step(network, preprocessing(config, train=False)), donate=False)
    devices = jax.device_count()
    batch_size = -(-config.batch_size // devices) * devices

    def evaluate(state: State) -> dict[str, float]:
        sums = steps.fetch([step(state, item) for item in feed.items(data.eval_orders(size, batch_size))])
        totals = {name: values.sum(dtype=np.float64) for name, values in sums.items()}
        return metrics.means(totals) | {"images": int(totals["count"])}

    return evaluate


def make_signal_measurement(
    config: ConfigDict, split: data.Images | data.Encoded, network: steps.Network
) -> Callable[[State], dict[str, float]] | None:
    """`measure(state)` gives the forward and backward variance of every block on the first examples of the split,
    without augmentation; None where the config asks for none.
    """
    if config.log.signal_every_steps is None:
        return None
    if isinstance(split, data.Images):
        images = split.images[: config.batch_size]
    else:
        middle = crops.CentreCrop(config.data.image_size, config.data.image_size)
        first = range(min(config.batch_size, len(split)))
        images = np.stack([middle(split.reader(split.reference(i))[0]) for i in first])
    images = preprocessing(config, train=False)(jnp.asarray(images))
    monitor = spp.Monitor(images, seed=config.seed)

    def measure(state: State) -> dict[str, float]:
        # Parameters are replicated: the copy of one device is enough.
        here = jax.tree.map(lambda x: x.addressable_data(0), (state["params"], state["batch_stats"]))
        return spp.scalars(monitor(network.model(*here)))

    return measure


# ---------------------------------------------------------------- what a run says


def header(config: ConfigDict, folder: pathlib.Path, dataset: data.Dataset, model: nnx.Module) -> str:
    """What is about to be trained, on what, where."""
    size = config.data.image_size
    spent = cost.count(model, (1, size, size, 3))
    norm = f" with {config.model.norm} norm" if config.model.norm else " without normalization"
    device = jax.devices()[0]
    return (
        f"model   ResNet-{config.model.depth} {config.model.residual}{norm}, {config.model.init}, width "
        f"{config.model.width}: "
        f"{spent.parameters:,} parameters, {spent.macs / 1e6:,.1f} M multiply-accumulates per image\n"
        f"data    {config.data.source} {config.data.dir}: {len(dataset.train):,} training and {len(dataset.test):,} "
        f"test images of {size}x{size}, "
        f"{len(dataset.class_names)} classes\n"
        f"device  {jax.device_count()} x {device.device_kind}, {config.model.dtype}, batch {config.batch_size}\n"
        f"run     {folder}, {config.epochs} epochs"
    )


def divergence(step: int, sums: Sums, bad: int, checkpoints: checkpoint.Checkpoints, config: ConfigDict) -> str:
    """Where the run stopped being finite. bad: which of the steps in `sums` it was."""
    loss, grad_norm = sums["loss"][bad] / sums["count"][bad], sums["grad_norm"][bad]
    return advice(
        f"at step {step:,} the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}, the learning rate at most "
        f"{config.optim.learning_rate:g}; nothing was trained on it",
        checkpoints,
    )


def advice(what: str, checkpoints: checkpoint.Checkpoints) -> str:
    """What happened, what is safe, and what helps."""
    checkpoints.wait()
    saved = checkpoints.steps()
    good = (
        f"the last good checkpoint is at step {saved[-1]:,} in {checkpoints.directory}"
        if saved
        else "no checkpoint was saved yet"
    )
    return (
        f"{what}; {good}. Try, with a new --workdir, a smaller --config.optim.learning_rate, "
        "--config.optim.clip_norm=1.0, or an initialization that keeps the gradient variance "
        "(--config.model.init=he_fan_out with residual idshort, learnscalar or convshort)"
    )


def finish(
    config: ConfigDict, folder: pathlib.Path, dataset: data.Dataset, best_step: int, seconds: float, rate: float
) -> dict[str, Any]:
    """Draws curves.png, prints and returns the summary."""
    records = metrics.read(folder)
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        raise ValueError(
            f"the run in {folder} is complete, but its metrics.jsonl holds no epoch: was it changed or moved?"
        )
    last, best = epochs[-1], max(epochs, key=lambda record: record["test_accuracy"])
    saved = next((record["test_accuracy"] for record in epochs if record["step"] == best_step), last["test_accuracy"])
    title = f"ResNet-{config.model.depth} {config.model.residual}, {config.data.source}"
    metrics.plot_curves(records, title).savefig(folder / "curves.png", dpi=150)
    work = f"{seconds:.0f} s, {rate:,.0f} images/s" if rate else "already complete"
    lines = [
        f"done    {config.epochs} epochs, {last['step']:,} steps, {work}",
        f"test    {last['test_accuracy']:.2%} at the end, best {best['test_accuracy']:.2%} after epoch "
        f"{best['epoch']}, "
        f"of {last.get('test_images', len(dataset.test)):,} images",
        f"train   {last['train_accuracy']:.2%} in the last epoch, augmented",
        f"curves  {folder / 'curves.png'}",
        f"score   python -m nfjax.evaluate --workdir={folder}   (the best checkpoint: step {best_step:,}, {saved:.2%})",
    ]
    skipped = dataset.skipped | skips.read(folder)
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        lines.append(
            f"skipped {len(skipped)} images that cannot be read: {', '.join(list(skipped)[:5])}{more}; all are named "
            f"in {folder / (workdirs.DATA if dataset.skipped else skips.FILE)}"
        )
    print("\n".join(lines), flush=True)
    return {
        "steps": last["step"],
        "test_accuracy": last["test_accuracy"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
    }


def prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in values.items()}
