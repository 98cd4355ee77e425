"""A workdir in a bucket, gs://bucket/run: its small files live in a local folder and are copied there at every
checkpoint; the checkpoints themselves are written there directly.

The local folder is found again by the name of the bucket's. A file `.mirror` in it names that, and this run: a bucket
has no lock that a lost machine gives back, so the newest start goes on, and an older one ends where it would copy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
import uuid
from typing import Any

from nfjax.data import remote

MARK = ".mirror"
OWNER = "owner.json"  # in the bucket: the start that may write there
PATTERNS = ("*.json", "*.jsonl", "*.txt", "*.png", "events.*")


@dataclasses.dataclass(frozen=True)
class _Mark:
    bucket: str
    start: str  # which start of the run this folder belongs to


def pull(workdir: str, user: str) -> pathlib.Path:
    """The local folder of a workdir: itself, or for one in a bucket a folder with its small files as they are there.

    user: who works in it; every process of a run has its own. Raises ValueError for an unknown protocol, ImportError
    where the package that speaks it is missing, OSError for a bucket that cannot be read.
    """
    if not remote.is_remote(workdir):
        return pathlib.Path(os.path.expanduser(workdir))  # which leaves a ~ that it does not know as it is
    name = re.sub(r"\W+", "-", workdir.partition("://")[2]).strip("-")[-60:]
    digest = hashlib.sha256(f"{workdir.rstrip('/')} {user}".encode()).hexdigest()[:12]
    source = remote.path(workdir)
    folder = remote.cache_folder("runs", f"{name}-{digest}")
    (folder / MARK).write_text(json.dumps(dataclasses.asdict(_Mark(workdir, uuid.uuid4().hex))))
    for path in _matching(folder):
        path.unlink()
    fetch(folder, *(path.name for path in _matching(source)))
    return folder


def fetch(folder: pathlib.Path, *names: str) -> None:
    """Copies files from the bucket behind `folder`; nothing for a local workdir."""
    if (mark := _read(folder)) is not None:
        for name in names:
            (folder / name).write_bytes((remote.path(mark.bucket) / name).read_bytes())


def own(folder: pathlib.Path) -> None:
    """Makes this start the one that writes to the bucket behind `folder`."""
    if (mark := _read(folder)) is not None:
        target = remote.path(mark.bucket)
        target.mkdir(parents=True, exist_ok=True)
        owner = {"start": mark.start, "process": os.getpid(), "host": platform.node()}
        (target / OWNER).write_text(json.dumps(owner))


def push(folder: pathlib.Path) -> None:
    """Copies the small files of `folder` to the bucket behind it; nothing for a local workdir.

    Raises ValueError where a newer start writes there, OSError where nothing can be written.
    """
    if (mark := _read(folder)) is None:
        return
    target = remote.path(mark.bucket)
    owner = json.loads((target / OWNER).read_text())
    if owner["start"] != mark.start:
        raise ValueError(
            f"another run has been started in {mark.bucket} (process {owner['process']} on {owner['host']}): this one "
            "ends, that one goes on"
        )
    for path in _matching(folder):
        (target / path.name).write_bytes(path.read_bytes())


def shown(folder: pathlib.Path) -> str:
    """The workdir in `folder` as its user calls it."""
    mark = _read(folder)
    return str(folder) if mark is None else mark.bucket


def location(folder: pathlib.Path) -> Any:
    """Where the checkpoints of the run in `folder` lie: there, or in the bucket behind it, as an etils.epath.Path."""
    mark = _read(folder)
    return folder.absolute() if mark is None else remote.path(mark.bucket)


def _read(folder: pathlib.Path) -> _Mark | None:
    path = folder / MARK
    return _Mark(**json.loads(path.read_text())) if path.exists() else None


def _matching(folder: Any) -> list[Any]:
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.name != OWNER})
