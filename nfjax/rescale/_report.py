"""What a rescaling did, kernel by kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

SHOWN = 8  # of the parameters that are left, for a person
CHANGED = 0.01  # relative; by less, a factor is 1 for a person


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel, or a slice of one that a loop goes through.

    Attributes:
        path: In the model.
        factor: By which it was multiplied.
        before: The variance of what it returns, before.
        after: The same, after.
        note: What could not be reached, and why; empty if there is nothing to say.
    """

    path: str
    factor: float
    before: float
    after: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rescaling did.

    Attributes:
        method: Its name.
        rows: One for each kernel, in the order in which they are first used.
        signal: {"forward": (before, after), ...}, variances at the blocks, where these were measured.
        paths: Of these blocks.
        others: Parameters of two and more axes that are no kernels of the signal: they are added to it, or mixed with
            each other before they meet it.
        passes: How often the network was run.
        seconds: In all, compilation included.
    """

    method: str
    rows: Sequence[Row]
    signal: Mapping[str, tuple[np.ndarray, np.ndarray]]
    paths: Sequence[str]
    others: Sequence[str]
    passes: int
    seconds: float

    def __str__(self) -> str:
        changed = [row for row in self.rows if abs(np.log(row.factor)) > CHANGED]
        lines = [
            f"{self.method}: {len(changed)} of {len(self.rows)} kernels changed, {self.passes} passes, "
            f"{self.seconds:.1f} s"
        ]
        for direction, (before, after) in self.signal.items():
            shown = [f"{_spread(values):.3g}" for values in (before, after)]
            lines.append(f"{direction}: largest over smallest variance of all blocks {shown[0]}, now {shown[1]}")
        width = max([len("kernel"), *(len(row.path) for row in self.rows)])
        lines.append(f"{'kernel':<{width}}  {'factor':>9}  {'variance':>9}  {'now':>9}")
        for row in self.rows:
            note = f"  {row.note}" if row.note else ""
            lines.append(f"{row.path:<{width}}  {row.factor:9.3g}  {row.before:9.3g}  {row.after:9.3g}{note}")
        if self.others:
            more = f" and {len(self.others) - SHOWN} more" if len(self.others) > SHOWN else ""
            shown = ", ".join(self.others[:SHOWN])
            lines.append(f"left as they are, since by themselves they multiply no signal: {shown}{more}")
        return "\n".join(lines)


def _spread(values: np.ndarray) -> float:
    return float(np.max(values) / np.min(values))


Reader = Callable[[Report], None]
