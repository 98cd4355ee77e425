"""What a run measures and how it is kept: sums on the device; JSON Lines, TensorBoard events and a picture."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

from nfjax import _figures as figures, storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "metrics.jsonl"
Step = Annotated[int, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct):
    """What every line has; all else in it are numbers."""

    kind: str
    step: Step


class _Epoch(msgspec.Struct):
    """What a line of the kind "epoch" has at least."""

    epoch: Step
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


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

    A run that goes on from `step` first drops what it had written after that step, and from step 0 all of it: each step
    stands there once. Where lines are damaged, the file is set aside as it was, and goes on without them.
    Raises OSError, at once, where something cannot be written, or the file is no longer where it was.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and whoever writes then waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = workdir / FILE
        with self._explained(step):
            kept = [record for record in _whole(self.path) if step and record["step"] <= step]
            storage.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self.stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
            self.events = EventsWriter(str(workdir / "events"))
            # Tells TensorBoard to forget what it had read of later steps.
            start = step + 1 if step else 0
            self.events.write_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record: kind is "train" (since the last one), "epoch" (of the epoch that ends at this step) or "signal"
        (of the state at this step)."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self.check()
        with self._explained(step):
            self.stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.stream.flush()
            for name, value in values.items():
                summary = scalar(f"{kind}/{name}", value)
                self.events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self.events.flush()

    def check(self) -> None:
        """Raises OSError where the file that was opened is no longer the one of this name: whoever deletes or moves a
        workdir does it to an open file, too, and what is written then is lost.
        """
        opened = os.fstat(self.stream.fileno())
        try:
            there = self.path.stat()
            same = (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)
        except OSError:
            same = False
        if not same:
            what = self.path if self.path.parent.is_dir() else f"the workdir {self.path.parent}"
            raise OSError(
                f"{what} has been deleted, moved or replaced while the run was at work: the run ends, for what it "
                "writes would be lost. Put it back and start the same command again, or give the place it was moved to "
                "as --workdir"
            )

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"the metrics of step {step:,} cannot be written to {self.path.parent} ({error.strerror or error}); "
                "what was saved before is whole: mend it, and start the same command again"
            ) from error

    def close(self) -> None:
        for stream in (self.stream, self.events):
            with contextlib.suppress(OSError):  # what could not be written was told before
                stream.close()


class NoWriter:
    """In place of a `Writer` in all processes but the first."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, none if there is no such file; a last line cut short by a crash is left out.

    Raises storage.DamagedFileError that names the first line which is damaged otherwise.
    """
    return [_record(line, where) for where, line in _lines(workdir / FILE)]


def _whole(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records that are whole; if some are not, the file is set aside, with a warning."""
    records, damage = [], []
    for where, line in _lines(path):
        try:
            records.append(_record(line, where))
        except storage.DamagedFileError as error:
            damage.append(error)
    if damage:
        more = f", and {len(damage) - 1} more of its lines" if len(damage) > 1 else ""
        storage.set_aside(path, f"{damage[0]}{more}")
    return records


def _lines(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """(how an error calls it, line) of every line that is more than the beginning of one."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    last = lines.pop()  # behind the last line end: nothing, what a crash has cut, or a line whose end an editor removed
    with contextlib.suppress(ValueError):
        lines += [last] if isinstance(json.loads(last), dict) else []
    for number, line in enumerate(lines, 1):
        yield f"{path}, line {number},", line


def _record(line: bytes, where: str) -> dict[str, Any]:
    way_out = "the training command of this run, started again, goes on without it"
    storage.parse_json(line, _Line, where, way_out)
    record = storage.parse_json(line, dict[str, Any], where, way_out)
    for name, value in record.items():
        if name != "kind" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise storage.DamagedFileError(f"{where} does not hold what it should: {name} is no number; {way_out}")
    if record["kind"] == "epoch":
        storage.parse_json(line, _Epoch, where, way_out)
    return record


def plot_curves(records: Iterable[Mapping[str, Any]], title: str) -> Figure:
    """Loss and accuracy of training and test by epoch, from the "epoch" records."""
    figure = figures.new(figsize=(9, 3.6), layout="constrained")
    from matplotlib.ticker import MaxNLocator

    epochs = [record for record in records if record["kind"] == "epoch"]
    x = [record["epoch"] for record in epochs]
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
