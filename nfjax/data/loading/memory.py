"""A whole data set decoded into memory: once, in parallel, and cached for the next run.

The cache lies under `_cache.cache_directory()`, keyed by the fingerprint of the data set and by what was done to its
pixels.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
import platform

import numpy as np
import tqdm
from absl import logging

from nfjax import _cache, storage
from nfjax.data.decoding import decode
from nfjax.data.decoding.crops import CentreCrop
from nfjax.data.loading import skips
from nfjax.data.loading.pool import default_workers
from nfjax.data.splits import Dataset, Encoded, Images

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def decoded(dataset: Dataset, train: CentreCrop, test: CentreCrop, max_skipped: float) -> Dataset:
    """A data set with both splits as arrays; what is in memory already stays as it is.

    Args:
        dataset: Of images that are encoded.
        train: What is cut out of each training image, and to which size it is scaled.
        test: The same of test images.
        max_skipped: The share of a split that may be damaged.

    Returns:
        The data set, with `Images` of the crops' sizes. An image that cannot be decoded is left out, and named in
        `skipped` with the cause.

    Raises:
        ValueError: More are damaged than may be, or the arrays would take more than half of the machine's memory.
    """
    splits = {"train": (dataset.train, train), "test": (dataset.test, test)}
    if all(isinstance(split, Images) for split, _ in splits.values()):
        return dataset
    _check_memory([(len(split), crop.size) for split, crop in splits.values()])
    cache = _kept_in(dataset, train, test)
    stored = None if cache is None else _read(cache)
    if stored is None:
        arrays, skipped = {}, {}
        for name, (split, crop) in splits.items():
            if isinstance(split, Images):
                images, labels, skipped[name] = split.images, split.labels, {}
            else:
                images, labels, skipped[name] = _decode(split, crop, name)
            skips.check(name, skipped[name], len(split), max_skipped)
            if not len(labels):
                raise ValueError(f"none of the images in {name} can be read; {skips.summary(skipped[name])}")
            arrays |= {f"{name}_images": images, f"{name}_labels": labels}
        if cache is not None:
            _write(cache, arrays, skipped)
    else:
        arrays, skipped = stored
        logging.info("decoded images read from %s", cache)
        for name, (split, _) in splits.items():  # this run may allow less than the one that decoded them
            skips.check(name, skipped[name], len(split), max_skipped)
    images = {name: Images(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in splits}
    named = dataset.skipped | skipped["train"] | skipped["test"]
    return Dataset(images["train"], images["test"], dataset.class_names, named, left_aside=dataset.left_aside)


def _check_memory(splits: list[tuple[int, int]]) -> None:
    needed = sum(count * size * size * 3 for count, size in splits)
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if needed > limit:
        raise ValueError(
            f"{sum(count for count, _ in splits)} images of {splits[0][1]}x{splits[0][1]} pixels take "
            f"{needed / 2**30:.1f} GiB, more than half of this machine's memory ({limit / 2**30:.1f} GiB); leave them "
            "on the disk with --config.data.keep=disk, or use a smaller --config.data.image_size or fewer images"
        )


def _kept_in(dataset: Dataset, train: CentreCrop, test: CentreCrop) -> pathlib.Path | None:
    """Where the decoded images of this data set lie; None where nobody could tell whether they are still the same, and
    where there is no place for them.
    """
    if dataset.fingerprint is None:
        return None
    key = hashlib.sha256(f"4 {decode.RULE} {dataset.fingerprint()} {train} {test}".encode()).hexdigest()[:16]
    try:
        return _cache.cache_directory() / f"decoded-{key}.npz"
    except OSError as error:
        logging.warning("the decoded images are not cached: %s", error)
        return None


def _decode(split: Encoded, crop: CentreCrop, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """(images, labels, {name of one that cannot be read: cause})."""
    images = np.empty((len(split), crop.size, crop.size, 3), np.uint8)
    labels = np.zeros(len(split), np.int32)
    failures: dict[int, tuple[str, str]] = {}

    def decode_slice(start: int) -> None:
        stop = min(start + 64, len(split))
        for i in range(start, stop):
            try:
                data, labels[i] = split.reader(split.reference(i))
                images[i] = crop(data)
            except Exception as error:  # any file may be bad in any way
                failures[i] = skips.explained(error)
        bar.update(stop - start)

    with (
        concurrent.futures.ThreadPoolExecutor(default_workers()) as pool,
        tqdm.tqdm(total=len(split), desc=f"decoding {name}", unit=" images", mininterval=1) as bar,
    ):
        try:
            list(pool.map(decode_slice, range(0, len(split), 64)))
        except BaseException:  # Ctrl-C: the slices that have not begun are not waited for
            pool.shutdown(cancel_futures=True)
            raise
    good = np.ones(len(split), bool)
    good[list(failures)] = False
    if failures:
        images, labels = images[good], labels[good]
    return images, labels, {skips.printable(split.name(i)): failures[i][0] for i in sorted(failures)}


Stored = tuple[dict[str, np.ndarray], dict[str, dict[str, str]]]


def _read(cache: pathlib.Path) -> Stored | None:
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays, skipped = {name: stored[name] for name in _ARRAYS}, str(stored["skipped"])
        skipped = storage.parse_json(skipped, dict[str, dict[str, str]], f"{cache}, skipped", "it is made again")
        for split in ("train", "test"):
            Images(arrays[f"{split}_images"], arrays[f"{split}_labels"])
            skipped[split]
    except FileNotFoundError:
        return None
    except Exception as error:  # of zip files, arrays or JSON, whatever is wrong with them
        logging.warning("the cache %s cannot be read (%s) and is made again", cache, error)
        return None
    return arrays, skipped


def _write(cache: pathlib.Path, arrays: dict[str, np.ndarray], skipped: dict[str, dict[str, str]]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(cache, f"{platform.node()}-{os.getpid()}") as part, open(part, "wb") as file:
            np.savez(file, **arrays, skipped=np.array(json.dumps(skipped)))
    except OSError as error:
        logging.warning(
            "the decoded images cannot be cached in %s (%s); the next run decodes them again", cache.parent, error
        )
