"""What a run begins with where `init_from` names a source: the weights of a finished run, how their images were
prepared, and a record of both, so that a run that goes on needs its source no more.

A kind of source is one function `(path) -> Source | None` and its place in `KINDS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import msgspec
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from nfjax import config as configs
from nfjax import distributed, storage
from nfjax.runs import checkpoint, files, mirror
from nfjax.runs.progress import say
from nfjax.training import networks, patterns, rescaling

RECORD = "init_from.json"
# The fields of config.data that say what a network's images look like.
PREPROCESSING = ("mean", "std", "image_size", "resize", "exif_orientation")
# Of config.model, what a network is built from.
NETWORK = ("name", "arguments", *networks.FIELDS)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of a source, by the paths that parameters.txt has: "stem/conv/kernel".

    Attributes:
        params: Its parameters.
        batch_stats: What else its network keeps between steps.
    """

    params: dict[str, np.ndarray]
    batch_stats: dict[str, np.ndarray]

    def digest(self) -> str:
        """16 hexadecimal digits that change when an array or its name does."""
        digest = hashlib.sha256()
        for part in (self.params, self.batch_stats):
            for name, leaf in sorted(part.items()):
                digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode() + np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Source:
    """A network that was trained.

    Attributes:
        path: As `init_from` has it.
        step: Of training, after which its weights are.
        network: In a line.
        settings: The fields of config.model that it was built from, as far as they are known.
        class_names: Of its logits.
        preprocessing: The `PREPROCESSING` fields of config.data.
        read: Gives its weights; a function, because the rest is known without them.
    """

    path: str
    step: int
    network: str
    settings: dict[str, Any]
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    read: Callable[[], Weights]


def of_workdir(path: str) -> Source | None:
    """The best checkpoint of the run in a workdir, local or in a bucket; None where there is no run.

    Its weights are those that were trained, also where the run keeps an average of them.

    Raises:
        ValueError: It was stopped before its first checkpoint, or holds what cannot be read.
    """
    folder = mirror.pull(path, f"init_from {jax.process_index()}")
    if not (folder / files.CONFIG).exists():
        return None
    config, described = files.read_config(folder), files.read_data(folder)
    if not _checkpoints(folder):
        raise ValueError(f"init_from={path}: that run was stopped before its first checkpoint; start it again first")
    with _opened(folder) as checkpoints:
        step = checkpoints.best_step()

    def read() -> Weights:
        with _opened(folder) as checkpoints:
            state = checkpoints.restore_untyped(step)["state"]
        return Weights(patterns.by_path(state["params"]), patterns.by_path(state.get("batch_stats") or {}))

    return Source(
        path,
        step,
        networks.describe(config),
        {name: config.model[name] for name in NETWORK},
        tuple(described.class_names),
        {name: config.data[name] for name in PREPROCESSING},
        read,
    )


def of_export(path: str) -> Source | None:
    """The network in a folder of `nfjax export` or `nfjax import`, on this machine or, as "hf://USER/NAME", on the
    Hugging Face Hub; None where there is none.

    Raises:
        ValueError: A file of it is damaged, or of a later version.
        FileNotFoundError: It has no weights.
    """
    from nfjax.inference import _folder, hub  # which know images, too

    folder = hub.fetch(path) if path.startswith(hub.PREFIX) else pathlib.Path(os.path.expanduser(path))
    if not (folder / _folder.SETTINGS).exists() or not _folder.is_export(folder):
        return None
    settings = _folder.read(folder)
    made, prepared = _folder.architecture(settings), _folder.preprocessing(settings, folder / _folder.SETTINGS)
    # An export has a number in any case; the run that it is of had none, and none follows another image_size.
    resize = None if prepared.resize == prepared.image_size else prepared.resize

    def read() -> Weights:
        found = _folder.read_weights(folder, settings)
        parts = ({name.partition("/")[2]: value for name, value in found.items() if name.startswith(f"{kind}/")}
                 for kind in ("params", "batch_stats"))  # fmt: skip
        return Weights(*parts)

    return Source(
        path,
        0 if settings.origin is None else settings.origin.step,
        f"{made.name} {', '.join(f'{name}={value}' for name, value in made.arguments.items() if value is not None)}",
        {"name": made.name} | {name: value for name, value in made.arguments.items() if name in NETWORK},
        tuple(settings.class_names),
        {name: getattr(prepared, name) for name in PREPROCESSING} | {"resize": resize},
        read,
    )


@contextlib.contextmanager
def _opened(folder: pathlib.Path) -> Iterator[checkpoint.Checkpoints]:
    """The checkpoints in a workdir, to be read; orbax would warn that nothing can be written."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        checkpoints = checkpoint.Checkpoints(mirror.location(folder), read_only=True)
        try:
            yield checkpoints
        finally:
            checkpoints.close()
    finally:
        logging.set_verbosity(verbosity)


KINDS: tuple[Callable[[str], Source | None], ...] = (of_export, of_workdir)


def find(path: str) -> Source:
    """The source at a path.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be read.
    """
    for kind in KINDS:
        if (source := kind(path)) is not None:
            return source
    raise FileNotFoundError(
        f"init_from={path}: there is no trained network; expected the --workdir of a training run, with its "
        f"{files.CONFIG} and {checkpoint.FOLDER}, or a folder of nfjax export or nfjax import"
    )


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that do not go together with a source."""
    if config.init_from is not None and rescaling.method(config) is not None:
        raise ValueError(
            f"model.rescale={config.model.rescale} would change the trained kernels of init_from={config.init_from}: "
            "expected one of the two; set --config.model.rescale=none, or --config.init_from=none"
        )


# ---------------------------------------------------------------- the settings of a run, and its record


class Record(msgspec.Struct):
    """What `RECORD` in a workdir tells of the source that a run began with.

    path, step, network, class_names, preprocessing: as of `Source`. digest: as of `Weights`. taken: paths whose arrays
    are the source's. anew: {path: why} of what the initializer drew. left: {path: why} of what the source has and the
    network does not take.
    """

    path: str
    step: int
    digest: str
    network: str
    class_names: list[str]
    preprocessing: dict[str, Any]
    taken: list[str]
    anew: dict[str, str]
    left: dict[str, str]


def read_record(folder: pathlib.Path) -> Record | None:
    """The record in a workdir; None where there is none. One that is damaged is as good as none, with a warning."""
    try:
        return storage.read_json(folder / RECORD, Record, "it tells what the run began with, and does without")
    except FileNotFoundError:
        return None
    except storage.DamagedFileError as error:
        logging.warning("%s", error)
        return None


def write_record(folder: pathlib.Path, record: Record) -> None:
    """Writes it, from the first process, which compares it with what an earlier start has left there."""
    if not distributed.is_first():
        return
    before = read_record(folder)
    if before is not None and (before.path, before.digest) != (record.path, record.digest):
        logging.warning(
            "%s began with other weights before: step %d of %s, digest %s; now step %d of %s, digest %s. No checkpoint "
            "of that start is left, so nothing is mixed",
            folder, before.step, before.path, before.digest, record.step, record.path, record.digest,
        )  # fmt: skip
    storage.write_json(folder / RECORD, msgspec.to_builtins(record), indent=2)


def remove_record(folder: pathlib.Path) -> None:
    """Removes what a first try, which came to nothing, has left there: the run begins with random weights."""
    if distributed.is_first():
        (folder / RECORD).unlink(missing_ok=True)


def resolve(config: ConfigDict, workdir: str | None = None) -> ConfigDict:
    """The config in which the source's preprocessing stands wherever config.data has its defaults; itself where there
    is no source.

    Args:
        config: Of a run.
        workdir: Of the run; one that goes on from a checkpoint does not ask its source again.

    Raises:
        FileNotFoundError, ValueError: As of `find`.
    """
    path = getattr(config, "init_from", None)
    if not isinstance(path, str) or not path:
        return config  # of which `checks` tells what is wrong with it
    known = _known(path, workdir)
    theirs = find(path).preprocessing if known is None else known
    defaults, resolved = configs.base().data, config.copy_and_resolve_references()
    for name, value in theirs.items():
        value, own = tuple(value) if isinstance(value, list | tuple) else value, _plain(config.data[name])
        if own == value:
            continue
        if own == _plain(defaults[name]):
            resolved.data[name] = value
            say(f"init    data.{name}={value}, as the source has it")
        else:
            say(f"init    data.{name}={own}, as set; the source has {value}")
    return resolved


def _known(path: str, workdir: str | None) -> dict[str, Any] | None:
    """The preprocessing of the source that the run in `workdir` began with, where it needs that source no more."""
    if workdir is None:
        return None
    folder = mirror.pull(workdir, f"process {jax.process_index()}")
    record = read_record(folder) if _checkpoints(folder) else None
    return record.preprocessing if record is not None and record.path == path else None


def _checkpoints(folder: pathlib.Path) -> bool:
    there = mirror.location(folder) / checkpoint.FOLDER
    return there.is_dir() and any(path.name.isdigit() for path in there.iterdir())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
