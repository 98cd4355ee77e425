"""What a rescaling did, kernel by kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nfjax.spp._statistics import IDENTITY

SHOWN = 8  # of the parameters that are left, for a person
FAINT = 0.1  # of what a block's share was: by less, it says little about its branch
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
        shares: (before, after) of Var[out - in] / Var[out] at the blocks, NaN where a block's output has another shape
            than its input: what a residual branch adds to its shortcut. None where no blocks were measured.
        cautions: What the batch cannot tell.
        quantized: (path, dtype) of parameters of two and more axes that are integers, and are left.
    """

    method: str
    rows: Sequence[Row]
    signal: Mapping[str, tuple[np.ndarray, np.ndarray]]
    paths: Sequence[str]
    others: Sequence[str]
    passes: int
    seconds: float
    shares: tuple[np.ndarray, np.ndarray] | None = None
    cautions: Sequence[str] = ()
    quantized: Sequence[tuple[str, str]] = ()

    def __str__(self) -> str:
        changed = [row for row in self.rows if abs(np.log(row.factor)) > CHANGED]
        lines = [
            f"{self.method}: {len(changed)} of {len(self.rows)} kernels changed, {self.passes} passes, "
            f"{self.seconds:.1f} s"
        ]
        for direction, (before, after) in self.signal.items():
            shown = [f"{_spread(values):.3g}" for values in (before, after)]
            lines.append(f"{direction}: largest over smallest variance of all blocks {shown[0]}, now {shown[1]}")
        lines += self._fainter()
        lines += [f"mind: {caution}" for caution in self.cautions]
        width = max([len("kernel"), *(len(row.path) for row in self.rows)])
        lines.append(f"{'kernel':<{width}}  {'factor':>9}  {'variance':>9}  {'now':>9}")
        for row in self.rows:
            note = f"  {row.note}" if row.note else ""
            lines.append(f"{row.path:<{width}}  {row.factor:9.3g}  {row.before:9.3g}  {row.after:9.3g}{note}")
        if self.others:
            lines.append(f"left as they are, since by themselves they multiply no signal: {listed(self.others)}")
        if self.quantized:
            of = listed([f"{path} ({dtype})" for path, dtype in self.quantized])
            lines.append(f"left as they are, since they are quantized; rescale before that: {of}")
        return "\n".join(lines)

    def _fainter(self) -> list[str]:
        """A line on the blocks that came closer to the identity: where a shortcut adds variance at every block, that is
        the only way in which factors make the signal flat.
        """
        if self.shares is None:
            return []
        before, after = self.shares
        known = np.flatnonzero(np.isfinite(before) & (before > IDENTITY) & (before < 1))
        faint = [i for i in known if not after[i] >= FAINT * before[i]]
        if not faint:
            return []
        least = min(faint, key=lambda i: after[i] / before[i])
        return [
            f"{len(faint)} of {len(self.paths)} blocks now add less than {FAINT:.0%} of what they added to their "
            f"shortcut: of the variance at {self.paths[least]} it was {before[least]:.3g}, now {after[least]:.3g}. "
            "hold_shares=True keeps it, and leaves what the shortcut adds up"
        ]


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _spread(values: np.ndarray) -> float:
    return float(np.max(values) / np.min(values))


Reader = Callable[[Report], None]
