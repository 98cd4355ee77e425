"""Signal propagation of any Flax model: does its signal survive its depth, forward and backward?

profile = spp.propagate(model, x)
print(profile.diagnose())
spp.plot(profile).savefig("plot.png")
"""

from __future__ import annotations

from nfjax.spp._diagnosis import Diagnosis, Direction
from nfjax.spp._mode import Mode
from nfjax.spp._monitor import Monitor, scalars
from nfjax.spp._plotting import Style, plot, styles
from nfjax.spp._profile import Profile
from nfjax.spp._propagation import noise, propagate, propagate_seeds
from nfjax.spp._theory import Prediction, predict

__all__ = [
    "Diagnosis", "Direction", "Mode", "Monitor", "Prediction", "Profile", "Style", "noise", "plot", "predict",
    "propagate", "propagate_seeds", "scalars", "styles",
]  # fmt: skip
