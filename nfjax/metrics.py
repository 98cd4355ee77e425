"""What a run measures and how it is kept: sums on the device; JSON Lines, TensorBoard events and a picture."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Per-example loss [B] of logits [B, C] and labels [B]; smoothing mixes the one-hot target with the uniform one
    (Szegedy et al. 2016).
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def sums(losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Loss, correct predictions and number of the examples whose mask is 1, each summed over the batch."""
    correct = (jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == labels).astype(jnp.float32)
    # where, not a product: a masked example contributes nothing even if its loss is not finite.
    return {"loss": jnp.where(mask > 0, losses, 0.0).sum(), "correct": (correct * mask).sum(), "count": mask.sum()}


def means(totals: Mapping[str, float]) -> dict[str, float]:
    """{"loss", "accuracy"} from sums; accuracy is a fraction in [0, 1]."""
    return {"loss": float(totals["loss"] / totals["count"]), "accuracy": float(totals["correct"] / totals["count"])}


class Writer:
    """Appends records to `metrics.jsonl` and their numbers to TensorBoard events in the same folder.

    A run that goes on from `step` first drops what it had written after that step: each step stands there once.
    Raises OSError, at once, where something cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and whoever writes then waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = workdir / "metrics.jsonl"
        kept = [record for record in read(workdir) if record["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)
        self.stream = open(self.path, "a")  # noqa: SIM115  closed in close()
        self.events = EventsWriter(str(workdir / "events"))
        # Tells TensorBoard to forget what it had read of later steps.
        self.events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record: kind is "train" (since the last one), "epoch" (of the epoch that ends at this step) or "signal"
        (of the state at this step)."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        try:
            self.stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.stream.flush()
            for name, value in values.items():
                summary = scalar(f"{kind}/{name}", value)
                self.events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self.events.flush()
        except OSError as error:
            raise OSError(
                f"the metrics of step {step:,} cannot be written to {self.path.parent} ({error.strerror}); what was "
                "saved before is whole: mend it, and start the same command again"
            ) from error

    def close(self) -> None:
        for stream in (self.stream, self.events):
            with contextlib.suppress(OSError):  # what could not be written was told before
                stream.close()


class NoWriter:
    """In place of a `Writer` in all processes but the first."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is open."""


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, none if there is no such file; a line cut short by a crash is left out."""
    path = workdir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_curves(records: Iterable[Mapping[str, Any]], title: str) -> Figure:
    """Loss and accuracy of training and test by epoch, from the "epoch" records."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [record for record in records if record["kind"] == "epoch"]
    x = [record["epoch"] for record in epochs]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    marker = "o" if len(epochs) < 30 else ""  # a line through one epoch would not be seen
    # Okabe and Ito's colour-blind-safe orange and blue.
    for split, colour, style in (("train", "#E69F00", "--"), ("test", "#0072B2", "-")):
        look = {"color": colour, "linestyle": style, "marker": marker, "markersize": 3}
        left.plot(x, [record[f"{split}_loss"] for record in epochs], **look, label=split)
        accuracies = [100 * record[f"{split}_accuracy"] for record in epochs]
        end = f", {accuracies[-1]:.2f} % at the end" if epochs else ""
        right.plot(x, accuracies, **look, label=split + end)
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(_lower_limit(epochs), 100.5))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    return figure


def _lower_limit(epochs: list[Mapping[str, Any]]) -> float:
    """Leaves out the first climb, so that the end of the curve can be read."""
    test = [100 * record["test_accuracy"] for record in epochs]
    return max(0.0, float(np.percentile(test, 10)) - 5) if test else 0.0
