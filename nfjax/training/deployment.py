"""What of a run's config its network needs wherever it is used."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from nfjax.training import networks


def pixels(config: ConfigDict, identity: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """How the run's test images become what its network sees: the fields of `nfjax.inference.Preprocessing`.

    Args:
        config: Of the run.
        identity: Of its images, as in its data.json. Images that a source holds as arrays are of the right size, and
            are scored as they are, whatever `data.resize` says.
    """
    size = config.data.image_size
    arrays = "pixels" in identity.get("test", {})
    return {
        "image_size": size,
        "resize": size if arrays else config.data.resize or size,
        "mean": tuple(map(float, config.data.mean)),
        "std": tuple(map(float, config.data.std)),
        "exif_orientation": config.data.exif_orientation,
    }


def computing_in(config: ConfigDict, dtype: str | None) -> ConfigDict:
    """A config whose network computes in `dtype`; None for that of the run.

    Raises:
        ValueError: The network takes none.
    """
    if dtype is None:
        return config
    networks.architecture(config).check_dtype(dtype)
    changed = config.copy_and_resolve_references()
    changed.model.dtype = dtype
    return changed


def settings(config: ConfigDict) -> dict[str, Any]:
    """All settings of the run as JSON has them, without what tells of the machine alone: the folder of its images, and
    the folders above the network that it began with.
    """
    told = json.loads(json.dumps(config.to_dict()))
    del told["data"]["dir"]
    if told["init_from"]:
        told["init_from"] = source_name(told["init_from"])
    return told


def source_name(init_from: str) -> str:
    """What may be told elsewhere of the network that a run began with: the address on the Hugging Face Hub, or the last
    part of a path.
    """
    return init_from if init_from.startswith("hf://") else pathlib.PurePath(init_from).name or init_from
