"""A run: everything the loop works with, built from a config."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nfjax import _cpu, data, distributed, preemption, spp
from nfjax.runs import checkpoint, metrics, mirror, report, trackers, workdirs
from nfjax.runs.progress import Bar, say
from nfjax.training import (
    balance,
    divergence,
    failures,
    footprint,
    loader,
    networks,
    optimizers,
    preprocessing,
    pretrained,
    propagation,
    rates,
    rescaling,
    rng,
    schedules,
    sharding,
    step,
    transfer,
)
from nfjax.training.loader import Loader
from nfjax.training.progress import Progress
from nfjax.training.state import Batch, Steps, TrainState
from nfjax.training.step import Sums, Task


@dataclasses.dataclass
class Run:
    """What a run consists of. `state` and `progress` say where it stands; the rest stays as it was built.

    Attributes:
        config: All settings.
        folder: The local workdir.
        dataset: With its class names.
        network: As functions.
        state: All that a step changes.
        key: Of the random stream "training".
        schedule: Learning rate by step.
        task: What a step has built in.
        train_step: `(state, work, key) -> (state, sums)`.
        steps_per_dispatch: How many steps one call of it takes, at most.
        loader: Of the training images.
        test_loader: Of the test images.
        normalize: From test images to what the network sees.
        monitor: Measures signal propagation on the first training images, None where the config asks for none.
        progress: Step and sums.
        checkpoints: Of the workdir.
        trackers: Take what is measured.
        bar: Shows progress.
        interrupts: Hear Ctrl-C and SIGTERM.
        votes: Whether any process wants to stop.
        saved: Step of the newest checkpoint.
        tested: Scores of the epoch that ends at this step, None within an epoch and where it is not scored.
        told: What the last step before this report tells of itself, see `movement`; None where nobody asks for it.
        stopped: Whether a process of the run was told to stop; no more steps are taken then.
    """

    config: ConfigDict
    folder: pathlib.Path
    dataset: data.Dataset
    network: networks.Network
    state: TrainState
    key: jax.Array
    schedule: optax.Schedule
    task: Task
    train_step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, Sums]]
    steps_per_dispatch: int
    loader: Loader
    test_loader: Loader
    normalize: Callable[[jax.Array], jax.Array]
    monitor: spp.Monitor | None
    progress: Progress
    checkpoints: checkpoint.Checkpoints
    trackers: trackers.Trackers | trackers.NoTrackers
    bar: Bar
    interrupts: preemption.Interrupts
    votes: preemption.Votes
    saved: int
    tested: dict[str, float] | None = None
    told: np.ndarray | None = None
    stopped: bool = False
    _parts: list[tuple[int, Sums]] = dataclasses.field(default_factory=list)  # of the dispatches since the last report
    _dispatched: int = 0  # steps in them
    _vote: Any = None  # of the dispatch that runs

    def work(self) -> Iterator[Batch | Steps]:
        """What is left to be trained on, one dispatch after the other; none goes beyond a report."""
        first, last, length = self.progress.step, self.progress.total, self.steps_per_dispatch
        if length == 1:
            yield from self.loader.train(first, last, self._is_idle)
            return
        while first < last:
            count = min(length, self.progress.next_stop(first) - first)
            yield self.loader.train_steps(first, count, length)
            first += count

    def dispatch(self, work: Batch | Steps) -> bool:
        """Trains on it, while the dispatch before it may still run; whether the next thing to do is to `settle`."""
        before, voted = self._parts[-1:], self._vote
        self._vote = self.votes.cast()
        self.state, sums = self.train_step(self.state, work, self.key)
        count = int(work.count) if isinstance(work, Steps) else 1
        self._parts.append((count, sums))
        self._dispatched += count
        # One dispatch runs while the next is prepared, and no more: the bar and signals stay close to the device.
        jax.block_until_ready(before)
        self.bar.advance(count)
        self.interrupts.heed()  # until the first step is compiled and on its way there is nothing to save
        at_report = self.progress.step + self._dispatched == self.progress.next_stop()
        # At a report everything is waited for: the last dispatch's votes are known as well.
        self.stopped = self.votes.stop(self._vote if at_report else voted)
        return at_report or self.stopped

    def settle(self) -> bool:
        """Waits for the device, and counts what was trained; whether there is something to report.

        Raises:
            TrainingDivergedError: A step was not finite.
        """
        sums, self._parts, self._dispatched = step.fetch(self._parts), [], 0
        self.bar.settle()
        first, stop = self.progress.step, self.progress.next_stop()
        self.progress.step += len(sums["count"])
        # A step that was not finite did not count, nor did any behind it: see `train_step`.
        if (reached := int(self.state.step)) < self.progress.step:
            raise failures.diverged(
                reached, sums, reached - first, self.checkpoints, self.config, self._explained(reached, sums)
            )
        self.progress.add(sums)
        self.told = sums["signal"][-1] if "signal" in sums else None
        return self.progress.step == stop

    def _explained(self, number: int, sums: Sums) -> str:
        """What stopped being finite in the step `number`, before which the run stands."""
        bad = number - (self.progress.step - len(sums["count"]))
        place = divergence.Place(
            number, self.state, self.task, self.loader, self.key, lambda: self.interrupts.pending is not None
        )
        return divergence.explain(place, float(sums["loss"][bad]), float(sums["grad_norm"][bad]))

    def _is_idle(self) -> bool:
        return not self._parts or all(x.is_ready() for x in self._parts[-1][1].values())


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What the first step of a run works with.

    Attributes:
        state: Before it.
        task: What is trained.
        key: Of the random stream "training".
    """

    state: TrainState
    task: Task
    key: jax.Array


def beginning(config: ConfigDict, dataset: data.Dataset, mesh: Mesh, schedule: optax.Schedule) -> Beginning:
    """The first step of a run that has no workdir, with a schedule that may be another than the config's."""
    model = networks.build(config, len(dataset.class_names), rng.of_seed(config.seed, "init"))
    network, params, batch_stats = networks.as_functions(model, rates.frozen(config))
    weights = first_weights(config, dataset, None, network, params, batch_stats)
    optimizer = optimizers.build(config, schedule)
    task = _task(config, network, optimizer, mesh, balance.class_weights(config, dataset))
    return Beginning(_begin(config, optimizer, mesh, *weights), task, rng.of_seed(config.seed, "training"))


def first_weights(
    config: ConfigDict,
    dataset: data.Dataset,
    folder: pathlib.Path | None,
    network: networks.Network,
    params: Any,
    batch_stats: Any,
) -> tuple[Any, Any]:
    """(parameters, batch statistics) before the first step: as initialized, those of a source, or rescaled.

    folder: The workdir, which gets a record of the source; None for none.
    """
    if config.init_from:
        params, batch_stats = transfer.begin(config, dataset.class_names, folder, params, batch_stats)
    if config.model.rescale:
        normalize = preprocessing.make_normalize(config)
        params = rescaling.apply(config, dataset.train, normalize, network, params, batch_stats)
    return params, batch_stats


def check_size(config: ConfigDict, dataset: data.Dataset) -> None:
    """Raises ValueError where a batch has more images than there are."""
    if (size := len(dataset.train)) < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {size} training images; choose a smaller one"
        )


def build(config: ConfigDict, folder: pathlib.Path) -> Run:
    """The run of a config in a workdir that is open and claimed, at its start or where it stopped.

    Raises:
        ValueError: The images cannot be used, or are not those that the run began with.
    """
    dataset = loader.open_data(config, config.data.dir)
    size = len(dataset.train)
    check_size(config, dataset)
    workdirs.start(folder, config, dataset)

    mesh = sharding.make(config.train.state_shards)
    model = networks.build(config, len(dataset.class_names), rng.of_seed(config.seed, "init"))
    say(report.header(config, networks.describe(config), folder, dataset, model))
    network, params, batch_stats = networks.as_functions(model, rates.frozen(config))
    if told := rates.describe(config, params):
        say(told)
    progress = Progress(size, config.batch_size, config.epochs, config.log.every_steps)
    schedule = schedules.build(config, progress.epoch_ends)
    optimizer = optimizers.build(config, schedule)
    normalize = preprocessing.make_normalize(config)
    begin = functools.partial(_begin, config, optimizer, mesh)
    state = begin(params, batch_stats)

    checkpoints = checkpoint.Checkpoints(mirror.location(folder), config.checkpoint.keep)
    restored = checkpoints.restore_newest(checkpoint.template({"state": state.to_saved(), "sums": progress.sums}))
    if restored is not None:
        progress.step, tree = restored
        state, progress.sums = state.from_saved(tree["state"]), tree["sums"]
        say(f"resumed at step {progress.step:,}, epoch {progress.epoch:.2f}")
    else:
        if logged := metrics.read(folder):
            say(f"no checkpoint in {folder}: the run begins anew, and its {len(logged)} lines of metrics with it")
        if not config.init_from:
            pretrained.remove_record(folder)
        if config.init_from or config.model.rescale:
            del state
            params, batch_stats = first_weights(config, dataset, folder, network, params, batch_stats)
            state = begin(params, batch_stats)
        workdirs.note_parameters(folder, params)
    del model, params, batch_stats
    workdirs.note_start(folder, config, progress.step)

    interrupts = preemption.Interrupts(late=True)
    train_loader = loader.build(config, dataset, "train", mesh, folder)
    task = _task(config, network, optimizer, mesh, balance.class_weights(config, dataset))
    train_step, steps_per_dispatch = _train_step(config, task, size)
    tracked = (folder, progress.step, config.log.trackers, json.loads(config.to_json_best_effort()))
    return Run(
        config,
        folder,
        dataset,
        network,
        state,
        rng.of_seed(config.seed, "training"),
        schedule,
        task,
        train_step,
        steps_per_dispatch,
        train_loader,
        loader.build(config, dataset, "test", mesh, folder),
        normalize,
        _monitor(config, dataset.train, normalize),
        progress,
        checkpoints,
        trackers.Trackers(*tracked) if distributed.is_first() else trackers.NoTrackers(),
        Bar(progress.step, progress.total, config.batch_size, config.epochs),
        interrupts,
        preemption.Votes(mesh, lambda: interrupts.pending is not None),
        saved=progress.step,
    )


def _begin(
    config: ConfigDict, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any, batch_stats: Any
) -> TrainState:
    """The state before the first step, on its devices."""
    state = TrainState.start(params, batch_stats, optimizer, ema=config.optim.ema_decay is not None)
    return sharding.place(state, sharding.of_state(state, mesh))


def _task(
    config: ConfigDict,
    network: networks.Network,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    class_weights: tuple[float, ...] | None,
) -> Task:
    return Task(
        network,
        optimizer,
        preprocessing.make_preprocess(config),
        preprocessing.make_mix(config),
        config.optim.label_smoothing,
        config.optim.ema_decay,
        config.train.accumulate_steps,
        # Whose convolutions XLA runs in a loop many times slower on a CPU.
        unroll=_cpu.platform_of(mesh) == "cpu" and not networks.is_ours(config),
        signal_every=config.log.signal_every_steps,
        frozen=network.frozen,
        class_weights=class_weights,
        mesh=mesh,
    )


def _train_step(config: ConfigDict, task: Task, size: int) -> tuple[Callable[..., tuple[TrainState, Sums]], int]:
    """The compiled step of a config, and how many steps one call of it takes."""
    platform = _cpu.platform_of(task.mesh)
    # A report or the end of an epoch ends a dispatch: more room would be taken for nothing.
    longest = min(config.log.every_steps, -(-size // config.batch_size))
    # On a CPU, whose steps take long, a signal to stop is heard after every one, unless the config says otherwise.
    usual = longest if config.data.keep == "device" and platform != "cpu" else 1
    length = min(config.steps_per_dispatch or usual, longest)
    function = step.train_step if length == 1 else step.train_steps
    options = _cpu.compiler_options(platform, config.train.onednn)
    return footprint.Compiled(function, say, options, task=task), length


def _monitor(
    config: ConfigDict, split: data.Images | data.Encoded, normalize: Callable[[jax.Array], jax.Array]
) -> spp.Monitor | None:
    if config.log.signal_every_steps is None:
        return None  # the images are not read for nothing
    return propagation.build(config, normalize(jnp.asarray(loader.first_images(config, split))))


@contextlib.contextmanager
def closing(run: Run) -> Iterator[None]:
    """Afterwards everything that the run has open is closed."""
    together = jax.process_count() == 1
    try:
        yield
        together = True  # or in step with the others
    finally:
        run.loader.close()
        run.test_loader.close()
        run.trackers.close()
        if together:  # otherwise it would wait for processes that are waiting for this one
            run.checkpoints.close()
