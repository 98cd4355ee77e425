"""Data sets in a bucket (gs://, s3://, …): small files are read in place, shards are copied to the local disk first.

Reading single records over the network costs a round trip and a request fee each, every epoch; copying a data set once
costs neither. Where the local disk is too small, array_record still reads gs:// itself, record by record.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import tqdm
from absl import logging

from nfjax import _cache, storage

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # what fsspec needs to speak each protocol
SPARE = 1 << 30  # bytes of local disk that a copy leaves free
THREADS = 8
BLOCK = 1 << 20


def is_remote(directory: str) -> bool:
    """Whether this names a bucket and not a local directory."""
    return "://" in directory


def path(directory: str) -> Any:
    """The directory as an etils.epath.Path, local or remote.

    Raises:
        ValueError: The protocol is not known.
        ImportError: The package that speaks it is missing; the message names it.
    """
    from etils import epath

    if not is_remote(directory):
        return epath.Path(directory)
    protocol = directory.partition("://")[0]
    if protocol not in PACKAGES:
        raise ValueError(
            f"{directory}: unknown protocol {protocol}://; expected a local directory, or one of "
            f"{', '.join(f'{name}://' for name in PACKAGES)}"
        )
    if importlib.util.find_spec(PACKAGES[protocol]):
        # Otherwise etils prefers TensorFlow, where that is installed, and takes seconds and memory to import it.
        os.environ.setdefault("EPATH_USE_TF", "false")
    elif importlib.util.find_spec("tensorflow") is None:
        raise ImportError(f"{directory}: reading {protocol}:// needs a package more: pip install {PACKAGES[protocol]}")
    return epath.Path(directory)


def mirror(directory: str, sizes: dict[str, int], version: str, checksums: dict[str, str] | None = None) -> str:
    """Copies the files of a remote directory to the local disk.

    Files that are already here in full are not copied again, and each appears under its name only when it is complete.
    Several processes of one machine copy once: the others wait.

    Args:
        directory: The remote one.
        sizes: {file name: bytes}.
        version: Names the state of the remote data, so that changed data is copied anew.
        checksums: {file name: SHA-256}.

    Returns:
        Where the files can be read: `directory` itself where the local disk lacks the room and the protocol is gs://.

    Raises:
        OSError: The local disk lacks the room; the bucket has other sizes, which is found before anything is copied; or
            a file arrives damaged.
        ValueError: A name is not plain.
    """
    for name in sizes:
        if storage.plain_name(name, directory).startswith("."):
            raise storage.DamagedFileError(f"{directory} names the file {name!r}: expected one that is not hidden")
    key = hashlib.sha256(os.fsencode(f"{directory} {version}")).hexdigest()[:12]
    name = re.sub(r"\W+", "-", directory.partition("://")[2]).strip("-")[-60:]
    local = _cache.cache_folder("mirror", f"{name}-{key}")
    with open(local / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in local.glob("*.part"):  # what a kill has left of a copy
            part.unlink()
        missing = {name: size for name, size in sizes.items() if _size(local / name) != size}
        needed, free = sum(missing.values()), shutil.disk_usage(local).free
        if needed + SPARE > free:
            problem = (
                f"{local} has {free / 2**30:.1f} GiB of free disk, too little for the {needed / 2**30:.1f} GiB of "
                f"{directory}"
            )
            if not directory.startswith("gs://"):
                raise OSError(f"{problem}; set NFJAX_CACHE to a directory on a larger disk")
        _check_sizes(path(directory), missing)
        if needed + SPARE > free:
            logging.warning("%s: records are read over the network; set NFJAX_CACHE to a larger disk", problem)
            return directory
        _copy(path(directory), local, missing, checksums or {})
    return str(local)


def upload(local: pathlib.Path, directory: str, names: list[str]) -> None:
    """Copies files of a local directory to a remote one; those there in full stay.

    Args:
        local: From where.
        directory: To where.
        names: Of the files, in this order.

    Raises:
        OSError: One has another size after it was written.
    """
    target = path(directory)
    target.mkdir(parents=True, exist_ok=True)
    total = sum((local / name).stat().st_size for name in names)
    with tqdm.tqdm(total=total, desc=f"copying to {directory}", unit="B", unit_scale=True, mininterval=1) as bar:
        for name in names:
            size = (local / name).stat().st_size
            if not ((target / name).exists() and (target / name).stat().length == size) or name.endswith(".json"):
                with open(local / name, "rb") as source, (target / name).open("wb") as stream:
                    shutil.copyfileobj(source, stream, BLOCK)
                written = (target / name).stat().length
                if written != size:
                    raise OSError(f"{target / name} has {written} bytes instead of {size}; run the same command again")
            bar.update(size)


def _size(file: pathlib.Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return -1


def _check_sizes(source: Any, sizes: dict[str, int]) -> None:
    """Raises OSError unless the files have these sizes."""

    def check(name: str) -> None:
        _check_size(source / name, (source / name).stat().length, sizes[name])

    _in_parallel(check, sizes)


def _check_size(file: Any, found: int, expected: int) -> None:
    if found != expected:
        raise OSError(
            f"{os.fspath(file)} has {found} bytes instead of {expected}: it is damaged, or still written; pack it again"
        )


def _in_parallel(function: Callable[[str], None], names: Iterable[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(function, name) for name in names]
        try:
            for call in concurrent.futures.as_completed(calls):
                call.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _copy(source: Any, local: pathlib.Path, sizes: dict[str, int], checksums: dict[str, str]) -> None:
    with tqdm.tqdm(
        total=sum(sizes.values()), desc=f"copying {os.fspath(source)}", unit="B", unit_scale=True, mininterval=1,
        disable=not sizes,
    ) as bar:  # fmt: skip
        _in_parallel(lambda name: _copy_one(source / name, local / name, sizes[name], checksums.get(name), bar), sizes)


def _copy_one(source: Any, target: pathlib.Path, size: int, checksum: str | None, bar: tqdm.tqdm) -> None:
    digest, copied = hashlib.sha256(), 0
    with storage.replacing(target) as part:
        with source.open("rb") as stream, open(part, "wb") as out:
            while (block := stream.read(BLOCK)) and copied <= size:
                out.write(block)
                digest.update(block)
                copied += len(block)
                bar.update(len(block))
        _check_size(source, copied, size)
        if checksum and digest.hexdigest() != checksum:
            raise OSError(
                f"{os.fspath(source)} has another SHA-256 than the manifest says: it is damaged, pack it again"
            )
