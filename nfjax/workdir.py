"""The folder of a run: what it was started with, by which versions, and whether it may go on with these settings."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax
from ml_collections import ConfigDict

CONFIG = "config.json"
# What may differ when a run goes on: where its data lies, and how often it reports and saves.
MAY_CHANGE = ("data.dir", "log.", "checkpoint.")
PACKAGES = ("nfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "clu", "numpy")


def open_for(config: ConfigDict, workdir: str) -> pathlib.Path:
    """Creates `workdir`, or checks that the run in it has this config. Writes nothing: `write_config` does.

    Raises ValueError that names the fields which differ, and OSError if nothing can be written there.
    """
    folder = pathlib.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"the workdir {folder} cannot be written ({error.strerror}); choose another with --workdir=DIR"
        ) from error
    if (folder / CONFIG).exists():
        before, now = _flat(read_config(folder)), _flat(config)
        differing = [
            f"  {name}: {before.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and not name.startswith(MAY_CHANGE)
        ]
        if differing:
            raise ValueError(
                f"the workdir {folder} holds a run with another config; nothing was changed there. These fields "
                "differ:\n" + "\n".join(differing) + "\nchoose another --workdir, or the settings of that run"
            )
    return folder


def write_config(folder: pathlib.Path, config: ConfigDict) -> None:
    """Makes `folder` the workdir of a run with this config."""
    (folder / CONFIG).write_text(config.to_json_best_effort(indent=2) + "\n")


def read_config(folder: pathlib.Path) -> ConfigDict:
    """The resolved config of the run in `folder`; raises FileNotFoundError if there is none."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path}; expected the --workdir of a training run")
    return ConfigDict(json.loads(path.read_text()))


def note_start(folder: pathlib.Path, step: int) -> None:
    """Adds one entry to versions.json: when, from which step, by which versions, on which device, from which commit."""
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
