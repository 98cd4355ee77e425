"""Signal propagation of any Flax model: does its signal survive its depth, forward and backward?

::

    profile = spp.propagate(model, x)
    print(profile.diagnose())
    spp.plot(profile).savefig("plot.png")

`Monitor` is what measures, `propagate` one call of it, `propagate_seeds` a loop over it. `STATISTICS` is what is
measured of each block.
"""

from __future__ import annotations

from nfjax.spp._breakdown import Breakdown, find_breakdown
from nfjax.spp._diagnosis import Diagnosis, Direction
from nfjax.spp._mode import Mode
from nfjax.spp._monitor import Monitor, noise, propagate, propagate_seeds, scalars
from nfjax.spp._plotting import Style, plot, styles
from nfjax.spp._profile import Profile
from nfjax.spp._statistics import STATISTICS, Moments, Observed
from nfjax.spp._theory import Prediction, predict
from nfjax.spp._updates import GROUPS, GradientNoise, gradient_noise, gradient_norms, update_ratios

__all__ = [
    "GROUPS", "STATISTICS", "Breakdown", "Diagnosis", "Direction", "GradientNoise", "Mode", "Moments", "Monitor",
    "Observed", "Prediction", "Profile", "Style", "find_breakdown", "gradient_noise", "gradient_norms", "noise", "plot",
    "predict", "propagate", "propagate_seeds", "scalars", "styles", "update_ratios",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
