"""Residual networks without batch normalization: initializers, networks, signal propagation and its repair, cost and
training.

What is imported is read when it is first used::

    from nfjax import cost, initializers, models, rescale, resnet, spp

and `nfjax.load` is a trained network, ready to be used, see `nfjax.inference`.

After Civitelli et al., "A Robust Initialization of Residual Blocks for Effective ResNet Training without Batch
Normalization" (arXiv 2112.12299).
"""

import importlib

__version__ = "0.1.0"
__all__ = ["augment", "cost", "initializers", "layers", "models", "rescale", "residual", "resnet", "spp"]


# What needs the packages of training is left out of `from nfjax import *`, which works without them.
_FUNCTIONS = {"load": "nfjax.inference"}


def __getattr__(name: str):
    """`nfjax.resnet` and the others are imported when they are first used."""
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return importlib.import_module(f"nfjax.{name}")
    raise AttributeError(f"module 'nfjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_FUNCTIONS, "__version__"])
