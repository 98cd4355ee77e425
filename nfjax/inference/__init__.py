"""Trained networks in use: `load` one, give it images, `export` it for other programs.

predictor = nfjax.load("runs/mine")
predictor("cat.jpg").top(3)
"""

from __future__ import annotations

from nfjax.inference.formats import FORMATS, check_export, export
from nfjax.inference.loading import load
from nfjax.inference.predictions import Prediction, Predictions
from nfjax.inference.predictor import Origin, Predictor
from nfjax.inference.preprocessing import Preprocessing

__all__ = [
    "FORMATS",
    "Origin",
    "Prediction",
    "Predictions",
    "Predictor",
    "Preprocessing",
    "check_export",
    "export",
    "load",
]


def __dir__() -> list[str]:
    return __all__
