"""The JSON files of a workdir: what each of them holds. They are checked where they are read, and written in full or
not at all.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from ml_collections import ConfigDict

from nfjax import config as configs
from nfjax import storage

CONFIG = "config.json"
DATA = "data.json"
VERSIONS = "versions.json"
EXPORT = "nfjax_format"  # what tells the config.json of an export from that of a run


# Fields that had another name: (section, name then) -> (name now, {value then: value now}).
RENAMED = {("optim", "anneal"): ("schedule", {"epoch": "cosine_by_epoch", "step": "cosine"})}


class _Sections(msgspec.Struct):
    """What makes a config.json one of ours."""

    model: dict[str, Any]
    data: dict[str, Any]
    augment: dict[str, Any]
    optim: dict[str, Any]
    log: dict[str, Any]
    checkpoint: dict[str, Any]


class Start(msgspec.Struct):
    """What an entry of versions.json has at least. config, data: `_digest` of what it was started with."""

    started: str
    step: Annotated[int, msgspec.Meta(ge=0)]
    packages: dict[str, str]
    config: str | None = None
    data: str | None = None


@dataclasses.dataclass(frozen=True)
class Described:
    """What data.json tells of the images. identity: see `nfjax.data.identity`; of older runs empty."""

    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    train_images: Annotated[int, msgspec.Meta(ge=1)]
    test_images: Annotated[int, msgspec.Meta(ge=1)]
    identity: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    skipped_files: dict[str, str] = dataclasses.field(default_factory=dict)
    left_aside: dict[str, int] = dataclasses.field(default_factory=dict)


def read_config(folder: pathlib.Path) -> ConfigDict:
    """The resolved config of the run in `folder`, locked; what was no field yet when it was written has its default.

    Raises FileNotFoundError if there is none, storage.DamagedFileError if it is damaged, ValueError if the folder is an
    export.
    """
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path}; expected the --workdir of a training run")
    config, settings = configs.base(), read_settings(folder)
    try:
        config.update(settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # whatever ConfigDict stumbles over
        what = str(error).strip("'").partition(" Other fields present")[0][:200]
        raise storage.DamagedFileError(f"{path} holds what this version of nfjax has no setting for: {what}") from error
    return config


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """config.json, with the names that fields have today. Raises storage.DamagedFileError, FileNotFoundError, and
    ValueError where it is that of an export, which is not damaged.
    """
    way_out = "the training command of this run, started again, mends it"
    settings = storage.read_json(folder / CONFIG, dict[str, Any], way_out)
    if EXPORT in settings:
        raise ValueError(
            f"{folder} is an export, and not the workdir of a run: nfjax evaluate takes it with --model={folder} "
            f"--images=DIR, and a training in a workdir of its own begins with it by --config.init_from={folder}"
        )
    storage.read_json(folder / CONFIG, _Sections, way_out)
    for (section, before), (now, values) in RENAMED.items():
        if before in settings[section]:
            value = settings[section].pop(before)
            settings[section][now] = values.get(value, value) if isinstance(value, str) else value
    return settings


def read_data(folder: pathlib.Path) -> Described:
    """What the run in `folder` was trained on. Raises storage.DamagedFileError, FileNotFoundError."""
    return storage.read_json(folder / DATA, Described, "the training command of this run, started again, mends it")


def read_starts(folder: pathlib.Path) -> list[Start]:
    expected = Annotated[list[Start], msgspec.Meta(min_length=1)]
    return storage.read_json(folder / VERSIONS, expected, "it only tells by what the run was started")


def keep(path: pathlib.Path, read: Callable[[pathlib.Path], Any], value: Any) -> None:
    """Writes a file unless it is there already; a damaged one is set aside."""
    try:
        read(path.parent)
    except FileNotFoundError:
        pass
    except storage.DamagedFileError as error:
        storage.set_aside(path, error)
    else:
        if json.loads(path.read_bytes()) == value:
            return
    storage.write_json(path, value)
