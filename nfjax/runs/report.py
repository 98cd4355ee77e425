"""What a run says before its first step and after its last."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from nfjax import _streams as streams
from nfjax import cost, data, distributed, storage
from nfjax.data.loading import skips
from nfjax.data.splits import left_aside
from nfjax.runs import files, metrics, mirror

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def header(config: ConfigDict, network: str, folder: pathlib.Path, dataset: data.Dataset, model: nnx.Module) -> str:
    """What is about to be trained, on what, where. network: in a line; model: the same, to be counted."""
    size = config.data.image_size
    spent = cost.count(model, (1, size, size, 3))
    device = jax.devices()[0]
    aside = f"; {left_aside(dataset.left_aside)}" if dataset.left_aside else ""
    return (
        f"model   {network}: "
        f"{spent.parameters:,} parameters, {spent.macs / 1e6:,.1f} M multiply-accumulates per image\n"
        f"data    {config.data.source} {config.data.dir}: {len(dataset.train):,} training and {len(dataset.test):,} "
        f"test images of {size}x{size}, "
        f"{len(dataset.class_names)} classes{aside}\n"
        f"device  {jax.device_count()} x {device.device_kind}, {config.model.dtype}, batch {config.batch_size}\n"
        f"run     {mirror.shown(folder)}, {config.epochs} epochs"
    )


def finish(
    config: ConfigDict,
    network: str,
    folder: pathlib.Path,
    dataset: data.Dataset,
    best_step: int,
    seconds: float,
    rate: float,
) -> dict[str, Any]:
    """Draws curves.png and, where it was measured, signal.png, prints and returns the summary; the first process does,
    the others return it.

    Args:
        config: Of the run.
        network: In a few words.
        folder: The workdir.
        dataset: What it was trained on.
        best_step: Step of the best checkpoint.
        seconds: That this start took.
        rate: Images per second, 0 where nothing was trained.
    """
    records = metrics.read(folder)
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        raise ValueError(
            f"the run in {folder} is complete, but its metrics.jsonl holds no epoch: was it changed or moved?"
        )
    # Of equal ones the last, as the checkpoint that is kept as the best one.
    last, best = epochs[-1], max(reversed(epochs), key=lambda record: record["test_accuracy"])
    saved = next((record["test_accuracy"] for record in epochs if record["step"] == best_step), last["test_accuracy"])
    summary = {
        "steps": last["step"],
        "test_accuracy": last["test_accuracy"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
    }
    average = []
    if "test_ema_accuracy" in last:
        summary["test_ema_accuracy"] = last["test_ema_accuracy"]
        average = [f"        {last['test_ema_accuracy']:.2%} by the average of the weights"]
    if not distributed.is_first():
        return summary
    title = f"{network}, {config.data.source}"
    drawn = {
        "curves": _draw("curves", folder, lambda: metrics.plot_curves(records, title)),
        "signal": _draw("signal", folder, lambda: metrics.plot_signal(records, title)),
    }
    work = f"{seconds:.0f} s, {rate:,.0f} images/s" if rate else "already complete"
    lines = [
        f"done    {config.epochs} epochs, {last['step']:,} steps, {work}",
        f"test    {last['test_accuracy']:.2%} at the end, best {best['test_accuracy']:.2%} after epoch "
        f"{best['epoch']}, "
        f"of {last.get('test_images', len(dataset.test)):,} images",
        *average,
        f"train   {last['train_accuracy']:.2%} in the last epoch, augmented",
        *(f"{name}  {mirror.shown(folder)}/{name}.png" for name, is_there in drawn.items() if is_there),
        f"score   python -m nfjax.evaluate --workdir={mirror.shown(folder)}   (the best checkpoint: step "
        f"{best_step:,}, {saved:.2%})",
    ]
    skipped = dataset.skipped | skips.read(folder)
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        lines.append(
            f"skipped {len(skipped)} images that cannot be read: {', '.join(list(skipped)[:5])}{more}; all are named "
            f"in {mirror.shown(folder)}/{files.DATA if dataset.skipped else skips.FILE}"
        )
    print("\n".join(lines), file=streams.out(), flush=True)
    return summary


def _draw(name: str, folder: pathlib.Path, plot: Callable[[], Figure | None]) -> bool:
    """Writes a picture, if there is something to draw; where that cannot be done, the run is done all the same, with a
    warning.
    """
    picture = io.BytesIO()
    try:
        figure = plot()
        if figure is None:
            return False
        figure.savefig(picture, format="png", dpi=150)
        storage.write_bytes(folder / f"{name}.png", picture.getvalue())
    except Exception as error:  # matplotlib has many reasons: its own settings, fonts, caches
        logging.warning(
            "the %s cannot be drawn (%s: %s); the run is complete, its numbers are in %s/metrics.jsonl, and the "
            "same command draws them again",
            name,
            type(error).__name__,
            error,
            folder,
        )
        return False
    return True
