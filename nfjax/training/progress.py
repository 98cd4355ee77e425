"""Where a run stands: its step, and what was summed since the last report."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import numpy as np

from nfjax import data
from nfjax.training import losses

SUMMED = ("loss", "correct", "count", "grad_norm")  # what a training step returns


class Progress:
    """The position of a run, a step number, and what was summed since the last log step ("interval") and since the
    epoch began ("epoch").

    `sums` is saved with every checkpoint, in float64, so that a run that goes on reports the same numbers as one never
    stopped.
    """

    def __init__(self, size: int, batch_size: int, epochs: int, log_every: int):
        self.size, self.batch_size, self.log_every = size, batch_size, log_every
        self.epoch_ends = [data.epoch_end(epoch, size, batch_size) for epoch in range(1, epochs + 1)]
        self.step = 0
        self.sums = {"interval": _zeros(), "epoch": _zeros()}

    @property
    def total(self) -> int:
        """Steps in the whole run."""
        return self.epoch_ends[-1]

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step * self.batch_size / self.size

    def next_stop(self, step: int | None = None) -> int:
        """The next step behind `step`, by default the current one, at which something is reported: a multiple of
        `log_every`, or the end of an epoch.
        """
        step = self.step if step is None else step
        epoch_end = self.epoch_ends[bisect.bisect_right(self.epoch_ends, step)]
        return min(epoch_end, (step // self.log_every + 1) * self.log_every)

    def epochs_ended(self) -> int | None:
        """The number of the epoch that ends with this step, counted from 1; None within an epoch."""
        number = bisect.bisect_right(self.epoch_ends, self.step)
        return number if number and self.epoch_ends[number - 1] == self.step else None

    def add(self, sums: Mapping[str, np.ndarray]) -> None:
        """Adds the sums of steps that were taken, one array [n] per name."""
        for part in self.sums.values():
            for name in SUMMED:
                part[name] = part[name] + np.sum(sums[name], dtype=np.float64)
            part["steps"] = part["steps"] + len(sums["count"])

    def take(self, part: str) -> dict[str, float]:
        """Mean loss, accuracy and gradient norm of "interval" or "epoch", which starts anew."""
        sums, self.sums[part] = self.sums[part], _zeros()
        return losses.means(sums) | {"grad_norm": float(sums["grad_norm"] / sums["steps"])}


def _zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros((), np.float64) for name in (*SUMMED, "steps")}
