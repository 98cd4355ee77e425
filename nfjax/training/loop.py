"""The training loop: reads a config, writes a workdir.

The workdir holds config.json, data.json (class names, sizes, skipped files), versions.json (one entry per start),
parameters.txt, metrics.jsonl, TensorBoard events, checkpoints/, damaged_checkpoints/ where there are any, and
curves.png. Whatever is random or ordered in a run follows from (seed, step), so a run that was stopped goes on from its
newest checkpoint as if it had never been stopped.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nfjax import data, distributed, preemption, spp
from nfjax.preemption import Interrupts
from nfjax.runs import checkpoint, metrics, mirror, report
from nfjax.runs import workdir as workdirs
from nfjax.runs.progress import Bar, Progress, say
from nfjax.training import assembly, footprint
from nfjax.training import feed as feeds
from nfjax.training import sharding as meshes
from nfjax.training import step as steps
from nfjax.training.step import State, Sums


class TrainingDivergedError(RuntimeError):
    """The loss, its gradient or the update stopped being finite."""


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains what `config` describes, or goes on where the run in `workdir` stopped; prints a summary and returns it.

    Where several processes train together, all of them call this, with the same arguments.

    The summary: "steps", "test_accuracy" at the end, "best_test_accuracy" and "best_epoch" of all epochs.

    Raises ValueError or OSError for settings, data or a workdir that cannot be used, TrainingDivergedError,
    TrainingInterruptedError.
    """
    assembly.check(config)
    try:
        folder = workdirs.open_for(config, workdir)
        with workdirs.claim(folder), mirrored(folder):
            return run(config, folder)
    except jax.errors.JaxRuntimeError as error:
        raise explained(error, workdir) from error


@contextlib.contextmanager
def mirrored(folder: pathlib.Path) -> Iterator[None]:
    """However it ends, what was measured is not only in a local folder that may be gone tomorrow."""
    try:
        yield
    except BaseException:
        if distributed.is_first():
            with contextlib.suppress(OSError, ValueError):  # what ended the run is worth telling, and not this
                mirror.push(folder)
        raise
    if distributed.is_first():
        mirror.push(folder)


def run(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    """`train` in a workdir that is open and claimed."""
    dataset = assembly.open_data(config, config.data.dir)
    size = len(dataset.train)
    if size < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {size} training images; choose a smaller one"
        )
    workdirs.start(folder, config, dataset)

    mesh = meshes.make(config.train.state_shards)
    init_key, augment_key = jax.random.split(jax.random.key(config.seed))
    model = assembly.build_model(config, len(dataset.class_names), init_key)
    say(report.header(config, folder, dataset, model))
    network, params, batch_stats = steps.as_functions(model)
    workdirs.note_parameters(folder, params)
    progress = Progress(size, config.batch_size, config.epochs, config.log.every_steps)
    optimizer, schedule = assembly.build_optimizer(config, progress.epoch_ends)
    state = steps.initial_state(params, batch_stats, optimizer)
    state = meshes.place(state, meshes.of_state(state, mesh))
    del model, params, batch_stats

    checkpoints = checkpoint.Checkpoints(mirror.location(folder), config.checkpoint.keep)
    restored = checkpoints.restore_newest(checkpoint.template({"state": state, "sums": progress.sums}))
    if restored is not None:
        progress.step, tree = restored
        state, progress.sums = tree["state"], tree["sums"]
        say(f"resumed at step {progress.step:,}, epoch {progress.epoch:.2f}")
    elif logged := metrics.read(folder):
        say(f"no checkpoint in {folder}: the run begins anew, and its {len(logged)} lines of metrics with it")
    workdirs.note_start(folder, config, progress.step)

    interrupts = Interrupts(late=True)
    votes = preemption.Votes(mesh, lambda: interrupts.pending is not None)
    train_feed = assembly.make_feed(config, dataset, "train", mesh, folder)
    test_feed = assembly.make_feed(config, dataset, "test", mesh, folder)
    train_step = make_train_step(config, network, optimizer, mesh)
    runner = Runner(config, train_feed, train_step, augment_key, votes, size, progress.total)
    evaluate = make_evaluation(config, test_feed, network, len(dataset.test))
    measure_signal = make_signal_measurement(config, dataset.train, network)
    writer = metrics.Writer(folder, progress.step) if distributed.is_first() else metrics.NoWriter()
    if measure_signal and progress.step == 0:
        writer.write("signal", 0, measure_signal(state))

    def save(accuracy: float | None = None) -> None:
        if distributed.is_first():
            writer.check()
            mirror.push(folder)  # first: what a checkpoint goes on from has been logged
        checkpoints.save(progress.step, {"state": state, "sums": progress.sums}, accuracy)

    start, saved, alone = time.perf_counter(), progress.step, jax.process_count() == 1
    try:
        with interrupts, Bar(progress) as bar:
            while progress.step < progress.total and not runner.stopped:
                stop = progress.next_stop()
                parts = []
                for after, sums in runner.steps(state, progress.step, stop):
                    state = after
                    parts.append(sums)
                    bar.advance(np.size(sums["count"]))
                    interrupts.heed()  # until the first step is compiled and on its way there is nothing to save
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
                    if progress.step - saved >= config.checkpoint.every_steps:
                        save()
                        saved = progress.step
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
                    save(tested["accuracy"])
                    saved = progress.step
            checkpoints.wait()
            if progress.step < progress.total:
                if progress.step not in checkpoints.steps():
                    save()
                    checkpoints.wait()
                raise interruption(interrupts, progress, folder)
            writer.check()  # it is there to be scored
            best_step = checkpoints.best_step()
        alone = True  # or in step with the others
    finally:
        train_feed.close()
        test_feed.close()
        writer.close()
        if alone:  # otherwise it would wait for processes that are waiting for this one
            checkpoints.close()
    distributed.barrier("done")
    if not distributed.is_first():  # in a bucket it came with the last checkpoint
        mirror.fetch(folder, "metrics.jsonl")
    return report.finish(config, folder, dataset, best_step, time.perf_counter() - start, bar.overall_rate)


# ---------------------------------------------------------------- what a run consists of


def make_train_step(
    config: ConfigDict, network: steps.Network, optimizer: optax.GradientTransformation, mesh: Mesh
) -> steps.Step:
    """The training step of a config, which leaves the state where it was and counts the votes in its batch.

    The batch also brings the "key" of augmentation: runs that differ in their seed are then the same program, which is
    compiled once.
    """
    preprocess, mix = assembly.preprocessing(config, train=True), assembly.mixing(config)
    smoothing, parts = config.optim.label_smoothing, assembly.count_parts(config)

    def counted(state: State, batch: steps.Batch) -> tuple[State, Sums]:
        key = jax.random.wrap_key_data(batch["key"])
        step = steps.make_train_step(network, optimizer, preprocess, key, smoothing, mix, parts, mesh)
        state, sums = step(state, batch)
        if "votes" in batch:
            sums["votes"] = batch["votes"].sum(dtype=jnp.int32)
        return jax.lax.with_sharding_constraint(state, meshes.of_state(state, mesh)), sums

    return counted


class Runner:
    """Runs training steps one after the other, each time from where it stopped before.

    stopped: whether a process of the run was told to stop; no more steps are taken then. key: of augmentation. size: of
    the training split. last: step at which the run ends.
    """

    def __init__(
        self,
        config: ConfigDict,
        feed: assembly.Feed,
        train_step: steps.Step,
        key: jax.Array,
        votes: preemption.Votes,
        size: int,
        last: int,
    ):
        self._feed, self._votes, self._last, self._size = feed, votes, last, size
        self._seed, self._batch_size = config.seed, config.batch_size
        self._key = np.asarray(jax.random.key_data(key))
        self._items: Iterator[feeds.Item] | None = None
        self._before: Sums | None = None  # of the step that runs
        self.stopped = False
        self._per_dispatch = config.steps_per_dispatch
        if self._per_dispatch is None:
            many_pay = config.data.keep == "device" and jax.default_backend() != "cpu"
            self._per_dispatch = config.log.every_steps if many_pay else 1
        # A report or the end of an epoch ends a dispatch: more room would be taken for nothing.
        self._per_dispatch = min(self._per_dispatch, config.log.every_steps, -(-size // config.batch_size))
        if self._per_dispatch > 1:
            self._many = feed.many(train_step, self._per_dispatch, _tell_memory)
        else:
            self._each = feed.each(train_step, donate=True, on_compiled=_tell_memory)

    def steps(self, state: State, step: int, stop: int) -> Iterator[tuple[State, Sums]]:
        """Trains from `step` to `stop`, or until it is `stopped`; yields the state and the sums of each dispatch."""
        return (self._run_each if self._per_dispatch == 1 else self._run_many)(state, step, stop)

    def _run_each(self, state: State, step: int, stop: int) -> Iterator[tuple[State, Sums]]:
        if self._items is None:
            orders = data.train_orders(self._seed, self._size, self._batch_size, step, self._last)
            self._items = self._feed.items(orders, self._idle)
        for number in range(step, stop):
            item = next(self._items)
            running = self._before
            state, self._before = self._each(state, item, step=np.int32(number), key=self._key, **self._votes.cast())
            # One step runs while the next is prepared, and no more: the bar and signals stay close to the device.
            jax.block_until_ready(running)
            yield state, self._before
            self.stopped = self._votes.stop((running or {}).get("votes"))
            if self.stopped:
                return
        # At a report everything is waited for: the last step's votes are known as well.
        self.stopped = self._votes.stop(self._before.get("votes"))

    def _run_many(self, state: State, step: int, stop: int) -> Iterator[tuple[State, Sums]]:
        for number in range(step, stop, self._per_dispatch):
            taken = min(self._per_dispatch, stop - number)
            indices = data.train_indices(self._seed, self._size, self._batch_size, number, taken)
            state, sums = self._many(state, indices, number, key=self._key, **self._votes.cast())
            yield state, sums
            self.stopped = self._votes.stop(sums.get("votes"))
            if self.stopped:
                return

    def _idle(self) -> bool:
        return self._before is None or all(x.is_ready() for x in self._before.values())


def _tell_memory(compiled: jax.stages.Compiled) -> None:
    say(footprint.described(footprint.of(compiled), footprint.available(jax.local_devices()[0])))


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
        if not totals["count"]:
            raise ValueError(f"none of the {size} test images can be read; skipped.jsonl in the workdir says why")
        return metrics.means(totals) | {"images": int(totals["count"])}

    return evaluate


def make_signal_measurement(
    config: ConfigDict, split: data.Images | data.Encoded, network: steps.Network
) -> Callable[[State], dict[str, float]] | None:
    """`measure(state)` gives the forward and backward variance of every block on the first examples of the split,
    without augmentation; None where the config asks for none. All processes call it, the first one measures.
    """
    if config.log.signal_every_steps is None:
        return None
    if isinstance(split, data.Images):
        images = split.images[: config.batch_size]
    else:
        images = assembly.first_images(config, split)
    images = assembly.preprocessing(config, train=False)(jnp.asarray(images))
    monitor = spp.Monitor(images, seed=config.seed)

    def measure(state: State) -> dict[str, float]:
        here = meshes.everywhere((state["params"], state["batch_stats"]))
        return spp.scalars(monitor(network.model(*here))) if distributed.is_first() else {}

    return measure


# ---------------------------------------------------------------- what a run says


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


def interruption(
    interrupts: Interrupts, progress: Progress, folder: pathlib.Path
) -> preemption.TrainingInterruptedError:
    """Why the run stopped, and how it goes on."""
    kind, reason = preemption.TrainingPreemptedError, "stopped together with another process"
    if interrupts.pending == signal.SIGINT:
        kind, reason = preemption.TrainingInterruptedError, "interrupted"
    elif interrupts.pending:
        reason = "stopped by SIGTERM"
    return kind(
        f"{reason}: saved at step {progress.step:,} of {progress.total:,} in {mirror.shown(folder)}; the same "
        "command goes on from there"
    )


def explained(error: jax.errors.JaxRuntimeError, workdir: str) -> Exception:
    """What a failure of the runtime means for the person who reads it."""
    what = str(error).strip().partition("\n")[0][:300]
    if "RESOURCE_EXHAUSTED" in what:
        return ValueError(f"the memory of the device does not suffice ({what}); what helps: {footprint.HINT}")
    if jax.process_count() > 1:
        # Nothing more can be done together with the others, closing the checkpoints included.
        return preemption.PeerLostError(
            f"process {jax.process_index()} has lost another one ({what}); its own message says why it ended. What was "
            f"saved in {workdir} is whole: the same command, for all processes, goes on from there"
        )
    return error


def prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in values.items()}
