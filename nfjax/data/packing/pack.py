"""Packs a data set into shards that training reads fast: see `nfjax.data.packing.manifest` for what it writes.

Shard k of a split holds examples k * per_shard to (k + 1) * per_shard - 1 of the source, in its order, less those that
cannot be decoded. A shard appears under its name only when it is complete, with a note beside it, so that a pack that
was killed goes on with the next shard; the manifest is written last, when everything is there.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypedDict

import numpy as np
import tqdm
from absl import logging

from nfjax import _cache, storage
from nfjax.data import remote
from nfjax.data.contents import contents
from nfjax.data.loading.pool import default_workers
from nfjax.data.packing import shards
from nfjax.data.packing.manifest import AGAIN, MANIFEST, SPLITS, Manifest, Shard, check_sizes, read_manifest, shard_name
from nfjax.data.sources import array_records
from nfjax.data.sources.records import RecordReader
from nfjax.data.splits import Dataset, warn_of_missing_classes

STATE = "packing.json"  # the settings of a pack that is not finished
LOCK = ".packing"  # held by the process that packs
# What an unfinished pack consists of; `.part` is what a kill has left of a file.
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}-of-\d{{5,}}\.array_record(\.json)?")
_OURS = re.compile(rf"{_SHARD.pattern}|{re.escape(STATE)}|{re.escape(LOCK)}|.*\.part")
PER_SHARD = 4096
MAX_SKIPPED = 0.01
AHEAD = 4  # images a thread may be ahead of the writer


class _Settings(TypedDict):
    """What shards are packed with."""

    source: str
    short_side: int | None
    quality: int | None
    per_shard: int
    fingerprint: str


def pack(
    dataset: Dataset,
    out: str | os.PathLike[str],
    *,
    source: str = "",
    short_side: int | None = None,
    quality: int = 90,
    per_shard: int = PER_SHARD,
    max_skipped: float = MAX_SKIPPED,
    threads: int | None = None,
    verify_after: bool = False,
) -> Manifest:
    """Writes a data set to a directory, from which the source "records" reads it.

    Run again with the same arguments, it goes on where it was interrupted, and packs what was lost or damaged since; an
    unfinished pack of files that have changed since begins anew. Every image is decoded on the way: those that cannot
    be are left out, and named with their cause in the manifest. Arrays are encoded as PNG, without loss.

    Args:
        dataset: The data set.
        out: An empty directory, local or in a bucket, which is written from a local copy in
            `_cache.cache_directory()`; or one that was packed with the same settings.
        source: Where the data came from, for the manifest.
        short_side: Pixels to which images with a longer short side are reduced, with Pillow's antialiased bilinear
            resize, the one of the evaluation crop, so that evaluation at that size sees the same pixels but for the
            JPEG of 4:2:0 chroma that they become. All others, and all if this is None, keep their bytes.
        quality: Of that JPEG, 1 to 100.
        per_shard: Images of a shard.
        max_skipped: The share of the images of a split that may be damaged.
        threads: By default one for every core.
        verify_after: Whether all of it is read again at the end, and compared.

    Returns:
        The manifest.

    Raises:
        ValueError: Settings are wrong, or differ from those of the pack in `out`, or too many images are damaged.
        FileExistsError: `out` holds something else, or another process packs there.
    """
    out, threads = os.fspath(out), default_workers() if threads is None else threads
    _check(short_side, quality, per_shard, max_skipped, threads)
    local = pathlib.Path(os.path.expanduser(out))
    if remote.is_remote(out):
        remote.path(out)  # fails here, and not after the work, where a package is missing
        local = _cache.cache_directory() / "packed" / hashlib.sha256(os.fsencode(out)).hexdigest()[:16]
    settings = {"source": source, "short_side": short_side, "quality": quality if short_side else None}
    fingerprint = dataset.fingerprint() if dataset.fingerprint else contents(dataset)
    settings |= {"per_shard": per_shard, "fingerprint": fingerprint}
    with _locked(local):
        manifest = _begin(local, settings)
        convert = functools.partial(shards.converted, short_side=short_side, quality=quality)
        if manifest is None:
            manifest = _pack(dataset, local, settings, convert, max_skipped, threads)
        else:
            logging.info("%s is packed already", local)
            _mend(dataset, local, manifest, convert, threads, verify_after)
        for note in local.glob("*.array_record.json"):
            note.unlink()
        if verify_after:
            verify(str(local))
    if remote.is_remote(out):
        files = [shard.file for split in SPLITS for shard in manifest.shards[split]]
        remote.upload(local, out, [*files, MANIFEST])  # the manifest last: it says that the rest is there
        logging.info("%s can be removed", local)
    return manifest


def verify(directory: str | os.PathLike[str]) -> int:
    """Reads every byte and every record of a packed directory.

    Returns:
        The number of records.

    Raises:
        ValueError, FileNotFoundError: A shard or a record is not as it was written; the first is named.
    """
    directory = os.fspath(directory)
    manifest, _ = read_manifest(directory)
    check_sizes(directory, {shard.file: shard.bytes for split in SPLITS for shard in manifest.shards[split]})
    total = sum(shard.count for split in SPLITS for shard in manifest.shards[split])
    with tqdm.tqdm(total=total, desc=f"verifying {directory}", unit=" images", mininterval=1) as bar:
        for split in SPLITS:
            found = np.zeros(len(manifest.class_names), int)
            for shard in manifest.shards[split]:
                if shards.sha256(pathlib.Path(directory) / shard.file) != shard.sha256:
                    raise ValueError(
                        f"{directory}/{shard.file} is not as it was written: its SHA-256 differs; the same command "
                        "packs it again"
                    )
                array_records.check_counts([(f"{directory}/{shard.file}", shard.count)], AGAIN)
                reader = RecordReader(directory, (shard,), len(manifest.class_names))
                for i in range(shard.count):
                    found[reader(i)[1]] += 1
                    bar.update()
            if found.tolist() != list(manifest.labels[split]):
                raise ValueError(f"{directory}: the labels of {split} are not as the manifest counts them; pack again")
    return total


def _check(short_side: int | None, quality: int, per_shard: int, max_skipped: float, threads: int) -> None:
    for name, value, good, expected in (
        ("short_side", short_side, short_side is None or short_side >= 1, "a positive number of pixels"),
        ("quality", quality, 1 <= quality <= 100, "1 to 100"),
        ("per_shard", per_shard, per_shard >= 1, "a positive number of images"),
        ("threads", threads, threads >= 1, "a positive number"),
        ("max_skipped", max_skipped, 0 <= max_skipped <= 1, "a share from 0 to 1"),
    ):
        if not good:
            raise ValueError(f"{name}={value}: expected {expected}")


@contextlib.contextmanager
def _locked(local: pathlib.Path) -> Iterator[None]:
    if local.is_dir() and any(local.iterdir()) and not any((local / name).exists() for name in (MANIFEST, STATE, LOCK)):
        raise FileExistsError(f"{local} is not empty, and holds no pack: choose another directory, or empty it")
    local.mkdir(parents=True, exist_ok=True)
    with _lock(local / LOCK):
        try:
            yield
        finally:
            if (local / MANIFEST).exists():
                (local / STATE).unlink(missing_ok=True)
                (local / LOCK).unlink()


def _lock(path: pathlib.Path) -> TextIO:
    """The open lock file, which this process holds until it is closed. Raises FileExistsError where another does."""
    while True:
        lock = open(path, "a")  # noqa: SIM115  it is the caller's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except BlockingIOError:
            lock.close()
            raise FileExistsError(f"another process is packing to {path.parent}: wait for it, or end it") from None
        lock.close()  # whoever held it has finished, and removed it since it was opened here


def _begin(local: pathlib.Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest, if all is packed already; refuses a directory that was packed with other settings."""
    manifest, found = None, None
    if (local / MANIFEST).exists():
        manifest, _ = read_manifest(str(local))
        found = manifest.settings
    elif (local / STATE).exists():
        try:
            found = storage.read_json(local / STATE, _Settings, "packing begins anew")
        except storage.DamagedFileError as error:
            if others := [file.name for file in local.iterdir() if not _OURS.fullmatch(file.name)]:
                raise FileExistsError(
                    f"{local} holds {others[0]!r} and a {STATE} that is none of a pack: choose another directory"
                ) from error
            logging.warning("%s", error)
    if found is None:
        _begin_anew(local, settings)
        return None
    differ = [
        f"{'the source (its files changed)' if key == 'fingerprint' else key}: {found.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if found.get(key) != value
    ]
    if manifest is None and found | {"fingerprint": None} == settings | {"fingerprint": None}:
        if differ:
            logging.warning("the source has changed since %s was begun: packing begins anew", local)
            _begin_anew(local, settings)
        return None
    if differ:
        raise ValueError(
            f"{local} was packed from other data or with other settings; {'; '.join(differ)}. Choose another "
            "directory, or remove it"
        )
    return manifest


def _begin_anew(local: pathlib.Path, settings: dict[str, Any]) -> None:
    """Removes shards of which nobody knows with what settings they were packed."""
    for file in local.iterdir():
        if _SHARD.fullmatch(file.name):
            file.unlink()
    storage.write_json(local / STATE, settings)


def _pack(
    dataset: Dataset,
    local: pathlib.Path,
    settings: dict[str, Any],
    convert: Callable[[bytes], bytes],
    max_skipped: float,
    threads: int,
) -> Manifest:
    splits = {"train": dataset.train, "test": dataset.test}
    listed, labels, skipped = {}, {}, {"source": dict(dataset.skipped)}
    total = sum(map(len, splits.values()))
    with (
        tqdm.tqdm(total=total, desc=f"packing to {local}", unit=" images", mininterval=1) as bar,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        for split, examples in splits.items():
            done: list[Shard] = []
            counts = np.zeros(len(dataset.class_names), int)
            bad: dict[str, str] = {}
            number = -(-len(examples) // settings["per_shard"])
            for k in range(number):
                file = local / shard_name(split, k, number)
                indices = _indices(k, settings["per_shard"], len(examples))
                note = shards.finished(file, len(dataset.class_names))
                if note is None:
                    example = functools.partial(shards.example, examples, convert, len(dataset.class_names))
                    note = shards.write(file, shards.in_order(pool, example, indices, AHEAD * threads), bar)
                else:
                    bar.update(len(indices))
                done.append(note.shard)
                counts += np.bincount(np.array(note.labels, int), minlength=len(counts))
                bad |= note.skipped
                _stop_at(split, bad, len(examples), max_skipped)
            warn_of_missing_classes(f"{settings['source']} {split}", counts, dataset.class_names)
            listed[split], labels[split], skipped[split] = tuple(done), tuple(counts.tolist()), bad
    manifest = Manifest(dataset.class_names, listed, labels, skipped, settings)
    manifest.check(str(local / MANIFEST))
    storage.write_text(local / MANIFEST, manifest.to_json())
    return manifest


def _indices(k: int, per_shard: int, size: int) -> range:
    """Of the examples in shard k."""
    return range(k * per_shard, min((k + 1) * per_shard, size))


def _mend(
    dataset: Dataset,
    local: pathlib.Path,
    manifest: Manifest,
    convert: Callable[[bytes], bytes],
    threads: int,
    thorough: bool,
) -> None:
    """Packs those shards again that the manifest lists and that are missing or of another size; thorough: or of another
    SHA-256. Raises ValueError where what comes out is not what the manifest says.
    """
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        example = functools.partial(shards.example, examples, convert, len(dataset.class_names))
        for k, shard in enumerate(manifest.shards[split]):
            file = local / shard.file
            same_size = file.exists() and file.stat().st_size == shard.bytes
            if same_size and not (thorough and shards.sha256(file) != shard.sha256):
                continue
            indices = _indices(k, manifest.settings["per_shard"], len(examples))
            with (
                tqdm.tqdm(total=len(indices), desc=f"packing {file} again", unit=" images", mininterval=1) as bar,
                concurrent.futures.ThreadPoolExecutor(threads) as pool,
            ):
                note = shards.write(file, shards.in_order(pool, example, indices, AHEAD * threads), bar)
            if note.shard != shard:
                raise ValueError(
                    f"{file} was lost or damaged, and packed again it is not what {MANIFEST} says: other "
                    f"versions of the libraries encode otherwise. Remove {local} and pack it anew"
                )


def _stop_at(split: str, bad: dict[str, str], total: int, max_skipped: float) -> None:
    if len(bad) <= max_skipped * total:
        return
    causes = collections.Counter(problem.partition(":")[0] for problem in bad.values())
    counted = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    named = "".join(f"\n  {name}: {problem}" for name, problem in list(bad.items())[:10])
    raise ValueError(
        f"{len(bad)} of the {total} images of {split} cannot be used ({counted}), more than {max_skipped:.3g} of "
        f"them:{named}"
        f"{f'{chr(10)}  and more' if len(bad) > 10 else ''}\nRepair or remove them, or allow more with --max-skipped"
    )
