"""python -m nfjax.reproduce table1 table2 [--out=results]

The paper's tables, our numbers beside each printed one; as text on the screen, as CSV and Markdown under --out.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from flax import nnx

from nfjax import cost, resnet

INPUT = (1, 32, 32, 3)  # the paper's input resolution, one image
CLASSES = 10

# (residual, norm) of the paper's rows. BatchNorm's printed numbers hold only with a convolutional shortcut in every block.
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
    "model", "params (M), paper", "params (M), ours", "FLOPs (G), paper", "FLOPs (G), ours", "agrees",
    "parameters, all", "multiply-accumulates", "FLOPs",
)  # fmt: skip
NOTE = (
    "The columns \"ours\" follow the paper's convention: batch norm's own parameters are left out, and FLOPs are twice the giga-multiply-accumulates "
    "after these were rounded to two decimals. The last three columns are exact: every parameter, and two operations per multiply-accumulate. "
    "The BatchNorm rows have a 1x1 convolution as shortcut in every block, as the printed numbers require."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells and what is to be known when reading it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return f"{self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.note}\n"

    def text(self) -> str:
        """For the screen."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in (self.columns, *self.rows)
        ]
        return f"{self.title}\n\n" + "\n".join(lines) + "\n"

    def write(self, path: pathlib.Path) -> None:
        """`path` with .csv and .md."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".csv"), "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([self.columns, *(([cell.replace(",", "") for cell in row]) for row in self.rows)])
        path.with_suffix(".md").write_text(self.markdown())


def cost_table(title: str, printed: dict[tuple[int, str], tuple[float, float]]) -> Table:
    """Table 1 or 2 of the paper, counted from networks that are traced but never allocated."""
    rows = []
    for (depth, scheme), (parameters, flops) in printed.items():
        residual, norm = SCHEMES[scheme]
        model = nnx.eval_shape(lambda d=depth, r=residual, n=norm: resnet.PreActResNet(d, r, n, num_classes=CLASSES, rngs=nnx.Rngs(0)))
        ours = cost.count(model, INPUT)
        agrees = "yes" if (ours.paper_parameters, ours.paper_flops) == (parameters, flops) else "NO"
        rows.append(
            [
                f"ResNet-{depth} {scheme}", f"{parameters:.2f}", f"{ours.paper_parameters:.2f}", f"{flops:g}", f"{ours.paper_flops:g}", agrees,
                f"{ours.parameters:,}", f"{ours.macs:,}", f"{ours.flops:,}",
            ]
        )  # fmt: skip
    return Table(title, COLUMNS, rows, NOTE)


REPRODUCTIONS: dict[str, Callable[[], Table]] = {
    "table1": lambda: cost_table("Table 1: ResNet-50 and ResNet-101, input 32x32x3, 10 classes", TABLE_1),
    "table2": lambda: cost_table("Table 2: ResNet-18, input 32x32x3, 10 classes", TABLE_2),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nfjax.reproduce", description="The paper's tables, our numbers beside each printed one.")
    parser.add_argument("names", nargs="+", choices=REPRODUCTIONS, metavar="NAME", help=f"what to reproduce: {', '.join(REPRODUCTIONS)}")
    parser.add_argument("--out", default="results", help="folder for the CSV and Markdown files (default: results)")
    arguments = parser.parse_args()
    for name in arguments.names:
        table = REPRODUCTIONS[name]()
        path = pathlib.Path(arguments.out) / name
        table.write(path)
        print(f"{table.text()}\n{path}.csv, {path}.md\n", flush=True)
    print(NOTE)


if __name__ == "__main__":
    main()
