"""The record of a run, metrics.jsonl: reading it, and drawing it."""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from nfjax import _figures as figures
from nfjax import storage

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


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, none if there is no such file; a last line cut short by a crash is left out.

    Raises storage.DamagedFileError that names the first line which is damaged otherwise.
    """
    return [_record(line, where) for where, line in _lines(workdir / FILE)]


def read_whole(path: pathlib.Path) -> list[dict[str, Any]]:
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


# What a record of the kind "signal" holds of each block or group of parameters, and how a picture calls it.
_OF_BLOCKS = {
    "forward_var": "variance of the activations",
    "backward_var": "variance of the gradients",
    "update_ratio": "update over weights, root mean squares",
    "gradient_norm": "gradient norm of the parameters",
}


def plot_signal(records: Iterable[Mapping[str, Any]], title: str) -> Figure | None:
    """What was measured of each block while it was trained, over the steps, from the "signal" records; None where there
    are none. The colour says where in the network a block stands, from dark, the first, to light; other parameters are
    grey.
    """
    signals = [record for record in records if record["kind"] == "signal"]
    if not signals:
        return None
    figure = figures.new(figsize=(9, 6.4), layout="constrained")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = colormaps["viridis"]
    blocks = list(dict.fromkeys(name.partition("/")[2] for record in signals for name in record if "_var/" in name))
    for axes, (what, called) in zip(figure.subplots(2, 2).flat, _OF_BLOCKS.items(), strict=True):
        found = dict.fromkeys(name for record in signals for name in record if name.startswith(f"{what}/"))
        dashes = iter(itertools.cycle(("--", ":", "-.")))
        for name in found:
            points = [(record["step"], record[name]) for record in signals if record.get(name, 0) > 0]
            block = name.partition("/")[2]
            if block in blocks:
                look = {"color": colours(0.92 * blocks.index(block) / max(len(blocks) - 1, 1)), "label": f"_{name}"}
            else:  # a group of parameters beside the blocks, such as the stem
                look = {"color": "0.3", "linestyle": next(dashes), "label": block}
            if points:
                marker = "o" if len(points) < 30 else ""
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1, **look)
        axes.set(xlabel="step", title=called, yscale="log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1 / 0.92), colours), ax=figure.axes, shrink=0.6)
    bar.ax.set_ylim(0, 1)
    bar.set_ticks([0, 1], labels=["first", "last"])
    bar.set_label("block")
    figure.suptitle(title)
    return figure


def _lower_limit(epochs: list[Mapping[str, Any]]) -> float:
    """Leaves out the first climb, so that the end of the curve can be read."""
    test = [100 * record["test_accuracy"] for record in epochs]
    return max(0.0, float(np.percentile(test, 10)) - 5) if test else 0.0
