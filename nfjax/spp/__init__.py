"""Signal propagation of any Flax model: does its signal survive its depth, forward and backward?

::

    profile = spp.propagate(model, x)
    print(profile.diagnose())
    spp.plot(profile).savefig("plot.png")

`Monitor` is what measures, `propagate` one call of it, `propagate_seeds` a loop over it. `STATISTICS` is what is
measured of each block.
"""

from __future__ import annotations

from nfjax.spp._diagnosis import Diagnosis, Direction
from nfjax.spp._jacobians import Jacobians, jacobians
from nfjax.spp._mode import Mode
from nfjax.spp._monitor import Monitor, noise, propagate, propagate_seeds, scalars
from nfjax.spp._plotting import Style, plot, styles
from nfjax.spp._profile import Profile
from nfjax.spp._statistics import STATISTICS, Moments, Observed
from nfjax.spp._theory import Prediction, predict

__all__ = [
    "STATISTICS", "Diagnosis", "Direction", "Jacobians", "Mode", "Moments", "Monitor", "Observed", "Prediction",
    "Profile", "Style", "jacobians", "noise", "plot", "predict", "propagate", "propagate_seeds", "scalars", "styles",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
