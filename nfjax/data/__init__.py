"""Data sets as uint8 images, and the order in which they are visited.

A data set is one loader `(directory, image_size) -> Dataset` and one line in `DATASETS`. Its splits are arrays in
memory, or encoded images that `memory` decodes all at once and `stream` batch by batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from nfjax.data.loading.order import Order, epoch_end, eval_orders, train_indices, train_orders
from nfjax.data.sources import cifar, digits, folder, records, synthetic, tfds
from nfjax.data.splits import Dataset, Encoded, Images, check_classes

DATASETS: dict[str, Callable[[str, int], Dataset]] = {
    "digits": digits.load,
    "synthetic": synthetic.load,
    "folder": lambda directory, image_size: folder.load(directory),
    "records": lambda directory, image_size: records.load(directory),
    "cifar10": lambda directory, image_size: cifar.load_cifar10(directory),
    "cifar100": lambda directory, image_size: cifar.load_cifar100(directory),
}
# Loaders of many data sets, (name, directory) -> Dataset: the source is "<prefix>:<name>".
COLLECTIONS: dict[str, Callable[[str, str], Dataset]] = {"tfds": tfds.load}


def loader(source: str) -> Callable[[str, int], Dataset]:
    """The loader of that name in `DATASETS`, or of "<prefix>:<name>" in `COLLECTIONS`."""
    prefix, colon, name = source.partition(":")
    if colon and name and prefix in COLLECTIONS:
        return functools.partial(_of_collection, COLLECTIONS[prefix], name)
    if source not in DATASETS:
        known = ", ".join([*DATASETS, *(f"{prefix}:<name>" for prefix in COLLECTIONS)])
        raise ValueError(f"unknown data source {source!r}: expected one of {known}")
    return DATASETS[source]


def _of_collection(load: Callable[[str, str], Dataset], name: str, directory: str, image_size: int) -> Dataset:
    return load(name, directory)


def load(source: str, directory: str, image_size: int) -> Dataset:
    """Opens a data set by its source: a name in `DATASETS`, or "tfds:<name>".

    directory is read by those that keep files, image_size (pixels) by those that make their images up.
    """
    if image_size < 1:
        raise ValueError(f"data.image_size={image_size} must be a positive number of pixels")
    dataset = loader(source)(os.path.expanduser(directory), image_size)
    check_classes(dataset.class_names, f"the classes of {source} {directory}")
    for split in (dataset.train, dataset.test):
        if isinstance(split, Images) and split.images.shape[1:3] != (image_size, image_size):
            height, width = split.images.shape[1:3]
            raise ValueError(
                f"the images of {source} have {height}x{width} pixels: expected --config.data.image_size={height}"
            )
    return dataset


__all__ = [
    "COLLECTIONS",
    "DATASETS",
    "Dataset",
    "Encoded",
    "Images",
    "Order",
    "epoch_end",
    "eval_orders",
    "load",
    "loader",
    "train_indices",
    "train_orders",
]
