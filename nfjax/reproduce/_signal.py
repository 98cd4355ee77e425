"""Figures 2 and 6 of the paper: signal propagation at initialization, forward and backward."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from nfjax import resnet, spp, storage
from nfjax.reproduce._curves import CURVES, styles
from nfjax.reproduce._tables import Table

_FIRST_OVER_LAST = "first / last block"
COLUMNS = (
    "network",
    f"forward, {_FIRST_OVER_LAST}",
    "closed form",
    f"backward, {_FIRST_OVER_LAST}",
    "closed form",
    "backward, within stages",
    "backward, across transitions",
    "forward",
    "backward",
)
NOTE = (
    "Variances at the first block divided by those at the last, median of {seeds} seeds [smallest, largest], for "
    "N(0, 1) noise of {batch}x{size}x{size}x3 and an N(0, 1) gradient at the last block. The backward ratio is the "
    "product of the two columns behind it: of what happens between the first and the last block of each stage, and of "
    "what happens between stages. Closed form: `spp.predict`. Verdicts of `diagnose()`: preserved is a variance that "
    "stays within a factor of 10. BatchNorm has identity shortcuts and batch statistics. LearnScalar equals IdShort as "
    "long as its scalars are 1."
)


@dataclasses.dataclass(frozen=True)
class PropagationFigure:
    """The curves of each depth, and their first-to-last ratios as a table."""

    title: str
    profiles: Mapping[int, Mapping[str, spp.Profile]]
    predictions: Mapping[int, Mapping[str, spp.Prediction | None]]
    note: str

    def table(self) -> Table:
        rows = []
        for depth, profiles in self.profiles.items():
            for name, profile in profiles.items():
                prediction, diagnosis = self.predictions[depth][name], profile.diagnose()
                transitions = float(np.prod(diagnosis.backward.transitions))
                rows.append([
                    f"ResNet-{depth} {name}",
                    *_first_over_last(profile.samples["forward_var"], prediction and prediction.forward_var),
                    *_first_over_last(profile.samples["backward_var"], prediction and prediction.backward_var),
                    f"{diagnosis.backward.total / transitions:.3g}",
                    f"{transitions:.3g}",
                    diagnosis.forward.verdict,
                    diagnosis.backward.verdict,
                ])  # fmt: skip
        return Table(self.title, COLUMNS, rows, self.note)

    def text(self) -> str:
        return self.table().text()

    def write(self, path: pathlib.Path) -> list[pathlib.Path]:
        """PATH.md with the ratios; for each depth PATH_resnetN.png, and .csv with every seed's values."""
        written = [path.with_suffix(".md")]
        storage.write_text(written[0], self.table().markdown())
        for depth, profiles in self.profiles.items():
            stem = path.with_name(f"{path.name}_resnet{depth}")
            figure = spp.plot(
                profiles, self.predictions[depth], title=f"{self.title}, ResNet-{depth}", style=styles(list(profiles))
            )
            storage.write_figure(stem.with_suffix(".png"), figure, dpi=120)
            rows: list[list[Any]] = []
            for name, profile in profiles.items():
                head, *values = profile.rows()
                rows += [] if rows else [["curve", *head]]
                rows += [[name, *row] for row in values]
            storage.write_csv(stem.with_suffix(".csv"), rows)
            written += [stem.with_suffix(".png"), stem.with_suffix(".csv")]
        return written


def propagation_figure(
    title: str,
    depths: Sequence[int],
    *,
    curves: Mapping[str, tuple[str, str | None, str]] = CURVES,
    seeds: int = 5,
    batch: int = 32,
    image_size: int = 32,
    width: int = 64,
) -> PropagationFigure:
    """Measures every curve at every depth; the same seeds draw the same noise for each.

    Args:
        title: Of the figure.
        depths: Of the networks.
        curves: name -> (residual, norm, init).
        seeds: How many.
        batch: Images in a batch of noise.
        image_size: Their height and width in pixels.
        width: Channels of the first stage.
    """
    shape = (batch, image_size, image_size, 3)
    profiles: dict[int, dict[str, spp.Profile]] = {depth: {} for depth in depths}
    predictions: dict[int, dict[str, spp.Prediction | None]] = {depth: {} for depth in depths}
    total, start = len(depths) * len(curves), time.perf_counter()
    for number, (depth, name) in enumerate((depth, name) for depth in depths for name in curves):
        rule, norm, init = curves[name]

        def make(seed: int, network: tuple = (depth, rule, norm, init)) -> nnx.Module:
            return resnet.PreActResNet(*network, width=width, image_size=image_size, rngs=nnx.Rngs(seed))

        began = time.perf_counter()
        profiles[depth][name] = spp.propagate_seeds(make, spp.noise(shape), seeds=seeds)
        predictions[depth][name] = spp.predict(make(0), shape)
        now = time.perf_counter()
        left = (now - start) / (number + 1) * (total - number - 1)
        line = (
            f"{title}  {number + 1:>2}/{total}  ResNet-{depth} {name:<30} {now - began:5.1f} s, about {left:.0f} s left"
        )
        print(line, file=sys.stderr, flush=True)
    return PropagationFigure(title, profiles, predictions, NOTE.format(seeds=seeds, batch=batch, size=image_size))


def _first_over_last(samples: np.ndarray, predicted: np.ndarray | None) -> tuple[str, str]:
    ratios = samples[:, 0] / samples[:, -1]
    return (
        f"{np.median(ratios):.3g} [{ratios.min():.3g}, {ratios.max():.3g}]",
        "none" if predicted is None else f"{predicted[0] / predicted[-1]:.3g}",
    )
