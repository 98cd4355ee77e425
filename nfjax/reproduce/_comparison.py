"""Many networks side by side: what they cost, what their signal does, at which learning rates they train, how well."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nfjax import _figures as figures
from nfjax import storage
from nfjax.reproduce import _beginnings, _fields, _intervals, _provenance, _rates, _records, _runs
from nfjax.reproduce._beginnings import Beginning
from nfjax.reproduce._grids import Cell, Grid
from nfjax.reproduce._rates import Outcome
from nfjax.reproduce._records import Record
from nfjax.reproduce._runs import Images, Request
from nfjax.reproduce._tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10  # where there are no images that say how many
UNMEASURED = "not measured yet"
BEFORE = (
    "network",
    "parameters",
    "multiply-accumulates",
    "forward, first / last block",
    "forward, closed form",
    "backward, first / last block",
    "backward, closed form",
)
AFTER = (
    "trains at {rate}",
    "test accuracy at {rate}",
    "surely above, below",
    "largest rate",
    "best test accuracy, at rate",
)
SIGNAL = (
    "Cost: of networks for {classes} classes and one image of {size} pixels, width {width}. Forward and backward: "
    "variance at the first block divided by that at the last, median of {seeds} seeds [smallest, largest], for N(0, 1) "
    "noise of {batch} images and an N(0, 1) gradient at the last block; closed form: `spp.predict` of the first seed's "
    "kernels, none where there is no such form."
)
TRAINING = (
    "{images}; {settings}{own}. A run trains where it ends above guessing ({guessing:.1f} %) by more than {errors} "
    "standard errors of as many test images. Test accuracy: at the end, mean ± sample standard deviation over seeds "
    "(their number), without the runs that diverged, which are counted. Surely above, below: of how many of the other "
    "networks of its depth, by the 95 % interval of the difference of the means (Welch's, over seeds, and the test "
    "images as a sample), for each pair by itself: of pairs that are alike, at most one in twenty differs by chance; "
    "of a network with a run that diverged, or with one run, nothing is sure. Largest rate: of a grid of factors of 2 "
    "around {rate}, the largest at which the first seed trains, where a larger one is taken to do no better. Best test "
    "accuracy: of the rates that were tried with that seed, more of them for some networks than for others. {order} "
    "Trained on {devices}; {versions}."
)
NOTHING = "Nothing was trained: --data=DIR names the images."
NOTHING_YET = "No run has come to its end yet: the same command goes on."


def check(grid: Grid, request: Request) -> None:
    """Raises ValueError for what would be found only after much was measured: networks, settings and records."""
    for cell in _runs.choose_cells(grid, request):
        for name in request.changes.keys() & cell.changes.keys() - {_rates.RATE}:
            raise ValueError(
                f"--config.{name}={request.changes[name]}: {cell.label} has {name}={cell.changes[name]} of its own"
            )
    _rates.make_reader(grid, request)
    _records.read(request.out)
    _beginnings.read(grid, request, CLASSES)


def run(grid: Grid, request: Request, images: Images | None) -> None:
    """Measures what is missing of the networks before training, then trains what is missing.

    Args:
        grid: What is compared.
        request: What is asked for.
        images: What `_runs.prepare` says of those to train on, None to train nothing.

    Raises:
        ValueError: As `_runs.train_missing`.
    """
    _beginnings.measure_missing(grid, request, images.classes if images else CLASSES)
    if images is not None:
        title = f"{grid.title} (which learning rates are tried follows from the runs)"
        _runs.train_missing(title, grid.dataset, _rates.plan_rates(grid, request), request, images)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What there is of a grid, by the label of its cells.

    Attributes:
        grid: What is compared.
        settings: What all networks have in common.
        classes: Of the images.
        beginnings: Of the networks that were measured before training.
        outcomes: Of the trainings.
        note: Why there is no training, where there is none.
    """

    grid: Grid
    settings: Mapping[str, Any]
    classes: int
    beginnings: Mapping[str, Beginning]
    outcomes: Mapping[str, Outcome]
    note: str = ""

    @property
    def records(self) -> list[Record]:
        return [record for one in self.outcomes.values() for seeds in one.runs.values() for record in seeds.values()]

    def rate(self) -> str:
        """The learning rate of the config."""
        return f"{self.settings[_rates.RATE]:.3g}"

    def title(self) -> str:
        return f"{self.grid.title}, {self.records[0].data}" if self.records else self.grid.title

    def table(self) -> Table:
        columns = [column.format(rate=self.rate()) for column in (*BEFORE, *(AFTER if self.records else ()))]
        there = [cell for cell in self.grid.cells if cell.label in self.beginnings or self.outcomes[cell.label].runs]
        rows = [[cell.label, *self._before(cell), *(self._after(cell) if self.records else [])] for cell in there]
        signal = SIGNAL.format(
            classes=self.classes,
            size=self.settings["data.image_size"],
            width=self.settings["model.width"],
            seeds=_beginnings.SEEDS,
            batch=_beginnings.BATCH,
        )
        return Table(self.title(), columns, rows, f"{signal} {self._training()}")

    def text(self) -> str:
        return self.table().text()

    def write(self, path: pathlib.Path) -> list[pathlib.Path]:
        """PATH_<data and settings> with .md; .png, and .csv of every run, where there are runs."""
        data = self.records[0].data if self.records else None
        stem = _provenance.stem(path, self.grid.dataset, self.settings, data)
        written = [stem.with_suffix(".md")]
        storage.write_text(written[0], self.table().markdown())
        if self.records:
            written += [stem.with_suffix(".png"), stem.with_suffix(".csv")]
            storage.write_figure(written[1], self.plot(), dpi=120)
            storage.write_csv(written[2], self._rows())
        return written

    def plot(self) -> Figure:
        """Network against depth: test accuracy at the rate of the config, the largest rate, the best test accuracy."""
        curves = list(dict.fromkeys(cell.curve for cell in self.grid.cells))
        at = {(cell.depth, cell.curve): self.outcomes[cell.label] for cell in self.grid.cells}
        figure = figures.new(figsize=(5.5 + 0.75 * 3 * len(self.grid.depths), 2.1 + 0.3 * len(curves)))
        panels = figure.subplots(1, 3, sharey=True)
        shown = {
            f"test accuracy (%)\nat learning rate {self.rate()}": _fields.accuracy,
            "largest learning rate\nat which it trains": _fields.largest,
            "best test accuracy (%)\nof all rates that were tried": _fields.best,
        }
        for axes, (title, read) in zip(panels, shown.items(), strict=True):
            cells = {
                (row, column): read(at[depth, curve])
                for row, curve in enumerate(curves)
                for column, depth in enumerate(self.grid.depths)
                if (depth, curve) in at
            }
            _fields.draw(axes, cells)
            axes.set_title(title, fontsize=9)
            axes.set_xticks(range(len(self.grid.depths)), [f"{depth}" for depth in self.grid.depths])
            axes.set_xlabel("layers", fontsize=9)
            axes.set(xlim=(-0.5, len(self.grid.depths) - 0.5), ylim=(len(curves) - 0.5, -0.5))
            axes.tick_params(length=0, labelsize=8.5)
            axes.spines[:].set_visible(False)
        panels[0].set_yticks(range(len(curves)), curves)
        figure.suptitle(f"{self.title()}\n{_provenance.describe(self.grid.dataset, self.settings)}", fontsize=9)
        figure.text(0.01, 0.005, _fields.LEGEND, fontsize=8)
        figure.set_layout_engine("constrained", rect=(0, 0.025, 1, 0.975))
        return figure

    def _before(self, cell: Cell) -> list[str | int]:
        """What is known of a network before training."""
        if (beginning := self.beginnings.get(cell.label)) is None:
            return [UNMEASURED] + [""] * 5
        closed = ["none" if ratio is None else f"{ratio:.3g}" for ratio in beginning.closed or (None, None)]
        signal = [
            f"{statistics.median(ratios):.3g} [{ratios[0]:.3g}, {ratios[-1]:.3g}]"
            for ratios in (beginning.forward, beginning.backward)
        ]
        return [beginning.parameters, beginning.macs, signal[0], closed[0], signal[1], closed[1]]

    def _after(self, cell: Cell) -> list[str]:
        """What its trainings came to."""
        outcome = self.outcomes[cell.label]
        if not outcome.runs:
            return [UNMEASURED] + [""] * 4
        usual, best = outcome.usual, outcome.best()
        good, diverged = sum(map(_rates.trains, usual)), sum(record.diverged is not None for record in usual)
        reached = _records.over_seeds(usual, "test_accuracy")
        parts = [f"{reached.percent()} ({reached.n})"] if reached else []
        parts += [f"{diverged} of {len(usual)} diverged"] if diverged else []
        return [
            {0: "no", len(usual): "yes"}.get(good, f"{good} of {len(usual)}") if usual else UNMEASURED,
            ", ".join(parts),
            "{}, {}".format(*self._surely(cell)) if len(usual) > 1 and not diverged else "",
            outcome.largest_rate(),
            f"{100 * best[1]:.1f} % at {best[0]:.3g}" if best else "none",
        ]

    def _surely(self, cell: Cell) -> tuple[int, int]:
        """(how many of the networks of its depth it is surely above, below)."""
        own = self.outcomes[cell.label].usual
        others = [self.outcomes[o.label].usual for o in self.grid.cells if o.depth == cell.depth and o != cell]
        answers = [_intervals.difference(own, other) for other in others]
        return answers.count(1), answers.count(-1)

    def _training(self) -> str:
        """What is to be known of the trainings."""
        if not self.records:
            return self.note
        first = self.records[0]
        own: dict[str, list[str]] = {}
        for cell in self.grid.cells:
            for name, value in cell.changes.items():
                if name in _runs.OVERRULING:  # the number of layers says it
                    continue
                networks = own.setdefault(f"{name} {value}", [])
                networks += [] if cell.curve in networks else [cell.curve]
        told = [f"; {setting} of {' and '.join(curves)}" for setting, curves in own.items()]
        return TRAINING.format(
            images=f"{first.data}, fingerprint {first.fingerprint}: {first.counted()}",
            settings=_provenance.describe(self.grid.dataset, self.settings),
            own="".join(told),
            guessing=100 * (first.guessing or 1 / first.classes),
            errors=_rates.ERRORS,
            rate=self.rate(),
            order=self._order(),
            devices=_provenance.devices(self.records),
            versions=_provenance.versions(self.records),
        )

    def _order(self) -> str:
        """How far the order of the networks is the same with every seed."""
        parts = []
        for depth in self.grid.depths:
            groups = [self.outcomes[cell.label].usual for cell in self.grid.cells if cell.depth == depth]
            if (found := _intervals.rank_correlation(groups)) is not None:
                parts.append(f"{found[0]:.2f} at {depth} layers (of at least {found[1]} networks)")
        if not parts:
            return "No two seeds have three networks of one depth in common: their order says nothing."
        return f"Rank correlation of the networks' accuracies between two seeds, on average: {', '.join(parts)}."

    def _rows(self) -> list[list[Any]]:
        rows: list[list[Any]] = [["network", "learning rate", "seed", "trains", "test accuracy", "diverged"]]
        for label, outcome in self.outcomes.items():
            for exponent, seeds in sorted(outcome.runs.items()):
                rate = f"{outcome.rate * 2.0**exponent:.6g}"
                for seed, record in sorted(seeds.items()):
                    end = record.final("test_accuracy")
                    rows.append([label, rate, seed, _rates.trains(record), end, record.diverged or ""])
        return rows


def comparisons(grid: Grid, request: Request, images: Images | None = None) -> list[Comparison]:
    """What there is of a grid with the settings that are asked for.

    Args:
        grid: What is compared.
        request: What is asked for.
        images: Those that were to be trained on.

    Returns:
        One comparison for each set of images that was trained on; where there is none, what is known before training.
    """
    first, read = grid.cells[0], _rates.make_reader(grid, request)
    bare = dataclasses.replace(first, changes={})
    settings = _runs.make_run(grid, bare, 0, request).settings
    known = [record for record in _records.read(request.out) if record.dataset == grid.dataset]
    found = []
    for data, fingerprint in dict.fromkeys((record.data, record.fingerprint) for record in known):
        if request.data_name and data != request.data_name:
            continue
        here = [record for record in known if (record.data, record.fingerprint) == (data, fingerprint)]
        classes = here[0].classes
        comparison = Comparison(grid, settings, classes, _beginnings.read(grid, request, classes), read(here))
        found += [comparison] if comparison.records else []
    classes = images.classes if images else CLASSES
    nothing = NOTHING_YET if images else NOTHING
    return found or [Comparison(grid, settings, classes, _beginnings.read(grid, request, classes), read([]), nothing)]
