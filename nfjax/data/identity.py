"""Which images a data set has, wherever its files lie: what a run that goes on compares with those it began with."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from nfjax.data.sources.folder import FileReader
from nfjax.data.splits import Dataset, Encoded, Images

WHOLE = 256 * 2**20  # bytes of a split up to which all of them are read
SAMPLES = 1000  # files that are read of a larger one, spread evenly
THREADS = 16  # that ask for sizes: over a network every question waits


def identity(dataset: Dataset) -> dict[str, dict[str, str]]:
    """What tells a data set from another, equal for copies that differ in place and times only.

    Returns:
        {"train": {what: 16 hexadecimal digits}, "test": ...}. Of arrays: "pixels" and "classes". Of files: "names and
        classes", "sizes", and "contents", which are those of every file up to `WHOLE` bytes in a split, and of
        `SAMPLES` files in a larger one. Of a packed or prepared data set: the "version" that it states. Of others: the
        "contents" of `SAMPLES` examples.
    """
    return {name: _of(getattr(dataset, name), dataset.version) for name in ("train", "test")}


def _of(split: Images | Encoded, version: str | None) -> dict[str, str]:
    if isinstance(split, Images):
        shape = json.dumps(split.images.shape).encode()
        pixels = _digest([shape, np.ascontiguousarray(split.images)])
        return {"pixels": pixels, "classes": _digest([split.labels.astype("<i4")])}
    if version is not None:
        return {"version": _digest([f"{version} {len(split)}".encode()])}
    size = len(split)
    some = np.linspace(0, size - 1, min(size, SAMPLES)).astype(int).tolist()
    if not isinstance(split.reader, FileReader):
        return {"contents": _digest(of_examples(split, some))}
    sizes = _sizes(split)
    return {
        "names and classes": _digest(b"%s %d\n" % split.reference(index) for index in range(size)),
        "sizes": _digest([sizes.astype("<i8")]),
        "contents": _digest(of_examples(split, range(size) if sizes.sum() <= WHOLE else some)),
    }


def _sizes(split: Encoded) -> np.ndarray:
    """Bytes of every file, int64 [N]; -1 for one that cannot be found: reading will skip and name it."""

    def of_some(start: int) -> list[int]:
        return [_size(os.path.join(root, split.reference(i)[0])) for i in range(start, min(start + 1024, len(split)))]

    root = split.reader.root
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(of_some, range(0, len(split), 1024)))
    return np.concatenate([np.zeros(0, np.int64), *(np.array(part, np.int64) for part in parts)])


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def of_examples(split: Encoded, indices: Sequence[int]) -> Iterator[bytes]:
    """The SHA-256 of the bytes of each of these examples, and its class, in parts of any size."""

    def content(index: int) -> bytes:
        try:
            data, label = split.reader(split.reference(index))
        except (OSError, ValueError):  # training will skip and name it
            return b"unreadable\n"
        return hashlib.sha256(data).digest() + b" %d\n" % label

    def contents(start: int) -> bytes:
        return b"".join(content(index) for index in indices[start : start + 64])

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(contents, range(0, len(indices), 64))


def _digest(parts: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
