"""What a size goes like against width, depth or another number: a fitted exponent, and the verdict on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

TOLERANCE = 0.1  # an exponent up to this counts as none
_MISFIT = 0.1  # of the logarithm of a size: a power of the value that is off by less is left standing


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is measured, in words.

    Attributes:
        subject: Of a sentence.
        plural: Whether its verb is.
        from_start: Whether there is one before the first step.
    """

    subject: str
    plural: bool
    from_start: bool


# name -> what it is. The order is that of tables and pictures.
QUANTITIES = {
    "activation": Quantity("activations", True, True),
    "activation_change": Quantity("changes of the activations", True, False),
    "output": Quantity("the output", False, True),
    "output_change": Quantity("the change of the output", False, False),
    "kernel_change": Quantity("relative changes of the kernels", True, False),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """Least squares of log size against log value, over values and seeds.

    Attributes:
        exponent: p of size ~ value^p; NaN where a size is 0, not finite or not known.
        error: Its standard error; NaN for two points.
        factor: Of the size for each one more of the value, where an exponential of the value fits much better than any
            power; NaN where not.
    """

    exponent: float
    error: float
    factor: float = math.nan


def fit(values: Sequence[float], sizes: np.ndarray) -> Fit:
    """Fits a power of the value.

    Args:
        values: Two or more different positive numbers, [values].
        sizes: float64 [values, seeds].
    """
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        return Fit(math.nan, math.nan)
    x, logs = np.log(np.asarray(values, np.float64)), np.log(sizes)
    number, seeds = logs.shape
    exponent, misfit = _line(x, logs.mean(axis=1))
    spread = np.square(x - x.mean()).sum()
    errors = []
    if number > 2:  # of the means: what no power explains is no smaller for more seeds
        errors.append(math.sqrt(misfit / (number - 2) / spread))
    if number * seeds > 2 and seeds > 1:
        residual = logs - logs.mean() - exponent * (x - x.mean())[:, None]
        errors.append(math.sqrt(np.square(residual).sum() / (number * seeds - 2) / spread / seeds))
    slope, other = _line(np.asarray(values, np.float64), logs.mean(axis=1))
    # So much better that noise is no explanation: it has to account for all but 1 % of what the sizes differ by.
    all_of_it = np.square(logs.mean(axis=1) - logs.mean()).sum()
    exponential = math.sqrt(misfit / number) > _MISFIT and other < min(misfit / 9, all_of_it / 100)
    return Fit(exponent, max(errors, default=math.nan), math.exp(slope) if number > 2 and exponential else math.nan)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, sum of the squared residuals) of the line through the points."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / np.square(x).sum())
    return slope, float(np.square(y - slope * x).sum())


def judge(fits: Sequence[Fit], tolerance: float) -> tuple[int | None, str]:
    """The place whose size depends most on the value, None where all are 0, and the verdict of a `Trend`.

    Args:
        fits: Of each place.
        tolerance: An exponent up to this counts as none.
    """
    known = [i for i, one in enumerate(fits) if not math.isnan(one.exponent)]
    if not known:
        return None, "zero"

    def error(i: int) -> float:
        return 0.0 if math.isnan(fits[i].error) else fits[i].error

    def certain(i: int) -> bool:
        return abs(fits[i].exponent) - 2 * error(i) > tolerance

    worst = max(known, key=lambda i: (certain(i), abs(fits[i].exponent)))
    if certain(worst):
        return worst, "grows" if fits[worst].exponent > 0 else "shrinks"
    return worst, "independent" if max(abs(fits[worst].exponent), error(worst)) <= tolerance else "unclear"


@dataclasses.dataclass(frozen=True)
class Trend:
    """How one quantity depends on the value: at the place where it does so most.

    Attributes:
        quantity: A name in `QUANTITIES`.
        step: After how many optimizer steps.
        name: Of what was swept: "width".
        verdict: "independent", "grows", "shrinks", "unclear" (the error is too large to tell), "zero" or "non-finite".
        place: The block, kernel or relative place; "" for the output.
        exponent: Of the fit there, likewise error and factor; NaN where there is none.
        error: Its standard error.
        factor: For each one more of the value, where the size is an exponential and no power; NaN elsewhere.
        value: The smallest value at which it is not finite, or at which it is 0 while it is not elsewhere; None for
            all other verdicts.
    """

    quantity: str
    step: int
    name: str
    verdict: str
    place: str = ""
    exponent: float = math.nan
    error: float = math.nan
    factor: float = math.nan
    value: float | None = None

    @property
    def law(self) -> str:
        """ "width^0.50 ± 0.02", or "1.41^depth"."""
        if not math.isnan(self.factor):
            return f"{self.factor:.{2 if abs(self.factor - 1) > 0.1 else 4}f}^{self.name}"
        exponent = f"{self.exponent:.2f}".replace("-0.00", "0.00")
        return f"{self.name}^{exponent}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")

    def __str__(self) -> str:
        about = QUANTITIES[self.quantity]
        when = "at the start" if not self.step else f"after {self.step} step{'s' if self.step > 1 else ''}"
        subject, be = f"{about.subject} {when}", "are" if about.plural else "is"
        where = f" (in {self.place!r})" if self.place else ""
        if self.verdict == "zero":
            return f"{subject}: 0 at every {self.name}"
        if self.verdict == "non-finite":
            return f"{subject}: not finite at {self.name} {self.value:g}{where}"
        if math.isnan(self.exponent):
            return f"{subject}: 0 at {self.name} {self.value:g}, and not everywhere, so that no power fits"
        if self.verdict == "independent":
            return f"{subject} {be} independent of {self.name}: at most like {self.law}{where}"
        if self.verdict == "unclear":
            return f"{subject}: like {self.law}{where}, not clear; measure more seeds, or a wider range"
        verb = "grow" if self.exponent > 0 else "shrink"
        verb += "" if about.plural else "s"
        how = "exponentially, like" if not math.isnan(self.factor) else "like"
        return f"{subject} {verb} {how} {self.law}{where}: not {self.name}-independent"


@dataclasses.dataclass(frozen=True)
class SweepDiagnosis:
    """The verdicts of a sweep; `str` of it is what a person reads.

    Attributes:
        trends: Of each quantity, at the start and after the last step.
        mode: In which mode the networks ran, in words; empty where they have but one.
        notes: What the verdicts rest on.
    """

    trends: tuple[Trend, ...]
    mode: str = ""
    notes: tuple[str, ...] = ()

    @property
    def independent(self) -> bool:
        """Whether nothing depends on the value."""
        return all(trend.verdict in ("independent", "zero") for trend in self.trends)

    def __str__(self) -> str:
        ran = [f"measured with {self.mode}"] if self.mode else []
        return "\n".join([*map(str, self.trends), *ran, *(f"note: {note}" for note in self.notes)])
