"""What happens at a report: a multiple of `log.every_steps`, or the end of an epoch.

A callback is a function of the run. The loop calls them at every report, in all processes; each decides whether it is
due.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from nfjax import distributed, spp
from nfjax.runs import mirror
from nfjax.training import evaluation, failures, movement, propagation, ranges, sharding
from nfjax.training.ranges import Range

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from nfjax.training.setup import Run

RANGES: dict[str, Range] = {
    "log.every_steps": ranges.INTERVAL,
    "log.evaluate_every_epochs": ranges.INTERVAL,
    "log.signal_every_steps": ranges.INTERVAL,
    "checkpoint.every_epochs": ranges.INTERVAL,
    "checkpoint.every_steps": ranges.INTERVAL,
    "checkpoint.keep": ranges.INTERVAL,
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for intervals that do not agree with each other."""
    every = config.log.signal_every_steps
    if every is not None and every % config.log.every_steps:
        raise ValueError(
            f"log.signal_every_steps={every} must be a positive multiple of log.every_steps={config.log.every_steps}"
        )


def signal(run: Run) -> None:
    """Forward and backward variance of every block, and what the step before tells of itself, where the config asks for
    it.
    """
    every = run.config.log.signal_every_steps
    if every is not None and run.progress.step % every == 0:
        # All processes bring their part of the parameters, the first one measures.
        here = sharding.everywhere((run.state.params, run.state.batch_stats))
        if distributed.is_first():
            with propagation.asking_for_blocks():
                measured = spp.scalars(run.monitor(run.network.model(*here)))
            if run.told is not None:
                measured |= movement.scalars(run.state.params, run.task.has_noise, run.told)
            run.trackers.write("signal", run.progress.step, measured)


def log(run: Run) -> None:
    """Loss, accuracy and speed since the last report."""
    values = {"epoch": run.progress.epoch, "learning_rate": float(run.schedule(run.progress.step - 1))}
    values |= run.progress.take("interval")
    waited, run.loader.waited = run.loader.waited, 0.0
    values |= {"images_per_second": round(run.bar.rate, 1), "data_wait": round(waited / run.bar.seconds, 4)}
    run.trackers.write("train", run.progress.step, values)
    run.bar.show(values)  # from here on the time of the next report is measured


def evaluate(run: Run) -> None:
    """After some epochs and at the end: the test images, scored by the weights and, where there is one, by their
    average.
    """
    run.tested, progress = None, run.progress
    if (number := progress.epochs_ended()) is None:
        return
    trained = progress.take("epoch")  # of this epoch alone, whether the one before was scored or not
    if number % run.config.log.evaluate_every_epochs and progress.step < progress.total:
        return
    run.tested = tested = _score(run, number, run.state.params, run.state.batch_stats)
    values = {"epoch": number, **_prefixed("train", trained), **_prefixed("test", tested)}
    if run.state.ema is not None:
        averaged = _score(run, number, *run.state.average(), " of the average of the weights")
        values |= {"test_ema_loss": averaged["loss"], "test_ema_accuracy": averaged["accuracy"]}
    run.trackers.write("epoch", run.progress.step, values)
    run.bar.line(values)


def save(run: Run) -> None:
    """A checkpoint, after some epochs, after some steps and at the end."""
    progress, every = run.progress, run.config.checkpoint
    number = progress.epochs_ended()
    if number is None:
        due = progress.step - run.saved >= every.every_steps
    else:
        due = number % every.every_epochs == 0 or progress.step == progress.total
    if due:
        write_checkpoint(run, None if run.tested is None else run.tested["accuracy"])


MEASURING: tuple[Callable[[Run], None], ...] = (signal, log, evaluate)
SAVING: tuple[Callable[[Run], None], ...] = (save,)  # when all else that belongs to this step is done


def write_checkpoint(run: Run, accuracy: float | None = None) -> None:
    """Begins to save the run as it is now. accuracy: on the test images, where it is known."""
    if distributed.is_first():
        run.trackers.check()
        mirror.push(run.folder)  # first: what a checkpoint goes on from has been logged
    tree = {"state": run.state.to_saved(), "sums": run.progress.sums}
    run.checkpoints.save(run.progress.step, tree, accuracy)
    run.saved = run.progress.step


def _score(run: Run, epoch: int, params: object, batch_stats: object, of: str = "") -> dict[str, float]:
    onednn = run.config.train.onednn
    scores = evaluation.score(run.network, run.normalize, run.test_loader, params, batch_stats, onednn)
    if not np.isfinite(scores["loss"]):
        raise failures.not_finite(f"after epoch {epoch} the test loss{of} is not finite", run.checkpoints)
    return scores


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in values.items()}
