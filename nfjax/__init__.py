"""Residual networks without batch normalization: initializers, networks, signal propagation and its repair, cost and
training.

What is imported is read when it is first used::

    from nfjax import cost, initializers, models, rescale, resnet, spp

After Civitelli et al., "A Robust Initialization of Residual Blocks for Effective ResNet Training without Batch
Normalization" (arXiv 2112.12299).
"""

import importlib

__version__ = "0.1.0"
__all__ = ["augment", "cost", "initializers", "layers", "models", "rescale", "residual", "resnet", "spp"]


def __getattr__(name: str):
    """`nfjax.resnet` and the others are imported when they are first used."""
    if name in __all__:
        return importlib.import_module(f"nfjax.{name}")
    raise AttributeError(f"module 'nfjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
