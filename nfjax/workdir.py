"""The folder of a run: what it was started with, by which versions, and whether it may go on with these settings."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from nfjax import distributed, mirror
from nfjax.data import Dataset

LOCK = ".lock"
CONFIG = "config.json"
DATA = "data.json"
# What may differ when a run goes on: where its data lies and who decodes it, where its state lies, and how often it
# reports and saves.
MAY_CHANGE = ("data.dir", "data.workers", "data.ahead", "data.max_skipped", "train.state_shards", "model.remat")
MAY_CHANGE += ("log.", "checkpoint.")
PACKAGES = ("nfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "clu", "numpy")


def open_for(config: ConfigDict, workdir: str) -> pathlib.Path:
    """Creates `workdir`, or checks that the run in it has this config. Writes nothing: `start` does.

    Raises ValueError that names the fields which differ, and OSError if nothing can be written there, or if another
    process does not see it.
    """
    folder = mirror.pull(workdir, f"process {jax.process_index()}")
    if distributed.is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
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
    if _has_begun(folder):
        before, now = essence(read_config(folder)), essence(config)
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
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield


def start(folder: pathlib.Path, config: ConfigDict, dataset: Dataset) -> None:
    """Makes `folder` the workdir of a run with this config and these images: config.json and data.json.

    Raises ValueError if the run in it has begun with other classes or another number of training images: its labels
    would change their meaning, its epochs their length.
    """
    if _has_begun(folder):
        check_data(folder, dataset, ["class_names", "train_images"])
    described = _described(dataset) | {"skipped_files": dataset.skipped, "left_aside": dataset.left_aside}
    distributed.same_everywhere("the data set", hashlib.sha256(json.dumps(described).encode()).hexdigest())
    distributed.same_everywhere("the config", hashlib.sha256(json.dumps(_flat(config)).encode()).hexdigest())
    if not distributed.is_first():
        return
    mirror.own(folder)
    (folder / CONFIG).write_text(config.to_json_best_effort(indent=2) + "\n")
    (folder / DATA).write_text(json.dumps(described, indent=1) + "\n")


def check_data(folder: pathlib.Path, dataset: Dataset, names: list[str]) -> None:
    """ValueError if the images differ in `names` ("class_names", "train_images") from those of the run in `folder`."""
    before, now = read_data(folder), _described(dataset)
    for name in names:
        if before[name] != now[name]:
            raise ValueError(
                f"the run in {folder} was trained on other images; nothing was changed there. Its {name}: "
                f"{_short(before[name])}; now: {_short(now[name])}"
            )


def _described(dataset: Dataset) -> dict[str, Any]:
    sizes = {"train_images": len(dataset.train), "test_images": len(dataset.test)}
    return {"class_names": list(dataset.class_names)} | sizes


def read_data(folder: pathlib.Path) -> dict[str, Any]:
    """{"class_names", "train_images", "test_images", "skipped_files", "left_aside"} of the run in `folder`."""
    return json.loads((folder / DATA).read_text())


def _has_begun(folder: pathlib.Path) -> bool:
    """Whether anything was measured or saved: a first try that failed before does not stand in the way of the next."""
    metrics, checkpoints = folder / "metrics.jsonl", mirror.location(folder) / "checkpoints"
    return (metrics.exists() and metrics.stat().st_size > 0) or (checkpoints.exists() and any(checkpoints.iterdir()))


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, list) else f"{value:,}"
    return text if len(text) < 200 else f"{text[:200]}..."


def read_config(folder: pathlib.Path) -> ConfigDict:
    """The resolved config of the run in `folder`; raises FileNotFoundError if there is none."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path}; expected the --workdir of a training run")
    return ConfigDict(json.loads(path.read_text())).lock()


def note_start(folder: pathlib.Path, step: int) -> None:
    """Adds one entry to versions.json: when, from which step, by which versions, on which device, from which commit."""
    if not distributed.is_first():
        return
    path = folder / "versions.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    device = jax.devices()[0]
    entries.append(
        {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": step,
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
            "commit": _commit(),
        }
    )
    path.write_text(json.dumps(entries, indent=2) + "\n")


def note_parameters(folder: pathlib.Path, params: Any) -> None:
    """Writes parameters.txt: name, shape, size, mean and standard deviation of every parameter before training."""
    if distributed.is_first():
        (folder / "parameters.txt").write_text(parameter_overview.get_parameter_overview(params) + "\n")


def essence(config: ConfigDict) -> dict[str, Any]:
    """{"model.depth": 18, ...}: the settings that decide what a run comes to, without those that may change."""
    return {name: value for name, value in _flat(config).items() if not name.startswith(MAY_CHANGE)}


def _flat(config: ConfigDict) -> dict[str, Any]:
    """{"model.depth": 18, ...}; through JSON, so that tuples and lists compare equal."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}{name}.", inner)
        else:
            flat[prefix[:-1]] = value

    walk("", json.loads(config.to_json_best_effort()))
    return flat


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
