"""Trained networks in use: `load` one, give it images, `export` it for other programs.

predictor = nfjax.load("runs/mine")
predictor("cat.jpg").top(3)
"""

from __future__ import annotations

import importlib

# Imported when they are first used: what is scored needs modules of this package, and `load` what scores.
_MODULES = {
    "FORMATS": "formats",
    "Origin": "predictor",
    "Prediction": "predictions",
    "Predictions": "predictions",
    "Predictor": "predictor",
    "Preprocessing": "preprocessing",
    "assess": "assessing",
    "check_export": "formats",
    "export": "formats",
    "load": "loading",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    """`nfjax.inference.load` and the others are imported when they are first used."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"nfjax.inference.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'nfjax.inference' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
