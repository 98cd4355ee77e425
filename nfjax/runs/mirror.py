"""A workdir in a bucket, gs://bucket/run: its small files live in a local folder and are copied there at every
checkpoint; the checkpoints themselves are written there directly.

The local folder is found again by the name of the bucket's. A file `.mirror` in it names that, and this run: a bucket
has no lock that a lost machine gives back, so the newest start goes on, and an older one ends where it would copy.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import uuid
from collections.abc import Iterable
from typing import Any

from absl import logging

from nfjax import _cache, storage
from nfjax.data import remote

MARK = ".mirror"
LOCK = ".pulling"
RUNS = "runs"  # below the cache directory: the local folders
OWNER = "owner.json"  # in the bucket: the start that may write there
PATTERNS = ("*.json", "*.jsonl", "*.txt", "*.png", "events.*")


@dataclasses.dataclass(frozen=True)
class _Mark:
    bucket: str
    start: str  # which start of the run this folder belongs to


@dataclasses.dataclass(frozen=True)
class _Owner:
    start: str
    process: int
    host: str


def pull(workdir: str, user: str) -> pathlib.Path:
    """The local folder of a workdir: itself, or for one in a bucket a folder with its small files as they are there.

    user: who works in it; every process of a run has its own. Raises ValueError for an unknown protocol, ImportError
    where the package that speaks it is missing, OSError for a bucket that cannot be read or has more than the disk.
    """
    if not remote.is_remote(workdir):
        return pathlib.Path(os.path.expanduser(workdir))  # which leaves a ~ that it does not know as it is
    name = re.sub(r"\W+", "-", workdir.partition("://")[2]).strip("-")[-60:]
    digest = hashlib.sha256(f"{workdir.rstrip('/')} {user}".encode()).hexdigest()[:12]
    source = remote.path(workdir)
    folder = _cache.cache_folder(RUNS, f"{name}-{digest}")
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two evaluations of one run share the folder
        storage.write_json(folder / MARK, dataclasses.asdict(_Mark(workdir, uuid.uuid4().hex)))
        names = _usable(workdir, _matching(source))
        fetch(folder, *names)
        for path in _matching(folder):
            if path.name not in names:
                path.unlink()
    return folder


def _usable(workdir: str, found: Iterable[Any]) -> list[str]:
    """The names of small files that a bucket lists; a run writes no other than plain ones."""
    names = []
    for path in found:
        try:
            names.append(storage.plain_name(path.name, workdir))
        except storage.DamagedFileError as error:
            logging.warning("%s; it is left there", error)
    return names


def fetch(folder: pathlib.Path, *names: str) -> None:
    """Copies files from the bucket behind `folder`; nothing for a local workdir.

    Raises OSError where one cannot be read, or where the disk lacks the room, before anything is copied.
    """
    if (mark := _read(folder)) is None:
        return
    source = remote.path(mark.bucket)
    files = [source / storage.plain_name(name, mark.bucket) for name in names]
    free = shutil.disk_usage(folder).free
    if (needed := sum(file.stat().length for file in files)) > free:
        raise OSError(
            f"the files beside the checkpoints in {mark.bucket} have {needed / 2**30:.1f} GiB, more than the "
            f"{free / 2**30:.1f} GiB of free disk in {folder}: are they of a run? Set NFJAX_CACHE to a larger disk"
        )
    for file in files:
        with storage.replacing(folder / file.name) as part, file.open("rb") as stream, open(part, "wb") as out:
            shutil.copyfileobj(stream, out, remote.BLOCK)


def own(folder: pathlib.Path) -> None:
    """Makes this start the one that writes to the bucket behind `folder`."""
    if (mark := _read(folder)) is not None:
        target = remote.path(mark.bucket)
        target.mkdir(parents=True, exist_ok=True)
        # In a bucket, an object appears under its name when all of it is there.
        owner = _Owner(mark.start, os.getpid(), platform.node())
        (target / OWNER).write_text(json.dumps(dataclasses.asdict(owner)))


def push(folder: pathlib.Path) -> None:
    """Copies the small files of `folder` to the bucket behind it; nothing for a local workdir.

    Raises ValueError where a newer start writes there, OSError where nothing can be written, or where the run is not
    there any more.
    """
    if (mark := _read(folder)) is None:
        return
    target = remote.path(mark.bucket)
    try:
        owner = storage.read_json(target / OWNER, _Owner, "the same command writes it anew, and goes on")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{mark.bucket} holds no {OWNER} any more: was the workdir removed or moved? What was measured since then "
            f"is in {folder}"
        ) from error
    if owner.start != mark.start:
        host = owner.host if owner.host.isprintable() else ascii(owner.host)
        raise ValueError(
            f"another run has been started in {mark.bucket} (process {owner.process} on {host}): this one ends, that "
            "one goes on"
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


def _runs() -> pathlib.Path:
    """Where the local folders of workdirs in buckets lie."""
    return _cache.cache_directory() / RUNS


def _read(folder: pathlib.Path) -> _Mark | None:
    """The mark of a folder that `pull` made; what somebody has put into a folder of their own says nothing."""
    path = folder / MARK
    if not path.exists() or folder.absolute().parent != _runs().absolute():
        return None
    way_out = f"remove {folder}, and start the same command again"
    mark = storage.read_json(path, _Mark, way_out)
    if not remote.is_remote(mark.bucket):
        raise storage.DamagedFileError(f"{path} names {mark.bucket!r}: expected a directory in a bucket; {way_out}")
    return mark


def _matching(folder: Any) -> list[Any]:
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.name != OWNER}
    return sorted(path for path in found if not path.is_dir())
