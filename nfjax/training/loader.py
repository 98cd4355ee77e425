"""Batches of a split, in the order of a run, on the devices.

A loader owns the order of the examples, those that cannot be read, and which device gets which; the loop asks it for
batches. Images that fit are gathered from the device's memory; others are sent from the host, made while the device is
at work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nfjax import data
from nfjax._names import lookup
from nfjax.data import Classes, Order
from nfjax.data.decoding import crops
from nfjax.data.identity import identity
from nfjax.data.loading import memory, skips, stream
from nfjax.training import balance, ranges, sharding, step
from nfjax.training.ranges import Range
from nfjax.training.state import Batch, Steps

HostBatch = dict[str, np.ndarray]  # {"image", "label", "mask"}
KEEP = ("device", "host", "disk")


def _check_pair(name: str, values: Any, share: bool) -> None:
    if len(values) != 2:
        raise ValueError(
            f"{name}={tuple(values)}: expected the smallest and the largest, such as --config.{name}='(0.5, 1.0)'"
        )
    values = ranges.check_numbers(name, values)
    if not 0 < values[0] <= values[1] or (share and values[1] > 1):
        wanted = "0 < low <= high" + (" <= 1, shares of the area" if share else ", width / height")
        raise ValueError(f"{name}={values}: expected {wanted}")


RANGES: dict[str, Range] = {
    "seed": ranges.whole(0, 2**32 - 1, f"must be from 0 to {2**32 - 1}"),
    "batch_size": ranges.whole(1, 2**24, "must be positive, and at most 16777216 images"),
    "epochs": ranges.whole(1, 10**6, "must be positive, and at most 1000000"),
    "data.share": Range(lambda value: 0 < value <= 1, "must be more than 0, and at most 1 for all images"),
    "data.image_size": ranges.whole(1, 2**14, "must be a positive number of pixels, at most 16384"),
    "data.resize": ranges.whole(
        1, 2**14, "must be a positive number of pixels, at most 16384, or none for data.image_size"
    ),
    "data.workers": ranges.whole(1, 4096, "must be at least 1, and at most 4096; none for one a core"),
    "data.ahead": ranges.whole(1, 10**6, "must be at least 1, and at most 1000000 batches"),
    "data.max_skipped": ranges.SHARE,
    "augment.resized_crop_scale": Range(check=functools.partial(_check_pair, share=True)),
    "augment.resized_crop_ratio": Range(check=functools.partial(_check_pair, share=False)),
    "steps_per_dispatch": ranges.whole(1, ranges.LAST_STEP, "must be positive"),
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that do not agree with each other, or a source that does not exist."""
    size, resize = config.data.image_size, config.data.resize
    if resize is not None and resize < size:
        raise ValueError(
            f"data.resize={resize}: a square of {size} pixels cannot be cut out of an image whose short side has "
            f"{resize}; expected at least data.image_size, or none for it"
        )
    lookup("data.keep", config.data.keep, dict.fromkeys(KEEP), callables=False)
    if (config.steps_per_dispatch or 1) > 1 and config.data.keep != "device":
        raise ValueError(
            f"steps_per_dispatch={config.steps_per_dispatch} must be positive, and 1 unless data.keep=device"
        )
    if config.augment.resized_crop_scale is not None and config.data.keep != "disk":
        raise ValueError(
            f"augment.resized_crop_scale={tuple(config.augment.resized_crop_scale)} needs the original images: set "
            "--config.data.keep=disk"
        )
    for name in ("train", "test"):
        transform(config, name)
    data.loader(config.data.source)


# ---------------------------------------------------------------- from a config to a loader


def open_data(config: ConfigDict, directory: str) -> data.Dataset:
    """The data set of a config: decoded into memory, or as it lies on the disk, whatever the config says.

    Its identity is that of what it was decoded from.
    """
    dataset = data.load(config.data.source, directory, config.data.image_size).thinned(config.data.share)
    dataset = dataclasses.replace(dataset, identity=functools.partial(identity, dataset))
    if config.data.keep == "disk":
        if isinstance(dataset.train, data.Images):
            raise ValueError(
                f"data.keep=disk: {config.data.source} has no image files to decode; set --config.data.keep=device"
            )
        return dataset
    size, upright = config.data.image_size, config.data.exif_orientation
    cut, middle = crops.CentreCrop(size, size, upright), crops.CentreCrop(size, config.data.resize or size, upright)
    decoded = memory.decoded(dataset, cut, middle, config.data.max_skipped)
    return dataclasses.replace(decoded, identity=dataset.identity)


def transform(config: ConfigDict, name: str) -> stream.Transform:
    """What the host does to each encoded image of the split "train" or "test"."""
    size, scale = config.data.image_size, config.augment.resized_crop_scale
    if name == "train" and scale is not None:
        ratio = tuple(config.augment.resized_crop_ratio)
        return crops.RandomResizedCrop(size, tuple(scale), ratio, config.seed, config.data.exif_orientation)
    resize = config.data.resize if name == "test" else None
    return crops.CentreCrop(size, resize or size, config.data.exif_orientation)


def first_images(config: ConfigDict, split: data.Images | data.Encoded) -> np.ndarray:
    """The first images of a split that can be read, a batch of them, uint8 [B, H, W, 3]; of encoded ones the middle.

    What cannot be read is named where training meets it.

    Raises:
        ValueError: Nothing can be read.
    """
    return _images(config, split, range(len(split)), config.batch_size)


def images_of_first_step(config: ConfigDict, split: data.Images | data.Encoded, most: int) -> np.ndarray:
    """The images of the first training step, without augmentation, `most` at most; the rest as in `first_images`."""
    (order,) = train_orders(config, split, 0, 1)
    return _images(config, split, order.indices, min(config.batch_size, most))


def train_orders(config: ConfigDict, split: data.Images | data.Encoded, first: int, last: int) -> Iterator[Order]:
    """The batches of training steps `first` to `last - 1` of a run with this config."""
    classes = balance.classes(config, split)
    return data.train_orders(config.seed, len(split), config.batch_size, first, last, classes)


def _images(
    config: ConfigDict, split: data.Images | data.Encoded, indices: Sequence[int] | np.ndarray, count: int
) -> np.ndarray:
    if isinstance(split, data.Images):
        return split.images[np.asarray(indices[:count])]
    size, images = config.data.image_size, []
    middle = crops.CentreCrop(size, size, config.data.exif_orientation)
    for index in indices:
        with contextlib.suppress(Exception):  # any file may be bad in any way
            images.append(middle(split.reader(split.reference(int(index)))[0]).copy())
        if len(images) == count:
            break
    if not images:
        first = split.name(int(indices[0]))
        raise ValueError(f"none of the {len(indices)} training images can be read, {first} the first")
    return np.stack(images)


def build(config: ConfigDict, dataset: data.Dataset, name: str, mesh: Mesh, folder: pathlib.Path | None) -> Loader:
    """The loader of the split "train" or "test", from where the config keeps the images.

    Args:
        config: Of the run.
        dataset: Of `open_data`.
        name: Of the split.
        mesh: Of the devices.
        folder: Gets skipped.jsonl; None for none.
    """
    split = getattr(dataset, name)
    classes = balance.classes(config, split, dataset) if name == "train" else None
    order = (config.batch_size, config.seed, mesh, classes)
    if isinstance(split, data.Images) and config.data.keep == "device":
        return DeviceLoader(split, *order)
    make = taken(split) if isinstance(split, data.Images) else _decoded(config, split, name, folder)
    return HostLoader(make, len(split), *order)


def taken(split: data.Images) -> Callable[[Iterator[Order]], Iterator[HostBatch]]:
    """Makes host batches of images in the host's memory."""
    return lambda orders: (split.take(order.indices) | {"mask": order.mask} for order in orders)


def _decoded(
    config: ConfigDict, split: data.Encoded, name: str, folder: pathlib.Path | None
) -> Callable[[Iterator[Order]], Iterator[HostBatch]]:
    """Makes host batches of encoded images; those that cannot be read are counted, and too many end the run."""
    size = config.data.image_size
    skipped = skips.Skips(name, split.name, len(split), config.data.max_skipped, folder)

    def batches(orders: Iterator[Order]) -> Iterator[HostBatch]:
        wanted: list[int] = []

        def counted() -> Iterator[Order]:
            for order in orders:
                wanted.append(int(order.mask.sum()))
                yield order

        made = stream.stream(
            split,
            transform(config, name),
            (size, size, 3),
            counted(),
            skipped,
            config.data.workers,
            config.data.ahead,
        )
        try:
            for number, batch in enumerate(made):
                skipped.check(int(batch["mask"].sum()), wanted[number])
                yield batch
        finally:
            made.close()

    return batches


# ---------------------------------------------------------------- the two loaders


class Loader:
    """Batches of one split, in the order of training or of an evaluation.

    Attributes:
        size: Examples of the split.
        batch_size: Examples of a batch, over all devices.
        seed: Of the order of training.
        classes: Of the split, where they are drawn equally in training; else None.
        waited: Seconds for which nothing was left to do for the device because a batch was not there yet.
    """

    def __init__(self, size: int, batch_size: int, seed: int, mesh: Mesh, classes: Classes | None = None):
        self.size, self.batch_size, self.seed, self.waited = size, batch_size, seed, 0.0
        self.classes = classes
        self.mesh, self._by_batch = mesh, sharding.by_batch(mesh)

    def train(self, first: int, last: int, idle: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """The batches of training steps `first` to `last - 1`.

        idle: tells whether the device has finished what it was given.
        """
        orders = data.train_orders(self.seed, self.size, self.batch_size, first, last, self.classes)
        return self._batches(orders, idle)

    def evaluate(self) -> Iterator[Batch]:
        """Batches in which every example stands once; the last one is filled up with masked ones."""
        devices = self.mesh.size
        batch_size = -(-self.batch_size // devices) * devices
        return self._batches(data.eval_orders(self.size, batch_size), lambda: False)

    def close(self) -> None:
        """Ends what is at work."""

    def _batches(self, orders: Iterator[Order], idle: Callable[[], bool]) -> Iterator[Batch]:
        raise NotImplementedError


class DeviceLoader(Loader):
    """Images in the device's memory, from which batches are gathered by index."""

    def __init__(self, split: data.Images, batch_size: int, seed: int, mesh: Mesh, classes: Classes | None = None):
        super().__init__(len(split), batch_size, seed, mesh, classes)
        examples = Batch(split.images, split.labels, np.ones(len(split), np.float32))
        self._examples: Batch = sharding.place(examples, sharding.replicated(mesh))

    def train_steps(self, first: int, count: int, length: int) -> Steps:
        """Training steps `first` to `first + count - 1` for one dispatch, in the shape of `length` steps."""
        indices = data.train_indices(self.seed, self.size, self.batch_size, first, count, self.classes)
        padded = np.zeros((length, self.batch_size), np.int32)
        padded[:count] = indices
        return Steps(self._examples, padded, np.int32(count))

    def _batches(self, orders: Iterator[Order], idle: Callable[[], bool]) -> Iterator[Batch]:
        del idle  # there is nothing to wait for
        for order in orders:
            yield step.gather(self._examples, order.indices, order.mask, mesh=self.mesh)


class HostLoader(Loader):
    """Batches that are made on the host, in a thread of its own, and sent to the devices ahead of their use.

    make: from orders to host batches; of each order a process makes the part of its own devices.
    """

    def __init__(
        self,
        make: Callable[[Iterator[Order]], Iterator[HostBatch]],
        size: int,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        classes: Classes | None = None,
    ):
        super().__init__(size, batch_size, seed, mesh, classes)
        self._make = make
        self._open: list[_Prefetch] = []

    def close(self) -> None:
        """Ends the threads, and the worker processes behind them."""
        for prefetch in list(self._open):
            prefetch.close()

    def _batches(self, orders: Iterator[Order], idle: Callable[[], bool]) -> Iterator[Batch]:
        prefetch = _Prefetch(self._make(self._shares(orders)), self._send)
        self._open.append(prefetch)
        try:
            while True:
                start = time.perf_counter()
                while (batch := prefetch.get(timeout=0.002)) is None:
                    now = time.perf_counter()
                    if idle():
                        self.waited += now - start
                    start = now
                if batch is _Prefetch.END:
                    return
                yield batch
        finally:
            prefetch.close()
            self._open.remove(prefetch)

    def _shares(self, orders: Iterator[Order]) -> Iterator[Order]:
        for order in orders:
            yield order.take(sharding.local_rows(self._by_batch, len(order.indices)))

    def _send(self, batch: HostBatch) -> Batch:
        size = len(batch["mask"]) * jax.process_count()  # every process has as many devices
        return Batch(**{name: sharding.from_local(self._by_batch, x, size) for name, x in batch.items()})


class _Prefetch:
    """Runs an iterator in a thread, `ahead` results before they are asked for."""

    END = object()

    def __init__(self, batches: Iterator[HostBatch], send: Callable[[HostBatch], Batch], ahead: int = 1):
        self._batches, self._send = batches, send
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nfjax-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for batch in self._batches:
                if not self._put(self._send(batch)):
                    break
            else:
                self._put(self.END)
        except BaseException as error:
            self._put(error)
        finally:
            if hasattr(self._batches, "close"):
                self._batches.close()  # here, because a generator may only be closed where it does not run

    def _put(self, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self, timeout: float) -> Any:
        """The next result, END after the last, None if there is none yet; raises what the iterator raised."""
        try:
            value = self._queue.get(timeout=timeout)
        except queue.Empty:
            if self._thread.is_alive() or not self._queue.empty():
                return None
            raise RuntimeError("the thread that makes batches has ended") from None
        if isinstance(value, BaseException):
            raise value
        return value

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
