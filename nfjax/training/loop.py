"""The training loop: reads a config, writes a workdir.

The workdir holds config.json, data.json (class names, sizes, skipped files), versions.json (one entry per start),
parameters.txt, init_from.json where it began with trained weights, metrics.jsonl, TensorBoard events, checkpoints/,
damaged_checkpoints/ where there are any, and curves.png. Whatever is random or ordered in a run follows from (seed,
step), so a run that was stopped goes on from its newest checkpoint as if it had never been stopped.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from nfjax import distributed, preemption
from nfjax.runs import mirror, report, workdirs
from nfjax.training import callbacks, checks, failures, networks, pretrained, setup
from nfjax.training.failures import TrainingDivergedError
from nfjax.training.setup import Run

__all__ = ["Run", "TrainingDivergedError", "train"]


def train(
    config: ConfigDict, workdir: str | os.PathLike[str], more: Sequence[Callable[[Run], None]] = ()
) -> dict[str, Any]:
    """Trains what `config` describes, or goes on where the run in `workdir` stopped; prints a summary and returns it.

    Where several processes train together, all of them call this, with the same arguments.

    Args:
        config: One of `nfjax.config` with what differs.
        workdir: Folder of the run, local or in a bucket.
        more: Further callbacks, `(run) -> None`, called at every report, after the log and before the run is saved.

    Returns:
        "steps", "test_accuracy" at the end, "best_test_accuracy" and "best_epoch" of all epochs that were scored;
        "test_ema_accuracy" at the end where there is an average of the weights.

    Raises:
        ValueError: The settings, the images or the workdir cannot be used.
        OSError: Something cannot be read or written.
        TrainingDivergedError: The loss, its gradient or the update stopped being finite.
        preemption.TrainingInterruptedError: Ctrl-C or SIGTERM; what was trained is saved.
    """
    workdir = os.fspath(workdir)
    config = pretrained.resolve(config, workdir)
    checks.check(config)
    try:
        folder = workdirs.open_for(config, workdir)
        with workdirs.claim(folder), mirrored(folder):
            return train_in(config, folder, more)
    except jax.errors.JaxRuntimeError as error:
        raise failures.of_runtime(error, workdir) from error


def train_in(config: ConfigDict, folder: pathlib.Path, more: Sequence[Callable[[Run], None]]) -> dict[str, Any]:
    """`train` in a workdir that is open and claimed."""
    run, start = setup.build(config, folder), time.perf_counter()
    with setup.closing(run):
        if run.progress.step == 0:
            callbacks.signal(run)
        with run.interrupts, run.bar:
            for work in run.work():
                if not run.dispatch(work):
                    continue
                if run.settle():
                    for callback in (*callbacks.MEASURING, *more, *callbacks.SAVING):
                        callback(run)
                if run.stopped:
                    break
            finish(run)
        best_step = run.checkpoints.best_step()
    distributed.barrier("done")
    if not distributed.is_first():  # in a bucket it came with the last checkpoint
        mirror.fetch(folder, "metrics.jsonl")
    seconds = time.perf_counter() - start
    title = networks.title(config)
    return report.finish(config, title, folder, run.dataset, best_step, seconds, run.bar.overall_rate)


def finish(run: Run) -> None:
    """Everything is saved. Raises TrainingInterruptedError where the run has not come to its end."""
    run.checkpoints.wait()
    if run.progress.step < run.progress.total:
        if run.progress.step not in run.checkpoints.steps():
            callbacks.write_checkpoint(run)
            run.checkpoints.wait()
        raise preemption.interruption(run.interrupts, run.progress.step, run.progress.total, mirror.shown(run.folder))
    run.trackers.check()  # it is there to be scored


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
