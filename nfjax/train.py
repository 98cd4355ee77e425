"""The training loop: reads a config, writes a workdir.

The workdir holds config.json, versions.json (one entry per start), parameters.txt, classes.json, metrics.jsonl,
TensorBoard events, checkpoints/ and curves.png. Whatever is random or ordered in a run follows from (seed, step), so a
run that was stopped goes on from its newest checkpoint as if it had never been stopped.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nfjax import augment, checkpoint, cost, data, metrics, optim, resnet, steps
from nfjax import workdir as workdirs
from nfjax.progress import Bar, Interrupts, Progress
from nfjax.steps import Feed, State, Sums


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient stopped being finite."""


class TrainingInterruptedError(RuntimeError):
    """Ctrl-C: the run was saved and can go on."""


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains what `config` describes, or goes on where the run in `workdir` stopped; returns the summary that it prints
    at the end.

    Raises ValueError or OSError for settings, data or a workdir that cannot be used, TrainingDivergedError,
    TrainingInterruptedError.
    """
    check(config)
    folder = workdirs.open_for(config, workdir)
    dataset = data.load(config.data.source, config.data.dir, config.data.image_size)
    if len(dataset.train) < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {len(dataset.train)} training images; choose a smaller "
            "one"
        )
    workdirs.write_config(folder, config)
    (folder / "classes.json").write_text(json.dumps(dataset.class_names, indent=1) + "\n")
    (folder / "skipped_files.txt").write_text("".join(f"{path}\n" for path in dataset.skipped))

    mesh = make_mesh()
    model = build_model(config, len(dataset.class_names))
    print(header(config, folder, dataset, model), flush=True)
    network, params, batch_stats = steps.as_functions(model)
    (folder / "parameters.txt").write_text(parameter_overview.get_parameter_overview(params) + "\n")
    progress = Progress(len(dataset.train), config.batch_size, config.epochs, config.log.every_steps)
    optimizer, schedule = build_optimizer(config, progress)
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
        network, optimizer, preprocessing(config, train=True), config.seed, config.optim.label_smoothing
    )
    run_steps = make_runner(config, Feed(dataset.train, mesh, config.data.on_device), train_step)
    evaluate = make_evaluation(config, Feed(dataset.test, mesh, config.data.on_device), network, len(dataset.test))
    writer = metrics.Writer(folder, progress.step)
    start = time.perf_counter()
    try:
        with Interrupts() as interrupts, Bar(progress) as bar:
            while progress.step < progress.total and not interrupts.pending:
                stop = progress.next_stop()
                state, sums = run_steps(state, progress.step, stop, bar, interrupts)
                progress.add(sums)
                if int(state["step"]) < progress.step:
                    raise TrainingDivergedError(divergence(int(state["step"]), sums, checkpoints, config))
                if progress.step < stop:
                    break  # interrupted between two log steps
                values = {
                    "epoch": round(progress.epoch, 4),
                    "learning_rate": float(schedule(progress.step - 1)),
                } | progress.take("interval")
                writer.write("train", progress.step, values | {"images_per_second": round(bar.rate, 1)})
                bar.show(values)
                if (number := progress.epochs_ended()) is None:
                    continue
                tested = evaluate(state)
                values = {"epoch": number, **prefixed("train", progress.take("epoch")), **prefixed("test", tested)}
                writer.write("epoch", progress.step, values)
                bar.line(values)
                if number % config.checkpoint.every_epochs == 0 or progress.step == progress.total:
                    checkpoints.save(progress.step, {"state": state, "sums": progress.sums}, tested["accuracy"])
            if progress.step < progress.total:
                if progress.step not in checkpoints.steps():
                    checkpoints.save(progress.step, {"state": state, "sums": progress.sums})
                checkpoints.wait()
                raise TrainingInterruptedError(
                    f"interrupted: saved at step {progress.step:,} of {progress.total:,} in {folder}; the same "
                    "command goes on from there"
                )
            checkpoints.wait()
            best_step = checkpoints.best_step()
    finally:
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
    try:
        jnp.dtype(config.model.dtype)
    except TypeError:
        raise ValueError(f"unknown model.dtype={config.model.dtype!r}: expected float32, bfloat16 or float16") from None
    # A wrong name in the model or the optimizer is found here, at no cost, and not after the images are decoded.
    nnx.eval_shape(lambda: build_model(config, num_classes=2))
    build_optimizer(config, Progress(config.batch_size, config.batch_size, config.epochs, 1))
    if config.data.source not in data.DATASETS:
        raise ValueError(f"unknown data.source={config.data.source!r}: expected one of {', '.join(data.DATASETS)}")


def make_mesh() -> Mesh:
    """All devices on one axis, "data": a batch is divided over it, parameters are replicated."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def build_model(config: ConfigDict, num_classes: int) -> nnx.Module:
    """The network that a config describes, initialized from its seed."""
    settings = config.model.to_dict() | {"dtype": jnp.dtype(config.model.dtype)}
    rngs = nnx.Rngs(params=jax.random.key(config.seed))
    return resnet.PreActResNet(**settings, num_classes=num_classes, image_size=config.data.image_size, rngs=rngs)


def build_optimizer(config: ConfigDict, progress: Progress) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a config, and its learning rate by step."""
    settings = config.optim
    schedules = {
        "epoch": lambda: optim.cosine_by_epoch(settings.learning_rate, progress.epoch_ends),
        "step": lambda: optim.cosine_by_step(settings.learning_rate, progress.total),
    }
    if settings.anneal not in schedules:
        raise ValueError(f"unknown optim.anneal={settings.anneal!r}: expected one of {', '.join(schedules)}")
    schedule = schedules[settings.anneal]()
    return optim.sgd(
        schedule, settings.momentum, settings.weight_decay, settings.clip_norm, settings.adaptive_clip
    ), schedule


def preprocessing(config: ConfigDict, train: bool) -> Callable[..., jax.Array]:
    """uint8 [B, H, W, 3] to normalised float32: `(key, images)` with augmentation for training, `(images)` for
    evaluation.
    """

    def normalize(images: jax.Array) -> jax.Array:
        return augment.normalize(images, config.data.mean, config.data.std)

    def augmented(key: jax.Array, images: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        if config.augment.crop_padding:
            images = augment.random_crop(crop_key, images, config.augment.crop_padding)
        if config.augment.flip:
            images = augment.random_flip(flip_key, images)
        return normalize(images)

    return augmented if train else normalize


def make_runner(config: ConfigDict, feed: Feed, train_step: steps.Step) -> Callable[..., tuple[State, Sums]]:
    """`run(state, step, stop, bar, interrupts) -> (state, sums [n])`: the steps from `step` to `stop`, fewer only after
    an interrupt.
    """
    indices = functools.partial(data.train_indices, config.seed, len(feed), config.batch_size)
    per_dispatch = config.steps_per_dispatch
    if per_dispatch is None:
        per_dispatch = 1 if jax.default_backend() == "cpu" else config.log.every_steps
    if per_dispatch < 1 or (per_dispatch > 1 and not config.data.on_device):
        raise ValueError(f"steps_per_dispatch={per_dispatch} must be positive, and 1 where data.on_device is False")
    one = feed.each(train_step, donate=True)
    many = feed.many(train_step, per_dispatch) if per_dispatch > 1 else None

    def run(state: State, step: int, stop: int, bar: Bar, interrupts: Interrupts) -> tuple[State, Sums]:
        parts: list[Sums] = []
        while step < stop and not (parts and interrupts.pending):
            count = min(per_dispatch, stop - step)
            if many is None:
                state, sums = one(state, indices(step, 1)[0], step=np.int32(step))
                # One step runs while the next is prepared, and no more: the bar and Ctrl-C stay close to the device.
                if parts:
                    jax.block_until_ready(parts[-1])
            else:
                state, sums = many(state, indices(step, count), step)
            parts.append(sums)
            step += count
            bar.advance(count)
        fetched = jax.device_get(parts)
        bar.settle()
        return state, {name: np.concatenate([np.atleast_1d(part[name]) for part in fetched]) for name in fetched[0]}

    return run


def make_evaluation(
    config: ConfigDict, feed: Feed, network: steps.Network, size: int
) -> Callable[[State], dict[str, float]]:
    """`evaluate(state) -> {"loss", "accuracy"}` over all `size` examples, each counted exactly once."""
    step = feed.each(steps.make_eval_step(network, preprocessing(config, train=False)), donate=False)

    def evaluate(state: State) -> dict[str, float]:
        parts = [step(state, indices, mask=mask) for indices, mask in data.eval_indices(size, config.batch_size)]
        fetched = jax.device_get(parts)
        return metrics.means({name: np.sum([part[name] for part in fetched], dtype=np.float64) for name in fetched[0]})

    return evaluate


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


def divergence(step: int, sums: Sums, checkpoints: checkpoint.Checkpoints, config: ConfigDict) -> str:
    """Where the run stopped being finite, what is safe, and what helps."""
    bad = int(np.argmin(np.isfinite(sums["loss"]) & np.isfinite(sums["grad_norm"])))
    checkpoints.wait()
    saved = checkpoints.steps()
    good = (
        f"the last good checkpoint is at step {saved[-1]:,} in {checkpoints.directory}"
        if saved
        else "no checkpoint was saved yet"
    )
    return (
        f"at step {step:,} the loss is {sums['loss'][bad] / sums['count'][bad]:.4g} and the gradient norm "
        f"{sums['grad_norm'][bad]:.4g}; nothing was trained on it; {good}. "
        f"Try a smaller --config.optim.learning_rate (now {config.optim.learning_rate:g}), "
        "--config.optim.clip_norm=1.0, or an initialization "
        "that keeps the gradient variance (--config.model.init=he_fan_out with residual idshort, learnscalar or "
        "convshort), with a new --workdir"
    )


def finish(
    config: ConfigDict, folder: pathlib.Path, dataset: data.Dataset, best_step: int | None, seconds: float, rate: float
) -> dict[str, Any]:
    """Draws curves.png, prints and returns the summary."""
    records = metrics.read(folder)
    epochs = [record for record in records if record["kind"] == "epoch"]
    last, best = epochs[-1], max(epochs, key=lambda record: record["test_accuracy"])
    title = f"ResNet-{config.model.depth} {config.model.residual}, {config.data.source}"
    metrics.plot_curves(records, title).savefig(folder / "curves.png", dpi=150)
    lines = [
        f"done    {config.epochs} epochs, {last['step']:,} steps"
        + (f", {seconds:.0f} s, {rate:,.0f} images/s" if rate else " (already complete)"),
        f"test    {last['test_accuracy']:.2%} at the end, best {best['test_accuracy']:.2%} after epoch "
        f"{best['epoch']}, of {len(dataset.test):,} images",
        f"train   {last['train_accuracy']:.2%} in the last epoch, augmented",
        f"curves  {folder / 'curves.png'}",
        f"score   python -m nfjax.evaluate --workdir={folder}   (the best checkpoint, step {best_step:,})",
    ]
    if dataset.skipped:
        lines.append(f"skipped {len(dataset.skipped)} files that are no images: {folder / 'skipped_files.txt'}")
    print("\n".join(lines), flush=True)
    return {
        "test_accuracy": last["test_accuracy"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "steps": last["step"],
    }


def prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in values.items()}
