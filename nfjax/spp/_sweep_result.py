"""Sizes after each step for every value that was swept, with their exponents and verdicts."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nfjax import storage
from nfjax.spp import _json
from nfjax.spp._mode import Mode
from nfjax.spp._sweep_fit import QUANTITIES, TOLERANCE, Fit, SweepDiagnosis, Trend, fit, judge

RELATIVE = {"first": 0.0, "1/4": 0.25, "middle": 0.5, "3/4": 0.75, "last": 1.0}


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Sweep:
    """Sizes after each optimizer step, for networks of several widths, depths or the like.

    The quantities, all float64:

    - activation: The root mean square of what each block returns.
    - activation_change: That of its difference to what it returned at the start; 0 at step 0.
    - output: The root mean square of the model's output.
    - output_change: That of its difference to the output at the start.
    - kernel_change: Of each trained kernel [..., C], as a matrix of C columns, the spectral norm of its change since
      the start over that of the kernel then, which in muP does not depend on the width; NaN for a kernel that begins as
      zeros. One that a loop goes through is one matrix.

    Attributes:
        name: Of what was swept: "width".
        values: Of it, ascending, [values].
        seeds: Of the runs.
        steps: How many the optimizer took; step 0 is before the first.
        setting: Optimizer, learning rate and loss, in words.
        paths: Of the blocks and kernels, by quantity, for each value.
        samples: By quantity, for each value float64 [seeds, steps + 1, blocks].
        losses: float64 [values, seeds, steps + 1].
        mode: In which mode the networks ran.
    """

    name: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    setting: str
    paths: Mapping[str, tuple[tuple[str, ...], ...]]
    samples: Mapping[str, tuple[np.ndarray, ...]]
    losses: np.ndarray
    mode: Mode = dataclasses.field(default_factory=Mode)

    @functools.cached_property
    def places(self) -> dict[str, tuple[str, ...]]:
        """By quantity, what is compared between the values: blocks by their paths where every network has as many, and
        elsewhere the relative places of `RELATIVE`, from the first block to the last.
        """
        return {
            quantity: paths[0] if len({len(one) for one in paths}) == 1 else tuple(RELATIVE)
            for quantity, paths in self.paths.items()
        }

    @functools.cached_property
    def sizes(self) -> dict[str, np.ndarray]:
        """By quantity, float64 [values, seeds, steps + 1, places]; between two blocks, log sizes are interpolated."""
        found = {}
        for quantity, samples in self.samples.items():
            alike = len({sample.shape[-1] for sample in samples}) == 1
            found[quantity] = np.stack([sample if alike else _at_relative_places(sample) for sample in samples])
        return found

    @functools.cached_property
    def fits(self) -> dict[str, list[list[Fit]]]:
        """By quantity, a `Fit` for each step and place."""
        return {
            quantity: [
                [fit(self.values, sizes[:, :, step, place]) for place in range(sizes.shape[-1])]
                for step in range(self.steps + 1)
            ]
            for quantity, sizes in self.sizes.items()
        }

    @property
    def exponents(self) -> dict[str, np.ndarray]:
        """By quantity, p of size ~ value^p, float64 [steps + 1, places]; NaN where a size is 0 or not finite."""
        return self._fitted("exponent")

    @property
    def errors(self) -> dict[str, np.ndarray]:
        """The standard errors of `exponents`."""
        return self._fitted("error")

    def _fitted(self, field: str) -> dict[str, np.ndarray]:
        return {
            quantity: np.array([[getattr(one, field) for one in row] for row in rows]).reshape(self.steps + 1, -1)
            for quantity, rows in self.fits.items()
        }

    def trend(self, quantity: str, step: int, tolerance: float = TOLERANCE) -> Trend:
        """How a quantity depends on the value after a step: at the place where it does so most.

        Args:
            quantity: A name in `QUANTITIES`.
            step: From 0 to `steps`.
            tolerance: An exponent up to this counts as none.
        """
        sizes, fits, places = self.sizes[quantity][:, :, step], self.fits[quantity][step], self.places[quantity]
        common = {"quantity": quantity, "step": step, "name": self.name}
        broken = ~np.isfinite(sizes)
        if quantity == "kernel_change":  # of a kernel that begins as zeros it is not known, at any step
            broken &= ~np.isnan(self.sizes[quantity][:, :, 0])
        if broken.any():
            value = int(np.flatnonzero(broken.any(axis=(1, 2)))[0])
            place = int(np.flatnonzero(broken[value].any(axis=0))[0])
            return Trend(**common, verdict="non-finite", place=places[place], value=self.values[value])
        chosen, verdict = judge(fits, tolerance)
        if chosen is None:
            zero = (sizes == 0).any(axis=(1, 2))
            mixed = (sizes > 0).any()
            value = self.values[int(np.flatnonzero(zero)[0])] if mixed and zero.any() else None
            return Trend(**common, verdict="unclear" if mixed else verdict, value=value)
        return Trend(**common, verdict=verdict, place=places[chosen], **dataclasses.asdict(fits[chosen]))

    def diagnose(self, tolerance: float = TOLERANCE) -> SweepDiagnosis:
        """Whether activations, output and their changes are independent of the value.

        Args:
            tolerance: An exponent up to this counts as none; 0.1 is our choice.

        Raises:
            ValueError: The tolerance is not positive.
        """
        if not tolerance > 0:
            raise ValueError(f"tolerance={tolerance} must be more than 0: it is an exponent")
        trends = []
        for quantity, about in QUANTITIES.items():
            if quantity not in self.samples or not self.places[quantity]:
                continue
            steps = ([0] if about.from_start else []) + ([self.steps] if self.steps else [])
            for step in steps:
                trends.append(self.trend(quantity, step, tolerance))
                while trends[-1].verdict == "non-finite" and step > 1:  # what it was like as long as it was
                    step -= 1
                    if (earlier := self.trend(quantity, step, tolerance)).verdict != "non-finite":
                        trends.append(earlier)
        notes = [self.mode.caveat()]
        if len(self.values) == 2 and len(self.seeds) == 1:
            notes.append("two values and one seed give an exponent without an error: take more of either")
        return SweepDiagnosis(tuple(trends), str(self.mode), tuple(filter(None, notes)))

    def rows(self) -> Iterator[list[Any]]:
        """A table of the samples: its head, then one row per value, seed, step, quantity and block, to seven digits."""
        yield [self.name, "seed", "step", "quantity", "index", "path", "size"]
        for v, value in enumerate(self.values):
            for s, seed in enumerate(self.seeds):
                for step in range(self.steps + 1):
                    yield [f"{value:g}", seed, step, "loss", 0, "", f"{self.losses[v, s, step]:.7g}"]
                    for quantity, samples in self.samples.items():
                        for i, path in enumerate(self.paths[quantity][v]):
                            yield [f"{value:g}", seed, step, quantity, i, path, f"{samples[v][s, step, i]:.7g}"]

    def to_csv(self, path: str | pathlib.Path) -> None:
        """Writes `rows` as CSV, the whole file or nothing.

        Args:
            path: Of the file.

        Raises:
            OSError: It cannot be written.
        """
        storage.write_csv(pathlib.Path(path), self.rows())

    def to_json(self, path: str | pathlib.Path | None = None) -> str:
        """As JSON, where what is not finite stands as null, "inf" or "-inf".

        Args:
            path: A file that is written, too.

        Returns:
            The text.
        """

        content = {
            "name": self.name,
            "values": self.values,
            "seeds": self.seeds,
            "steps": self.steps,
            "setting": self.setting,
            "mode": str(self.mode),
            "losses": self.losses,
            "paths": self.paths,
            "samples": self.samples,
            "places": self.places,
            "exponents": self.exponents,
            "errors": self.errors,
            "diagnosis": str(self.diagnose()),
        }
        return _json.write(content, path)

    def __repr__(self) -> str:
        many = f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        swept = f"{self.name} {', '.join(f'{value:g}' for value in self.values)}"
        lines = [["", *(f"step {step}" for step in range(self.steps + 1))]]
        for quantity, about in QUANTITIES.items():
            if self.places[quantity] and (self.steps or about.from_start):
                steps = range(0 if about.from_start else 1, self.steps + 1)
                trends = [self.trend(quantity, step) for step in steps]
                cells = [t.verdict if t.verdict in ("zero", "non-finite") else t.law for t in trends]
                lines.append([quantity, *["-"] * (self.steps + 1 - len(cells)), *cells])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        head = (
            f"Sweep over {swept}{many}: {self.setting}",
            f"by what law each size follows the {self.name}, where it does so most:",
        )
        return "\n".join([*head, *(line.rstrip() for line in table)])


def _at_relative_places(sample: np.ndarray) -> np.ndarray:
    """[..., blocks] at the relative places, [..., places]: in between, geometric means by distance."""
    number = sample.shape[-1]
    found = []
    for place in RELATIVE.values():
        exact = place * (number - 1)
        low, share = int(exact), exact - int(exact)
        high = min(low + 1, number - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.exp((1 - share) * np.log(sample[..., low]) + share * np.log(sample[..., high]))
        found.append(between if share else sample[..., low])
    return np.stack(found, axis=-1)
