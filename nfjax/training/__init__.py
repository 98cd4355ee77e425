"""Training: from a config to a trained network in a workdir.

from nfjax import config as configs
from nfjax.training import train

config = configs.cifar()
config.data.dir = "images"
train(config, "runs/mine")
"""

import importlib

__all__ = ["Run", "TrainingDivergedError", "train"]
_WHERE = {"Run": "setup", "TrainingDivergedError": "failures", "train": "loop"}


def __getattr__(name: str):
    """What is public is imported when it is first used: the commands heed signals before anything that takes long."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"nfjax.training.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'nfjax.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
