"""The class of every example of a split. Sources that list their files know it; of the others each example is read
once, and what was found is kept in the cache directory.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import platform
import weakref
from collections.abc import Callable

import numpy as np
import tqdm
from absl import logging

from nfjax import _cache, storage
from nfjax.data.splits import Encoded, Images

UNKNOWN = -1  # of an example that cannot be read
THREADS = 16
_FOUND: weakref.WeakKeyDictionary[Encoded, np.ndarray] = weakref.WeakKeyDictionary()  # by split, in this process


def labels_of(split: Images | Encoded, fingerprint: Callable[[], str] | None = None) -> np.ndarray:
    """The labels of a split, int32 [N], `UNKNOWN` for examples that cannot be read.

    Args:
        split: Of which.
        fingerprint: Of its data set, which names what is kept; None where nothing is.
    """
    known = getattr(split, "labels", None)
    if known is not None:
        return np.asarray(known, np.int32)
    if split not in _FOUND:
        path = None if fingerprint is None else _path(fingerprint(), len(split))
        stored = None if path is None else _stored(path, len(split))
        _FOUND[split] = _read(split) if stored is None else stored
        if path is not None and stored is None:
            _keep(path, _FOUND[split])
    return _FOUND[split]


def _read(split: Encoded) -> np.ndarray:
    labels = np.full(len(split), UNKNOWN, np.int32)

    def read(start: int) -> None:
        stop = min(start + 64, len(split))
        for i in range(start, stop):
            try:
                labels[i] = split.reader(split.reference(i))[1]
            except (OSError, ValueError):  # training will skip and name it
                continue
        bar.update(stop - start)

    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        tqdm.tqdm(total=len(split), desc="reading labels", unit=" examples", mininterval=1) as bar,
    ):
        try:
            list(pool.map(read, range(0, len(split), 64)))
        except BaseException:  # Ctrl-C: what has not begun is not waited for
            pool.shutdown(cancel_futures=True)
            raise
    return labels


def _path(fingerprint: str, size: int) -> pathlib.Path | None:
    key = hashlib.sha256(f"1 {fingerprint} {size}".encode()).hexdigest()[:16]
    try:
        return _cache.cache_directory() / f"labels-{key}.npy"
    except OSError:
        return None


def _stored(path: pathlib.Path, size: int) -> np.ndarray | None:
    try:
        labels = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logging.warning("the cache %s cannot be read (%s) and is made again", path, error)
        return None
    fits = labels.shape == (size,) and labels.dtype == np.int32 and labels.min(initial=0) >= UNKNOWN
    return labels if fits else None


def _keep(path: pathlib.Path, labels: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path, f"{platform.node()}-{os.getpid()}") as part, open(part, "wb") as file:
            np.save(file, labels)
    except OSError as error:
        logging.warning("the labels cannot be cached in %s (%s); the next run reads them again", path.parent, error)
