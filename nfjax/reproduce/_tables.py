"""Tables 1 and 2 of the paper: parameters and FLOPs, our numbers beside each printed one."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from flax import nnx

from nfjax import cost, resnet, storage

INPUT = (1, 32, 32, 3)  # the paper's input resolution, one image
CLASSES = 10

# (residual, norm) of the paper's rows. BatchNorm's printed numbers hold only with a convolutional shortcut in every
# block.
SCHEMES = {
    "BatchNorm": ("conv", "batch"),
    "IdShort": ("idshort", None),
    "LearnScalar": ("learnscalar", None),
    "ConvShort": ("convshort", None),
}
# Printed in the paper: (depth, scheme) -> parameters in millions, FLOPs in 1e9.
TABLE_1 = {
    (50, "BatchNorm"): (38.02, 4.2),
    (50, "IdShort"): (23.47, 2.6),
    (50, "LearnScalar"): (23.47, 2.6),
    (50, "ConvShort"): (38.02, 4.2),
    (101, "BatchNorm"): (74.78, 8.92),
    (101, "IdShort"): (42.41, 5.02),
    (101, "LearnScalar"): (42.41, 5.02),
    (101, "ConvShort"): (74.78, 8.92),
}
TABLE_2 = {
    (18, "BatchNorm"): (11.52, 1.16),
    (18, "IdShort"): (11.16, 1.12),
    (18, "LearnScalar"): (11.16, 1.12),
    (18, "ConvShort"): (11.52, 1.16),
}

COLUMNS = (
    "model",
    "params (M), paper",
    "params (M), ours",
    "FLOPs (G), paper",
    "FLOPs (G), ours",
    "agrees",
    "parameters, all",
    "multiply-accumulates",
    "FLOPs",
)
NOTE = (
    "The columns \"ours\" follow the paper's convention: batch norm's own parameters are left out, FLOPs are twice the "
    "giga-multiply-accumulates after these were rounded to two decimals. The last three columns are exact: every "
    "parameter, and two operations per multiply-accumulate. The BatchNorm rows have a 1x1 convolution as shortcut in "
    "every block, as the printed numbers require."
)

Cell = str | int | float


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text and numbers under a title, and what is to be known when reading them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str

    def _lines(self) -> list[list[str]]:
        def show(cell: Cell) -> str:
            return f"{cell:,}" if isinstance(cell, int) else str(cell)

        return [list(self.columns), *([show(cell) for cell in row] for row in self.rows)]

    def markdown(self) -> str:
        """As Markdown, title and note included."""
        head, *body = self._lines()
        rule = ["---", *["---:"] * (len(head) - 1)]
        return (
            f"{self.title}\n\n"
            + "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *body])
            + f"\n\n{self.note}\n"
        )

    def text(self) -> str:
        """For the screen: aligned columns under the title, and the note."""
        lines = self._lines()
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        return f"{self.title}\n\n" + "\n".join(map("  ".join, aligned)) + f"\n\n{self.note}\n"

    def write(self, path: pathlib.Path) -> list[pathlib.Path]:
        """To `path` with .csv (plain numbers) and .md; returns both."""
        storage.write_csv(path.with_suffix(".csv"), [self.columns, *self.rows])
        storage.write_text(path.with_suffix(".md"), self.markdown())
        return [path.with_suffix(".csv"), path.with_suffix(".md")]


def as_printed(spent: cost.Cost) -> tuple[float, float]:
    """A cost as tables 1 and 2 of the paper count it.

    Args:
        spent: By `cost.count`, for one image.

    Returns:
        Parameters in millions to two decimals, without the normalization layers' own; FLOPs in units of 1e9, twice the
        multiply-accumulates after these were rounded to two decimals.
    """
    return round((spent.parameters - spent.norm_parameters) / 1e6, 2), round(2 * round(spent.macs / 1e9, 2), 2)


def cost_table(title: str, printed: dict[tuple[int, str], tuple[float, float]]) -> Table:
    """Table 1 or 2 of the paper, counted from networks that are traced but never allocated.

    Args:
        title: Of the table.
        printed: `TABLE_1` or `TABLE_2`.
    """
    rows: list[list[Cell]] = []
    for (depth, scheme), (parameters, flops) in printed.items():
        build = functools.partial(resnet.PreActResNet, depth, *SCHEMES[scheme], num_classes=CLASSES)
        ours = cost.count(nnx.eval_shape(lambda build=build: build(rngs=nnx.Rngs(0))), INPUT)
        counted = as_printed(ours)
        compared = [parameters, counted[0], flops, counted[1], "yes" if counted == (parameters, flops) else "NO"]
        rows.append([f"ResNet-{depth} {scheme}", *compared, ours.parameters, ours.macs, ours.flops])
    return Table(title, COLUMNS, rows, NOTE)
