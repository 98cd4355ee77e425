"""Signal propagation of any Flax model: does its signal survive its depth, forward and backward?

profile = spp.propagate(model, x)
print(profile.diagnose())
spp.plot(profile).savefig("plot.png")
"""

from __future__ import annotations

from nfjax.spp.diagnosis import Diagnosis, Direction
from nfjax.spp.mode import Mode
from nfjax.spp.monitor import Monitor, scalars
from nfjax.spp.plotting import Style, plot
from nfjax.spp.profile import Profile
from nfjax.spp.propagation import noise, propagate, propagate_seeds
from nfjax.spp.theory import Prediction, predict

__all__ = [
    "Diagnosis", "Direction", "Mode", "Monitor", "Prediction", "Profile", "Style", "noise", "plot", "predict",
    "propagate", "propagate_seeds", "scalars",
]  # fmt: skip
