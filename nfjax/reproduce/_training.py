"""Figures 3, 4, 5 and 7 of the paper: accuracy by epoch, mean and standard deviation over seeds, and a table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nfjax import _figures as figures
from nfjax import spp, storage
from nfjax.reproduce import _grids, _provenance, _records, _runs
from nfjax.reproduce._curves import styles
from nfjax.reproduce._grids import Cell, Grid
from nfjax.reproduce._records import Record
from nfjax.reproduce._tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "network",
    "seeds",
    "diverged",
    "epochs",
    "test accuracy at the end",
    "best test accuracy",
    "training accuracy at the end",
    "minutes per run",
    "settings",
)
NOTE = (
    "{images}{settings}. Mean ± sample standard deviation over seeds; runs that diverged are counted, and left out of "
    "the means. Training accuracy is that of the augmented images, while the network learned them. Minutes are of "
    "training, without evaluation, on {devices}. {versions}. The last column is a hash of all settings but the seed."
)

ABOUT = {
    _grids.BASELINE: "BatchNorm has identity shortcuts.",
    _grids.BEYOND: "The effective fan-out is not in the paper.",
    _grids.CONTROL: "The control, identity shortcuts without batch norm, is not in the paper's figure.",
}


@dataclasses.dataclass(frozen=True)
class TrainingFigure:
    """The runs of a grid that may be compared, by the label of their cell, and the seeds that each of them lacks.

    settings: what they have in common, but for what a cell changes.
    """

    grid: Grid
    settings: Mapping[str, Any]
    found: Mapping[str, Sequence[Record]]
    missing: Mapping[str, Sequence[int]]

    @property
    def first(self) -> Record:
        return next(record for group in self.found.values() for record in group)

    def setting(self) -> str:
        """What is not as in the paper, for a person."""
        return _provenance.describe(self.grid.dataset, self.settings)

    def title(self) -> str:
        return f"{self.grid.title}, {self.first.data}"

    def table(self) -> Table:
        rows = [_row(label, group) for label, group in self.found.items() if group]
        everything = [record for group in self.found.values() for record in group]
        note = NOTE.format(
            images=f"{self.first.data}, fingerprint {self.first.fingerprint}: {self.first.counted()}; ",
            settings=self.setting(),
            devices=_provenance.devices(everything),
            versions=_provenance.versions(everything),
        )
        about = [text for curve, text in ABOUT.items() if any(record.curve == curve for record in everything)]
        return Table(self.title(), COLUMNS, rows, " ".join([note, *about]) + self._diverged() + self._lacking())

    def text(self) -> str:
        return self.table().text()

    def write(self, path: pathlib.Path) -> list[pathlib.Path]:
        """PATH_<data and settings> with .md, .png, and .csv of every epoch of every run."""
        stem = _provenance.stem(path, self.grid.dataset, self.settings, self.first.data)
        written = [stem.with_suffix(suffix) for suffix in (".md", ".png", ".csv")]
        storage.write_text(written[0], self.table().markdown())
        storage.write_figure(written[1], self.plot(), dpi=120)
        rows: list[list[Any]] = [["network", "seed", "epoch", *_records.PER_EPOCH]]
        for label, group in self.found.items():
            for record in group:
                columns = zip(*(record.epochs[name] for name in _records.PER_EPOCH), strict=True)
                rows += [[label, record.seed, epoch, *values] for epoch, values in enumerate(columns, 1)]
        storage.write_csv(written[2], rows)
        return written

    def _diverged(self) -> str:
        """How each of the runs that diverged did."""
        parts = [
            f"{label}, seed {record.seed}, {record.diverged.partition(', the learning rate')[0]}"
            for label, group in self.found.items()
            for record in group
            if record.diverged is not None
        ]
        return f" Diverged: {'; '.join(parts)}." if parts else ""

    def _lacking(self) -> str:
        """Which runs are missing; those that lack the same seeds together."""
        alike: dict[tuple[int, ...], list[str]] = {}
        for label, seeds in self.missing.items():
            if seeds:
                alike.setdefault(tuple(seeds), []).append(label)
        parts = [
            f"seed {', '.join(map(str, seeds))} of {'all' if len(labels) == len(self.found) else '; '.join(labels)}"
            for seeds, labels in alike.items()
        ]
        return f" Missing: {'. '.join(parts)}." if parts else ""

    def plot(self) -> Figure:
        """Training accuracy on the left, test accuracy on the right, one row for each depth."""
        if self.grid.by_depth:
            return self._plot_by_depth()
        depths = [depth for depth in self.grid.depths if self._of(depth)]
        figure = figures.new(figsize=(13, 4.2 * len(depths) + 0.4), layout="constrained")
        from matplotlib.ticker import MaxNLocator

        for depth, row in zip(depths, figure.subplots(len(depths), 2, squeeze=False), strict=True):
            cells = self._of(depth)
            looks = _looks(cells)
            for axes, split in zip(row, ("train", "test"), strict=True):
                for cell in cells:
                    name = cell.label.removeprefix(f"ResNet-{depth} ")
                    _draw(axes, self.found[cell.label], f"{split}_accuracy", looks[cell.label], name)
                if split == "test" and self.grid.line is not None:
                    name, value = self.grid.line
                    axes.axhline(100 * value, color="black", linestyle="--", linewidth=1, label=name)
                axes.set(xlabel="epoch", ylabel=f"{'training' if split == 'train' else split} accuracy (%)")
                axes.set_title(f"ResNet-{depth}", fontsize=10)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
                axes.grid(alpha=0.3)
                axes.spines[["top", "right"]].set_visible(False)
            row[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        everything = [record for group in self.found.values() for record in group]
        figure.suptitle(f"{self.title()}, {_provenance.devices(everything)}\n{self.setting()}", fontsize=10)
        return figure

    def _plot_by_depth(self) -> Figure:
        """Training accuracy on the left, test accuracy on the right, at the end of the runs of each depth."""
        figure = figures.new(figsize=(13, 4.6), layout="constrained")
        curves = list(dict.fromkeys(cell.curve for cell in self.grid.cells if self.found[cell.label]))
        looks = styles(curves)
        for axes, split in zip(figure.subplots(1, 2), ("train", "test"), strict=True):
            for number, curve in enumerate(curves):
                aside = 1.02 ** (number - len(curves) // 2)  # so that bars do not cover each other
                cells = [cell for cell in self.grid.cells if cell.curve == curve]
                groups = [(aside * cell.depth, self.found[cell.label]) for cell in cells]
                _draw_by_depth(axes, groups, f"{split}_accuracy", looks[curve], curve)
            axes.set(xlabel="layers", ylabel=f"{'training' if split == 'train' else split} accuracy at the end (%)")
            axes.set_xscale("log")
            axes.set_xticks(self.grid.depths, [str(depth) for depth in self.grid.depths])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        everything = [record for group in self.found.values() for record in group]
        figure.suptitle(f"{self.title()}, {_provenance.devices(everything)}\n{self.setting()}", fontsize=10)
        return figure

    def _of(self, depth: int) -> list[Cell]:
        """The cells of that depth that have runs."""
        return [cell for cell in self.grid.cells if cell.depth == depth and self.found[cell.label]]


def training_figures(grid: Grid, request: _runs.Request) -> list[TrainingFigure]:
    """What there is of a grid with the settings that are asked for.

    Args:
        grid: What is compared.
        request: What is asked for.

    Returns:
        One figure for each set of images that it was trained on.

    Raises:
        ValueError: There is nothing yet.
    """
    known = [record for record in _records.read(request.out) if record.dataset == grid.dataset]
    names = dict.fromkeys((record.data, record.fingerprint) for record in known)
    networks = [run for run in _runs.planned(grid, request) if run.seed == 0]
    drawn = []
    for data, fingerprint in names:
        if request.data_name and data != request.data_name:
            continue
        here = [record for record in known if (record.data, record.fingerprint) == (data, fingerprint)]
        found, missing = {}, {}
        for run in networks:
            label = run.cell.label
            # With every seed there is, whether it was asked for or not.
            found[label] = sorted((r for r in here if _same_network(r, run)), key=lambda record: record.seed)
            missing[label] = sorted(set(range(request.seeds)) - {record.seed for record in found[label]})
        if any(found.values()):
            drawn.append(TrainingFigure(grid, networks[0].settings, found, missing))
    if not drawn:
        images = f" on {request.data_name}" if request.data_name else ""
        raise ValueError(
            f"{request.out / _records.FILE} has no run of {grid.title} with these settings{images}; train them with "
            f"--data=DIR{_others(grid, known)}"
        )
    return drawn


def _others(grid: Grid, known: Sequence[Record]) -> str:
    """What runs there are of networks of this grid, with other settings or images."""
    curves = {(cell.depth, cell.curve) for cell in grid.cells}
    sets = dict.fromkeys(
        f"{group[0].data}, {_provenance.describe(grid.dataset, group[0].settings)}"
        for group in _records.groups(record for record in known if (record.depth, record.curve) in curves)
    )
    return "".join([". There are runs of", *(f"\n  {text}" for text in sets)]) if sets else ""


def _same_network(record: Record, run: _runs.Run) -> bool:
    return _records.agree(record.settings, {name: value for name, value in run.settings.items() if name != "seed"})


def _row(label: str, group: Sequence[Record]) -> list[str | int]:
    diverged = [record for record in group if record.diverged is not None]

    def percent(name: str, of: str = "final") -> str:
        value = _records.over_seeds(group, name, of)
        return value.percent() if value else "diverged"

    minutes = _records.mean(record.seconds / 60 for record in group if record.diverged is None)
    steps = [f"after epoch {len(record.epochs['test_accuracy'])}" for record in diverged]
    without_seed = {name: value for name, value in group[0].settings.items() if name != "seed"}
    return [
        label,
        len(group),
        f"{len(diverged)}, {', '.join(dict.fromkeys(steps))}" if diverged else 0,
        group[0].settings["epochs"],
        percent("test_accuracy"),
        percent("test_accuracy", "best"),
        percent("train_accuracy"),
        f"{minutes.mean:.1f}" if minutes else "",
        hashlib.sha256(json.dumps(without_seed, sort_keys=True).encode()).hexdigest()[:8],
    ]


def _looks(cells: Sequence[Cell]) -> dict[str, spp.Style]:
    """By scheme and initialization where the cells differ in them, else one colour for each."""
    names = [cell.curve for cell in cells]
    if len(set(names)) == len(names):
        return {cell.label: styles(names)[cell.curve] for cell in cells}
    return spp.styles([cell.label for cell in cells])


def _draw(axes: Axes, group: Sequence[Record], name: str, look: spp.Style, label: str) -> None:
    """The mean by epoch with a shade of one standard deviation; a run that diverged as a thin line that ends in a
    cross.
    """
    whole = [record.epochs[name] for record in group if record.diverged is None]
    drawn = {"color": look.color, "linestyle": look.linestyle}
    if whole:
        values = 100 * np.array(whole)  # [seeds, epochs]
        epochs, middle = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
        seeds = f" ({len(whole)} seeds)" if len(whole) > 1 else " (1 seed)"
        marker = look.marker if len(epochs) < 30 else ""
        axes.plot(epochs, middle, **drawn, marker=marker, markersize=3, linewidth=1.4, label=label + seeds)
        if len(whole) > 1:
            spread = values.std(axis=0, ddof=1)
            axes.fill_between(epochs, middle - spread, middle + spread, color=look.color, alpha=0.2, linewidth=0)
    for number, record in enumerate(record for record in group if record.diverged is not None):
        values = 100 * np.array(record.epochs[name] or [1 / record.classes])
        epochs = np.arange(1, len(values) + 1)
        named = None if whole or number else f"{label} (diverged)"
        axes.plot(epochs, values, **drawn, linewidth=0.8, label=named)
        axes.plot(epochs[-1:], values[-1:], marker="x", color=look.color, markersize=8, linestyle="")


def _draw_by_depth(
    axes: Axes, groups: Sequence[tuple[float, Sequence[Record]]], name: str, look: spp.Style, label: str
) -> None:
    """The mean over seeds by depth, with a bar of one standard deviation; a cross where runs diverged."""
    drawn = {"color": look.color, "linestyle": look.linestyle}
    means = [(depth, mean) for depth, group in groups if (mean := _records.over_seeds(group, name))]
    if means:
        depths, values = zip(*means, strict=True)
        middle, spread = [100 * mean.mean for mean in values], [100 * mean.std for mean in values]
        axes.errorbar(depths, middle, spread, **drawn, marker=look.marker, markersize=4, capsize=3, label=label)
    for number, (depth, record) in enumerate(
        (depth, record) for depth, group in groups for record in group if record.diverged is not None
    ):
        reached = 100 * (record.final(name) or 1 / record.classes)
        named = None if number else f"{label} (diverged)"
        axes.plot([depth], [reached], marker="x", color=look.color, markersize=8, linestyle="", label=named)


def ablation_grid(request: _runs.Request) -> Grid:
    """The ablations, with the number of epochs that is asked for."""
    usual = Cell(18, _grids.CONVSHORT, "")
    return _grids.ablations(_runs.make_config("CIFAR-10", usual, 0, request).epochs)
