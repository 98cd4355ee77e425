"""Where a signal stops being finite, from a profile: the first output on the way forward, or else the first gradient on
the way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from nfjax.spp._profile import Profile

OUTPUT, GRADIENT = "output", "gradient"


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Where a signal stops being finite.

    Attributes:
        path: Of the module whose output, or the gradient of it, is the first that is not finite.
        kind: "output" or "gradient".
        before: Of the measured modules that run before it (output) or behind it (gradient) the next one, in the order
            in which they run; None where there is none.
        std: Standard deviation of the signal there, NaN where there is none.
    """

    path: str
    kind: str
    before: str | None
    std: float

    def __str__(self) -> str:
        if self.kind == OUTPUT:
            where = "" if self.before is None else f"; before it, at {self.before}, the standard deviation"
            what = f"the output of {self.path} is the first that is not finite"
        else:
            where = "" if self.before is None else f"; behind it, at {self.before}, the standard deviation"
            what = f"the gradient of {self.path} is the first on the way back that is not finite; activations are"
        return f"{what}{where} was {self.std:.3g}" if where else what


def find_breakdown(profile: Profile) -> Breakdown | None:
    """The first module whose output is not finite, in the order in which they run; if all outputs are, the last one of
    which the gradient is not, which is the first that the gradient meets on its way back.

    The more modules are measured, the closer it comes: with one per layer, it is one operation.

    Args:
        profile: Of `spp.propagate` or a `spp.Monitor`, best with every layer and with the loss that is trained. Of
            several seeds the first that breaks down.

    Returns:
        Where, or None if all that was measured is finite.
    """
    reached = np.array([path not in profile.unreached for path in profile.paths])
    for forward, backward in zip(profile.samples["forward_var"], profile.samples["backward_var"], strict=True):
        broken = np.flatnonzero(~np.isfinite(forward))
        if broken.size:
            return _breakdown(profile, OUTPUT, forward, broken[0], range(broken[0])[::-1])
        broken = np.flatnonzero(~np.isfinite(backward) & reached)
        if broken.size:
            return _breakdown(profile, GRADIENT, backward, broken[-1], range(broken[-1] + 1, len(profile)))
    return None


def _breakdown(profile: Profile, kind: str, variances: np.ndarray, place: int, others: Iterable[int]) -> Breakdown:
    before = next((i for i in others if np.isfinite(variances[i])), None)
    std = float("nan") if before is None else float(np.sqrt(variances[before]))
    return Breakdown(profile.outputs[place], kind, None if before is None else profile.outputs[before], std)
