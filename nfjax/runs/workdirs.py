"""The folder of a run: what it was started with, by which versions, and whether it may go on with these settings."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from nfjax import _streams as streams
from nfjax import config as configs
from nfjax import distributed, storage
from nfjax.data import Dataset
from nfjax.runs import files, mirror
from nfjax.runs.progress import say

LOCK = ".lock"
PARAMETERS = "parameters.txt"
# What may differ when a run goes on: where its data lies and who decodes it, where its state lies, how it is computed,
# and how often it reports and saves.
MAY_CHANGE = ("data.dir", "data.workers", "data.ahead", "data.max_skipped", "train.state_shards", "model.remat")
MAY_CHANGE += ("train.onednn", "train.keep_memory", "log.", "checkpoint.")
PACKAGES = ("nfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "clu", "numpy")


def open_for(config: ConfigDict, workdir: str) -> pathlib.Path:
    """Creates `workdir`, or checks that the run in it has this config. Writes nothing: `start` does.

    The epochs may be more than they were.

    Raises ValueError that names the fields which differ, or what lies there that is not of a run, and OSError if
    nothing can be written there, or if another process does not see it.
    """
    if streams.printable(workdir) != workdir:
        raise ValueError(
            f"the workdir {streams.printable(workdir)} has a name that is not UTF-8, in which checkpoints cannot be "
            "written; choose another with --workdir=DIR"
        )
    folder = mirror.pull(workdir, f"process {jax.process_index()}")
    if distributed.is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(
                f"the workdir {folder} cannot be written ({error.strerror}); choose another with --workdir=DIR"
            ) from error
    distributed.barrier("workdir")
    if not folder.is_dir():
        raise OSError(
            f"process {jax.process_index()} does not see the workdir {folder} that process 0 has made: all processes "
            "need the same shared directory, or one in a bucket"
        )
    if (foreign := _foreign(folder)) and not _is_ours(folder):
        raise ValueError(
            f"the workdir {mirror.shown(folder)} is not empty, and what lies there ({foreign}) is of no run of nfjax: "
            "nothing was changed there; choose another --workdir, or empty it"
        )
    if _has_begun(folder) and (before := _settings_before(folder, config)) is not None:
        now = essence(config)
        _note_more_epochs(before, now)
        differing = [
            f"  {name}: {before.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if differing:
            raise ValueError(
                f"the workdir {folder} holds a run with another config; nothing was changed there. These fields "
                "differ:\n" + "\n".join(differing) + "\nchoose another --workdir, or the settings of that run"
            )
    return folder


def _note_more_epochs(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Lets a run go on for more epochs than it began with, whether it came to their end or not."""
    then, wanted = before.get("epochs"), now.get("epochs")
    if isinstance(then, int) and isinstance(wanted, int) and then < wanted:
        say(f"epochs  {then} before, {wanted} now: from here on with the schedule of {wanted} epochs")
        before["epochs"] = wanted


def _foreign(folder: pathlib.Path) -> str:
    """The names of what lies in a workdir, the first of them; hidden files, and those of a file system or of a start
    that came no further, do not count.
    """
    location = mirror.location(folder)
    names = sorted(path.name for path in location.iterdir()) if location.exists() else []
    names = [name for name in names if name == LOCK or not name.startswith(".")]
    names = [name for name in names if name not in ("lost+found", mirror.OWNER)]
    if LOCK in names and _is_our_lock(folder):
        names.remove(LOCK)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_ours(folder: pathlib.Path) -> bool:
    """Whether nfjax has made what lies in `folder`, be it by a first try that failed: one whole file tells."""
    readers: tuple[Callable[[pathlib.Path], Any], ...] = (files.read_settings, files.read_data, files.read_starts)
    for read in readers:
        with contextlib.suppress(OSError, storage.DamagedFileError):
            read(folder)
            return True
    return False


def _is_our_lock(folder: pathlib.Path) -> bool:
    try:
        return (folder / LOCK).read_bytes()[:8] in (b"", b"process ")
    except OSError:
        return False


def _settings_before(folder: pathlib.Path, config: ConfigDict) -> dict[str, Any] | None:
    """`essence` of the run in `folder`; None where its config.json is gone or damaged, and `config` has to do."""
    try:
        stored = _flat(files.read_settings(folder))
    except FileNotFoundError:
        logging.warning("%s is missing: the settings given now are taken for those of the run", folder / files.CONFIG)
        return None
    except storage.DamagedFileError as error:
        if _vouched(folder, "config", _of_config(config)):
            return None  # `start` sets it aside
        raise ValueError(
            f"{error}. Whether the settings given now are those of that run cannot be told; where they are, move "
            "config.json away, and start again"
        ) from error
    defaults = _flat(json.loads(configs.base().to_json_best_effort()))
    return _essential(defaults | stored)  # a run from before a field existed had what is its default now


def _vouched(folder: pathlib.Path, name: str, digest: str) -> bool:
    """Whether the last start that versions.json tells of had this "config" or "data"."""
    try:
        return getattr(files.read_starts(folder)[-1], name) == digest
    except (OSError, storage.DamagedFileError):
        return False


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Within it, no other run may use `folder`; the system ends the claim when the process ends, however it does.

    Raises ValueError where another run has it.
    """
    if not distributed.is_first():
        yield
        return
    with open(folder / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"another run is at work in the workdir {folder} ({lock.read().strip() or 'process unknown'}): wait "
                "for it, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): do not start a second run in it", folder, error)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


def start(folder: pathlib.Path, config: ConfigDict, dataset: Dataset) -> None:
    """Makes `folder` the workdir of a run with this config and these images: config.json and data.json.

    Raises ValueError if the run in it has begun with other images: labels would change their meaning, epochs their
    length, scores what they are scores of.
    """
    described = _described(dataset)
    if dataset.identity is not None:
        described = dataclasses.replace(described, identity=dataset.identity())
    if _has_begun(folder):
        _check_images(folder, described)
    distributed.same_everywhere("the data set", _of_data(described))
    distributed.same_everywhere("the config", _digest(_flat_config(config)))
    if not distributed.is_first():
        return
    mirror.own(folder)
    files.keep(folder / files.CONFIG, files.read_settings, json.loads(config.to_json_best_effort()))
    files.keep(folder / files.DATA, files.read_data, dataclasses.asdict(described))


def check_classes(folder: pathlib.Path, dataset: Dataset) -> None:
    """ValueError if the classes are not those of the run in `folder`."""
    _check_same(folder, "class_names", files.read_data(folder).class_names, list(dataset.class_names))


def _check_images(folder: pathlib.Path, now: files.Described) -> None:
    """ValueError if the images are not those of the run in `folder`, which names what differs."""
    try:
        before = files.read_data(folder)
    except FileNotFoundError:
        logging.warning("%s is missing: the images there are now are taken for those of the run", folder / files.DATA)
        return
    except storage.DamagedFileError as error:
        if _vouched(folder, "data", _of_data(now)):
            return  # `_keep` sets it aside
        raise ValueError(
            f"{error}. Whether the images are still those of that run cannot be told; where they are, move data.json "
            "away, and start again"
        ) from error
    for name in ("class_names", "train_images", "test_images"):
        _check_same(folder, name, getattr(before, name), getattr(now, name))
    differing = [
        f"the {what} of its {split} images"
        for split in before.identity.keys() & now.identity.keys()
        for what in before.identity[split].keys() & now.identity[split].keys()
        if before.identity[split][what] != now.identity[split][what]
    ]
    if differing:
        raise ValueError(
            f"the run in {folder} was trained on other images; nothing was changed there. What differs: "
            f"{', '.join(sorted(differing))}. Put the images back, or choose another --workdir; to go on with the "
            f"images as they are now, move {folder / files.DATA} away"
        )


def _check_same(folder: pathlib.Path, name: str, before: Any, now: Any) -> None:
    if before != now:
        raise ValueError(
            f"the run in {folder} was trained on other images; nothing was changed there. Its {name}: "
            f"{_short(before)}; now: {_short(now)}"
        )


def _described(dataset: Dataset) -> files.Described:
    names = list(dataset.class_names)
    return files.Described(
        names,
        len(dataset.train),
        len(dataset.test),
        skipped_files=dict(dataset.skipped),
        left_aside=dict(dataset.left_aside),
    )


def _has_begun(folder: pathlib.Path) -> bool:
    """Whether anything was measured or saved: a first try that failed before does not stand in the way of the next."""
    metrics, checkpoints = folder / "metrics.jsonl", mirror.location(folder) / "checkpoints"
    return (metrics.exists() and metrics.stat().st_size > 0) or (checkpoints.exists() and any(checkpoints.iterdir()))


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, list) else f"{value:,}"
    return text if len(text) < 200 else f"{text[:200]}..."


def note_start(folder: pathlib.Path, config: ConfigDict, step: int) -> None:
    """Adds one entry to versions.json: when, from which step to which epoch, by which versions, on which device, from
    which commit.
    """
    if not distributed.is_first():
        return
    path = folder / files.VERSIONS
    try:
        files.read_starts(folder)
        entries = json.loads(path.read_bytes())
    except FileNotFoundError:
        entries = []
    except storage.DamagedFileError as error:
        storage.set_aside(path, error)
        entries = []
    device = jax.devices()[0]
    entries.append(
        {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": step,
            "epochs": config.epochs,
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
            "commit": _commit(),
            "config": _of_config(config),
            "data": _of_data(files.read_data(folder)),
        }
    )
    storage.write_json(path, entries, indent=2)


def note_parameters(folder: pathlib.Path, params: Any) -> None:
    """Writes parameters.txt: name, shape, size, mean and standard deviation of every parameter before training."""
    if distributed.is_first():
        storage.write_text(folder / PARAMETERS, parameter_overview.get_parameter_overview(params) + "\n")


def essence(config: ConfigDict) -> dict[str, Any]:
    """{"model.depth": 18, ...}: the settings that decide what a run comes to, without those that may change."""
    return _essential(_flat_config(config))


def _essential(flat: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat.items() if not name.startswith(MAY_CHANGE)}


def _flat_config(config: ConfigDict) -> dict[str, Any]:
    """{"model.depth": 18, ...}; through JSON, so that tuples and lists compare equal."""
    return _flat(json.loads(config.to_json_best_effort()))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}{name}.", inner)
        else:
            flat[prefix[:-1]] = value

    walk("", settings)
    return flat


def _of_config(config: ConfigDict) -> str:
    """A digest of what decides the run, the same when later versions have fields more."""
    default = essence(configs.base())
    return _digest({name: value for name, value in essence(config).items() if value != default.get(name)})


def _of_data(described: files.Described) -> str:
    return _digest(
        {
            name: value
            for name, value in dataclasses.asdict(described).items()
            if name not in ("skipped_files", "left_aside")
        }
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _commit() -> str | None:
    """The git commit of this source tree, None outside of one."""
    here = pathlib.Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
