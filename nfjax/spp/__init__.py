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
from nfjax.spp._causes import Cause
from nfjax.spp._diagnosis import Diagnosis, Direction
from nfjax.spp._jacobians import Jacobians, jacobians
from nfjax.spp._kernels import Kernel
from nfjax.spp._mode import Mode
from nfjax.spp._monitor import Monitor, noise, propagate, propagate_seeds, scalars
from nfjax.spp._page import write_report
from nfjax.spp._panels import Style, styles
from nfjax.spp._plotting import plot
from nfjax.spp._profile import Profile
from nfjax.spp._statistics import STATISTICS, Moments, Observed
from nfjax.spp._sweep import sweep
from nfjax.spp._sweep_fit import SweepDiagnosis, Trend
from nfjax.spp._sweep_plot import plot_sweep
from nfjax.spp._sweep_result import Sweep
from nfjax.spp._theory import Prediction, predict
from nfjax.spp._updates import GROUPS, GradientNoise, gradient_noise, gradient_norms, update_ratios

__all__ = [
    "GROUPS", "STATISTICS", "Breakdown", "Cause", "Diagnosis", "Direction", "GradientNoise", "Jacobians", "Kernel",
    "Mode", "Moments", "Monitor", "Observed", "Prediction", "Profile", "Style", "Sweep", "SweepDiagnosis", "Trend",
    "find_breakdown", "gradient_noise", "gradient_norms", "jacobians", "noise", "plot", "plot_sweep", "predict",
    "propagate", "propagate_seeds", "scalars", "styles", "sweep", "update_ratios", "write_report",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
