"""Many networks side by side: what they cost, what their signal does, at which learning rates they train, how well."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scipy import stats

from nfjax import _figures as figures
from nfjax import storage
from nfjax.reproduce import _beginnings, _rates, _records, _runs, _training
from nfjax.reproduce._beginnings import Beginning
from nfjax.reproduce._claims import above
from nfjax.reproduce._grids import Cell, Grid
from nfjax.reproduce._rates import Outcome
from nfjax.reproduce._records import Record
from nfjax.reproduce._runs import Request
from nfjax.reproduce._tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = 10  # where there are no images that say how many
UNMEASURED = "not measured yet"
COLUMNS = (
    "network",
    "parameters",
    "multiply-accumulates",
    "forward, first / last block",
    "closed form",
    "backward, first / last block",
    "closed form",
    "trains at {rate}",
    "test accuracy at {rate}",
    "surely above, below",
    "largest rate",
    "best test accuracy, at rate",
)
SIGNAL = (
    "Forward and backward: variance at the first block divided by that at the last, median of {seeds} seeds [smallest, "
    "largest], for N(0, 1) noise of {batch} images and an N(0, 1) gradient at the last block; closed form: "
    "`spp.predict`, for a wide network."
)
TRAINING = (
    "{images}; {settings}. A run trains where it ends above guessing by more than {errors} standard errors of as many "
    "test images. Test accuracy: at the end, mean ± sample standard deviation over seeds (their number), without the "
    "runs that diverged, which are counted. Surely above, below: of how many of the other networks of its depth, by "
    "the 95 % interval of the difference of the means (Welch's, over seeds, and the test images as a sample), for each "
    "pair by itself: of pairs that are alike, at most one in twenty differs by chance. Largest rate: of a grid of "
    "factors of 2 around {rate}, the largest at which the first seed trains, where a larger one is taken to do no "
    "better. Best test accuracy: of the rates that were tried with that seed. {order}{devices}; {versions}."
)
WITHOUT = "Nothing was trained: --data=DIR names the images."


def measure(grid: Grid, request: Request) -> None:
    """Measures what is missing of the networks before training, then trains what is missing.

    Raises:
        ValueError: There is no such network; otherwise as `_runs.train_missing`.
    """
    cell, *_ = _runs.chosen(grid, request)
    classes = CLASSES
    if request.data:
        classes = len(_runs.open_data(grid.dataset, _runs.make_config(grid.dataset, cell, 0, request)).class_names)
    _beginnings.measure_missing(grid, request, classes)
    if request.data:
        _runs.train_missing(grid.title, grid.dataset, _rates.plan(grid, request), request)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What there is of a grid, by the label of its cells.

    Attributes:
        grid: What is compared.
        settings: What all networks have in common.
        beginnings: Of the networks that were measured before training.
        outcomes: Of the trainings.
    """

    grid: Grid
    settings: Mapping[str, Any]
    beginnings: Mapping[str, Beginning]
    outcomes: Mapping[str, Outcome]

    @property
    def records(self) -> list[Record]:
        return [
            record for outcome in self.outcomes.values() for seeds in outcome.runs.values() for record in seeds.values()
        ]

    def rate(self) -> str:
        """The learning rate of the config."""
        return f"{self.settings[_rates.RATE]:.3g}"

    def title(self) -> str:
        return f"{self.grid.title}, {self.records[0].data}" if self.records else self.grid.title

    def table(self) -> Table:
        columns = [column.format(rate=self.rate()) for column in COLUMNS]
        there = [cell for cell in self.grid.cells if cell.label in self.beginnings or self.outcomes[cell.label].runs]
        rows = [[cell.label, *self._before(cell), *self._after(cell)] for cell in there]
        note = SIGNAL.format(seeds=_beginnings.SEEDS, batch=_beginnings.BATCH)
        return Table(self.title(), columns, rows, f"{note} {self._note()}")

    def text(self) -> str:
        return self.table().text()

    def write(self, path: pathlib.Path) -> list[pathlib.Path]:
        """PATH_<data and settings> with .md; .png, and .csv of every run, where there are runs."""
        differing = _runs.deviations(self.grid.dataset, self.settings)
        parts = [f"{name.rpartition('.')[2]}{value}" for name, value in differing.items()]
        data = [self.records[0].data] if self.records else []
        stem = path.with_name("_".join([path.name, *map(_runs.slug, [*data, *parts])]))
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
        figure = figures.new(figsize=(5.5 + 0.75 * 3 * len(self.grid.depths), 1.9 + 0.3 * len(curves)))
        panels = figure.subplots(1, 3, sharey=True)
        shown = {
            f"test accuracy (%)\nat learning rate {self.rate()}": _accuracy,
            "largest learning rate\nat which it trains": _largest,
            "best test accuracy (%)\nof all learning rates": _best,
        }
        for axes, (title, read) in zip(panels, shown.items(), strict=True):
            cells = {
                (row, column): read(at[depth, curve])
                for row, curve in enumerate(curves)
                for column, depth in enumerate(self.grid.depths)
                if (depth, curve) in at
            }
            _draw(axes, cells)
            axes.set_title(title, fontsize=9)
            axes.set_xticks(range(len(self.grid.depths)), [f"{depth}" for depth in self.grid.depths])
            axes.set_xlabel("layers", fontsize=9)
            axes.set(xlim=(-0.5, len(self.grid.depths) - 0.5), ylim=(len(curves) - 0.5, -0.5))
            axes.tick_params(length=0, labelsize=8.5)
            axes.spines[:].set_visible(False)
        panels[0].set_yticks(range(len(curves)), curves)
        figure.suptitle(f"{self.title()}\n{_training.described(self.grid.dataset, self.settings)}", fontsize=9)
        figure.text(0.01, 0.005, "✗ does not train (÷ diverged)    · not measured    n seeds in brackets", fontsize=8)
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
        if not (usual := outcome.usual):
            return [UNMEASURED] + [""] * 4
        good, diverged = sum(map(_rates.trains, usual)), sum(record.diverged is not None for record in usual)
        reached = _records.over_seeds(usual, "test_accuracy")
        parts = [f"{reached.percent()} ({reached.n})"] if reached else []
        parts += [f"{diverged} of {len(usual)} diverged"] if diverged else []
        best = outcome.best()
        return [
            {0: "no", len(usual): "yes"}.get(good, f"{good} of {len(usual)}"),
            ", ".join(parts),
            "{}, {}".format(*self._surely(cell)) if len(usual) > 1 else "",
            outcome.largest(),
            f"{100 * best[1]:.1f} % at {best[0]:.3g}" if best else "none",
        ]

    def _surely(self, cell: Cell) -> tuple[int, int]:
        """(how many of the networks of its depth it is surely above, below)."""
        own = self.outcomes[cell.label].usual
        others = [self.outcomes[o.label].usual for o in self.grid.cells if o.depth == cell.depth and o != cell]
        answers = [above(own, other) for other in others if other]
        return answers.count("yes"), answers.count("no")

    def _note(self) -> str:
        if not self.records:
            return WITHOUT
        first = self.records[0]
        return TRAINING.format(
            images=f"{first.data}, fingerprint {first.fingerprint}: {first.counted()}",
            settings=_training.described(self.grid.dataset, self.settings),
            errors=_rates.ERRORS,
            rate=self.rate(),
            order=self._order(),
            devices=f"Trained on {_training.devices(self.records)}",
            versions=_training.versions(self.records),
        )

    def _order(self) -> str:
        """How far the order of the networks is the same with every seed."""
        parts = []
        for depth in self.grid.depths:
            groups = [self.outcomes[cell.label].usual for cell in self.grid.cells if cell.depth == depth]
            ends = [{r.seed: r.final("test_accuracy") for r in group if r.diverged is None} for group in groups]
            seeds = sorted(set.union(*map(set, ends)))
            found = []
            for one, other in itertools.combinations(seeds, 2):
                both = [(end[one], end[other]) for end in ends if one in end and other in end]
                if all(len(set(values)) > 1 for values in zip(*both, strict=True)):  # else there is no order
                    found.append(float(stats.spearmanr(both).statistic))
            if found:
                parts.append(f"{statistics.fmean(found):.2f} at {depth} layers")
        if not parts:
            return "With one seed, the order of the networks says nothing. "
        return f"Rank correlation of the networks' accuracies between two seeds, on average: {', '.join(parts)}. "

    def _rows(self) -> list[list[Any]]:
        rows: list[list[Any]] = [["network", "learning rate", "seed", "trains", "test accuracy", "diverged"]]
        for label, outcome in self.outcomes.items():
            for exponent, seeds in sorted(outcome.runs.items()):
                rate = f"{outcome.rate * 2.0**exponent:.6g}"
                for seed, record in sorted(seeds.items()):
                    end = record.final("test_accuracy")
                    rows.append([label, rate, seed, _rates.trains(record), end, record.diverged or ""])
        return rows


def comparisons(grid: Grid, request: Request) -> list[Comparison]:
    """What there is of a grid with the settings that are asked for.

    Args:
        grid: What is compared.
        request: What is asked for.

    Returns:
        One comparison for each set of images that was trained on; where there is none, what is known before training.
    """
    first, read = grid.cells[0], _rates.outcomes(grid, request)
    bare = dataclasses.replace(first, changes={})
    settings = _runs.workdirs.essence(_runs.make_config(grid.dataset, bare, 0, request))
    known = [record for record in _records.read(request.out) if record.dataset == grid.dataset]
    found = []
    for data, fingerprint in dict.fromkeys((record.data, record.fingerprint) for record in known):
        if request.data_name and data != request.data_name:
            continue
        here = [record for record in known if (record.data, record.fingerprint) == (data, fingerprint)]
        beginnings = _beginnings.read(grid, request, here[0].classes)
        comparison = Comparison(grid, settings, beginnings, read(here))
        found += [comparison] if comparison.records else []
    return found or [Comparison(grid, settings, _beginnings.read(grid, request, CLASSES), read([]))]


# ---------------------------------------------------------------- the picture

Shown = tuple[float | None, str]  # (what decides the colour, None for a network that does not train; text)


def _accuracy(outcome: Outcome) -> Shown | None:
    usual = outcome.usual
    if not usual:
        return None
    diverged = all(record.diverged is not None for record in usual)
    seeds = f" ({len(usual)})" if len(usual) > 1 else ""
    if not any(map(_rates.trains, usual)):
        return None, ("÷" if diverged else "✗") + seeds
    reached = _records.over_seeds(usual, "test_accuracy")
    return 100 * reached.mean, f"{100 * reached.mean:.0f}{seeds}"


def _largest(outcome: Outcome) -> Shown | None:
    if not outcome.trained:
        return None
    low, high = _rates.bracket(outcome.trained)
    if low < _rates.LOWEST:
        return (None, "✗") if high == _rates.LOWEST else (None, f"< {outcome.rate * 2.0**high:.2g}")
    return low, f"{outcome.rate * 2.0**low:.2g}" if high - low == 1 else f"≥ {outcome.rate * 2.0**low:.2g}"


def _best(outcome: Outcome) -> Shown | None:
    if not outcome.trained:
        return None
    best = outcome.best()
    return (None, "✗") if best is None else (100 * best[1], f"{100 * best[1]:.0f}")


def _draw(axes: Axes, cells: Mapping[tuple[int, int], Shown | None]) -> None:
    """A field for each network: from dark for the worst to light for the best, red where it does not train."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    values = [shown[0] for shown in cells.values() if shown is not None and shown[0] is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    colours = colormaps["viridis"]
    for (row, column), shown in cells.items():
        colour, ink, text = "#eeeeee", "#777777", "·"
        if shown is not None:
            value, text = shown
            share = None if value is None else (value - low) / (high - low) if high > low else 1.0
            colour = "#8c1d18" if share is None else colours(0.15 + 0.85 * share)
            ink = "black" if share is not None and share > 0.5 else "white"
        axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=colour, linewidth=0))
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
