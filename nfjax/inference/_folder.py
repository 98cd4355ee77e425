"""A folder that holds a network: what its files are called, and what its settings say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Annotated, Any

import jax
import msgspec
import numpy as np
from flax import nnx

import nfjax
from nfjax import storage
from nfjax.inference import _safetensors
from nfjax.inference.predictor import Origin, Predictor
from nfjax.inference.preprocessing import LARGEST, Preprocessing
from nfjax.runs import files
from nfjax.training import networks

SETTINGS = files.CONFIG  # of the same name as a run's; the version tells them apart
WEIGHTS = "model.safetensors"
VERSION = files.EXPORT
NEWEST = 1
MOST_CLASSES = 2**20
_WAY_OUT = "export the network again, or copy the folder again"
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Colours = tuple[_Share, _Share, _Share]
_Pixels = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Network(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any]
    dtype: str


class _Preprocessing(msgspec.Struct, forbid_unknown_fields=True):
    image_size: _Pixels
    resize: _Pixels
    mean: _Colours
    std: _Colours
    exif_orientation: bool


class _Origin(msgspec.Struct):
    step: _Count
    ema: bool
    accuracy: _Share | None
    test_images: _Count
    training_images: _Count
    settings: dict[str, Any]


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """What the settings of an export hold.

    Attributes:
        nfjax_format: Version of the format.
        nfjax: Version of the library that wrote it.
        network: What it is built from.
        preprocessing: Of its images.
        class_names: Of its outputs.
        weights_sha256: Of the file of weights, where there is one.
        origin: Where it comes from; only told.
    """

    nfjax_format: int
    nfjax: str
    network: _Network
    preprocessing: _Preprocessing
    class_names: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MOST_CLASSES)]
    weights_sha256: str | None = None
    origin: _Origin | None = None


def is_export(folder: pathlib.Path) -> bool:
    """Whether the settings in a folder are those of an export. Raises DamagedFileError where they are no JSON."""
    return VERSION in storage.read_json(folder / SETTINGS, dict[str, Any], _WAY_OUT)


def read(folder: pathlib.Path) -> Settings:
    """The settings of an export.

    Raises:
        storage.DamagedFileError: They are damaged, or of a later version than this one can read.
    """
    path = folder / SETTINGS
    version = storage.read_json(path, dict[str, Any], _WAY_OUT).get(VERSION)
    if type(version) is not int or version < 1:
        raise storage.DamagedFileError(f"{path} has {VERSION}={version!r}: expected a whole number from 1; {_WAY_OUT}")
    if version > NEWEST:
        raise storage.DamagedFileError(
            f"{path} is of format {version}, and this version of nfjax reads formats up to {NEWEST}: install a "
            "later one"
        )
    return storage.read_json(path, Settings, _WAY_OUT)


def write(folder: pathlib.Path, predictor: Predictor) -> None:
    """Writes the settings of an export, beside its weights if there are any.

    Raises:
        ValueError: They cannot be written, or could not be read again.
    """
    weights = folder / WEIGHTS
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None
    told = {
        VERSION: NEWEST,
        "nfjax": nfjax.__version__,
        "network": _plain(predictor.architecture),
        "preprocessing": dataclasses.asdict(predictor.preprocessing),
        "class_names": predictor.class_names,
        "weights_sha256": digest,
        "origin": None if predictor.origin is None else dataclasses.asdict(predictor.origin),
    }
    storage.write_json(folder / SETTINGS, told)
    read(folder)


def architecture(settings: Settings) -> networks.Architecture:
    """What the network is built from."""
    made = settings.network
    return networks.Architecture(
        made.name, {name: _tuples(value) for name, value in made.arguments.items()}, made.dtype
    )


def _plain(made: networks.Architecture) -> dict[str, Any]:
    """The architecture as JSON has it.

    Raises:
        ValueError: One of its arguments cannot be written as JSON.
    """
    for name, value in made.arguments.items():
        try:
            same = _tuples(json.loads(json.dumps(value))) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                f"the network's argument {name}={value!r} cannot be stored: expected a number, a text, true, false, "
                "none, or tuples of these"
            )
    return dataclasses.asdict(made)


def preprocessing(settings: Settings, path: pathlib.Path) -> Preprocessing:
    """From an image to what the network sees. Raises DamagedFileError where the numbers contradict each other."""
    try:
        return Preprocessing(**msgspec.structs.asdict(settings.preprocessing))
    except ValueError as error:
        raise storage.DamagedFileError(f"{path} does not hold what it should: {error}; {_WAY_OUT}") from error


def origin(settings: Settings) -> Origin | None:
    """Where the network comes from, where that is told."""
    return None if settings.origin is None else Origin(**msgspec.structs.asdict(settings.origin))


def _tuples(value: Any) -> Any:
    """JSON has lists for what the arguments of a network have tuples for."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------- weights


def arrays_by_name(params: Any, batch_stats: Any) -> dict[str, Any]:
    """{"params/classifier/kernel": array, "batch_stats/...": array} of a network's state, first those of `params`."""
    found = {}
    for kind, tree in (("params", params), ("batch_stats", batch_stats)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{kind}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = leaf
    return found


def write_weights(folder: pathlib.Path, params: Any, batch_stats: Any) -> None:
    """Writes a network's state.

    Raises:
        ValueError: Two arrays have one name, or one has a type that the file cannot have.
    """
    named = arrays_by_name(params, batch_stats)
    count = len(jax.tree.leaves((params, batch_stats)))
    if len(named) != count:
        raise ValueError(f"the network has {count} arrays of {len(named)} names: expected a name for each of them")
    storage.write_bytes(folder / WEIGHTS, _safetensors.encode(named))


def check_finite(predictor: Predictor) -> None:
    """ValueError where a predictor's state has a number that is not finite."""
    if name := not_finite(arrays_by_name(predictor.params, predictor.batch_stats)):
        raise ValueError(
            f"{name} holds numbers that are not finite (NaN or infinity): the network's weights are damaged, as those "
            "of a training that diverged; export an earlier checkpoint (--step=N)"
        )


def not_finite(arrays: dict[str, Any]) -> str | None:
    """The name of the first array that holds NaN or infinity. ReLU and pooling can hide these, and every image then
    gets the same prediction.
    """
    floats = (name for name, array in arrays.items() if jax.numpy.issubdtype(array.dtype, jax.numpy.inexact))
    return next((name for name in floats if not np.isfinite(np.asarray(arrays[name])).all()), None)


def sizes(folder: pathlib.Path) -> list[int]:
    """How many numbers each array of an export has, which is read from the header; errors as of `read_weights`."""
    _check_there(folder)
    return [math.prod(place.shape) for place in _safetensors.read_places(folder / WEIGHTS).values()]


def load_weights(folder: pathlib.Path, model: nnx.Module, settings: Settings) -> None:
    """Sets the parameters and the rest of the state of a network that has shapes in place of them.

    Raises:
        storage.DamagedFileError: The file is damaged, or of another network.
        FileNotFoundError: There is none.
    """
    _check_there(folder)
    path = folder / WEIGHTS
    parts = [nnx.state(model, nnx.Param), nnx.state(model, networks.STATE)]
    expected = arrays_by_name(*map(nnx.to_pure_dict, parts))
    places = _safetensors.read_places(path)
    described = {name: (np.dtype(array.dtype), array.shape) for name, array in expected.items()}
    _check_same(path, settings, described, {name: (place.dtype, place.shape) for name, place in places.items()})
    found = _decode(folder, settings, places)
    names = iter(expected)
    for part in parts:
        leaves, structure = jax.tree.flatten(part)
        nnx.update(model, jax.tree.unflatten(structure, [jax.numpy.asarray(found[next(names)]) for _ in leaves]))


def read_weights(folder: pathlib.Path, settings: Settings) -> dict[str, np.ndarray]:
    """The arrays of an export by name, as of `arrays_by_name`, whatever its network.

    Raises:
        storage.DamagedFileError: The file is damaged.
        FileNotFoundError: There is none.
    """
    _check_there(folder)
    return _decode(folder, settings, _safetensors.read_places(folder / WEIGHTS))


def _check_there(folder: pathlib.Path) -> None:
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}: it was exported without --format=safetensors, and can be used by the program "
            "that it holds, see its README.md"
        )


def _decode(folder: pathlib.Path, settings: Settings, places: dict[str, _safetensors.Place]) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS
    data = path.read_bytes()
    if settings.weights_sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise storage.DamagedFileError(
            f"{path} is not the file that {folder / SETTINGS} tells of. If it was changed on purpose, remove "
            f"weights_sha256 there; else {_WAY_OUT}"
        )
    arrays = _safetensors.decode(data, places)
    if name := not_finite(arrays):
        raise storage.DamagedFileError(
            f"{path}: its weights are damaged: {name!r} holds numbers that are not finite (NaN or infinity); {_WAY_OUT}"
        )
    return arrays


def _check_same(path: pathlib.Path, settings: Settings, expected: dict[str, Any], found: dict[str, Any]) -> None:
    if expected == found:
        return
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    differing = [name for name in expected if name in found and expected[name] != found[name]]
    if differing:
        name = differing[0]
        (dtype, shape), (dtype_there, shape_there) = expected[name], found[name]
        what = f"{name} is {dtype_there}{list(shape_there)} there, and {dtype}{list(shape)} in the network described"
    else:
        what = f"it has {more[0]!r}, which the network lacks" if more else f"it lacks {missing[0]!r}"
    raise storage.DamagedFileError(
        f"{path} is of another network than {path.parent / SETTINGS} describes, {settings.network.name} with "
        f"{len(settings.class_names)} class names: {what[:300]}; were files of several exports mixed?"
    )
