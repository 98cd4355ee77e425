"""The training loop: reads a config, writes a workdir.

The workdir holds config.json, data.json (class names, sizes, skipped files), versions.json (one entry per start),
parameters.txt, metrics.jsonl, TensorBoard events, checkpoints/, damaged_checkpoints/ where there are any, and
curves.png. Whatever is random or ordered in a run follows from (seed, step), so a run that was stopped goes on from its
newest checkpoint as if it had never been stopped.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nfjax import assembly, checkpoint, cost, data, metrics, spp, steps
from nfjax import feed as feeds
from nfjax import workdir as workdirs
from nfjax.data import crops, skips
from nfjax.progress import Bar, Interrupts, Progress
from nfjax.steps import State, Sums


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
    assembly.check(config)
    folder = workdirs.open_for(config, workdir)
    dataset = assembly.open_data(config, config.data.dir)
    size = len(dataset.train)
    if size < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {size} training images; choose a smaller one"
        )
    workdirs.start(folder, config, dataset)

    mesh = assembly.make_mesh()
    init_key, augment_key = jax.random.split(jax.random.key(config.seed))
    model = assembly.build_model(config, len(dataset.class_names), init_key)
    print(header(config, folder, dataset, model), flush=True)
    network, params, batch_stats = steps.as_functions(model)
    workdirs.note_parameters(folder, params)
    progress = Progress(size, config.batch_size, config.epochs, config.log.every_steps)
    optimizer, schedule = assembly.build_optimizer(config, progress.epoch_ends)
    state = jax.device_put(steps.initial_state(params, batch_stats, optimizer), NamedSharding(mesh, PartitionSpec()))
    del model, params, batch_stats

    checkpoints = checkpoint.Checkpoints(folder, config.checkpoint.keep)
    restored = checkpoints.restore_newest(checkpoint.template({"state": state, "sums": progress.sums}))
    if restored is not None:
        progress.step, tree = restored
        state, progress.sums = tree["state"], tree["sums"]
        print(f"resumed at step {progress.step:,}, epoch {progress.epoch:.2f}", flush=True)
    workdirs.note_start(folder, progress.step)

    preprocess, mix = assembly.preprocessing(config, train=True), assembly.mixing(config)
    train_step = steps.make_train_step(network, optimizer, preprocess, augment_key, config.optim.label_smoothing, mix)
    train_feed = assembly.make_feed(config, dataset, "train", mesh, folder)
    test_feed = assembly.make_feed(config, dataset, "test", mesh, folder)
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


# ---------------------------------------------------------------- what a run consists of


def make_runner(
    config: ConfigDict, feed: assembly.Feed, train_step: steps.Step, size: int, last: int
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
    config: ConfigDict, feed: assembly.Feed, network: steps.Network, size: int
) -> Callable[[State], dict[str, float]]:
    """`evaluate(state) -> {"loss", "accuracy", "images"}` over all `size` examples of the feed, each counted exactly
    once, but for those that cannot be read.
    """
    step = feed.each(steps.make_eval_step(network, assembly.preprocessing(config, train=False)), donate=False)
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
    images = assembly.preprocessing(config, train=False)(jnp.asarray(images))
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
