"""Where images come from: one file for each source, imported when it is first asked for.

A new source is a function `(directory, image_size) -> Dataset` and one line in `DATASETS`; one of many data sets, such
as a catalogue, a function `(name, directory) -> Dataset` and one line in `COLLECTIONS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from nfjax import _names
from nfjax.data.splits import Dataset, Images, check_classes

Loader = Callable[[str, int], Dataset]  # (directory, pixels of a side of the images that it makes up)


def _file(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


DATASETS: dict[str, Loader] = {
    "digits": lambda directory, image_size: _file("digits").load(image_size),
    "synthetic": lambda directory, image_size: _file("synthetic").load(image_size),
    "folder": lambda directory, image_size: _file("folder").load(directory),
    "records": lambda directory, image_size: _file("records").load(directory),
    "cifar10": lambda directory, image_size: _file("cifar").load_cifar10(directory),
    "cifar100": lambda directory, image_size: _file("cifar").load_cifar100(directory),
}
# Of many data sets, (name, directory) -> Dataset: the source is "<prefix>:<name>".
COLLECTIONS: dict[str, Callable[[str, str], Dataset]] = {
    "tfds": lambda name, directory: _file("tfds").load(name, directory),
    "huggingface": lambda name, directory: _file("huggingface").load(name, directory),
}


def loader(source: str | Loader) -> Loader:
    """What opens the data sets of a source.

    Args:
        source: A name in `DATASETS`; "<prefix>:<name>" with a prefix in `COLLECTIONS`; "package.module:function" of a
            function `(directory, image_size) -> Dataset` of your own, whose module is looked for in the current folder
            first; or such a function.

    Returns:
        `(directory, image_size) -> Dataset`, where image_size, in pixels, is for images that are made up. It raises
        ValueError where the source gives something else, besides all that the source raises.

    Raises:
        ValueError: There is no such source; the message lists those that there are.
    """
    function = _function(source)

    def opened(directory: str, image_size: int) -> Dataset:
        dataset = _opened(source, function, directory, image_size)
        _check_splits(source, dataset)
        return dataset

    return opened


def _function(source: str | Loader) -> Loader:
    collections = [f"{prefix}:<name>" for prefix in COLLECTIONS]
    known = {**DATASETS, **dict.fromkeys([*collections, "package.module:function"])}
    if callable(source) or source in DATASETS:
        return _names.lookup("data source", source, DATASETS)
    prefix, _, name = source.partition(":")
    if not name:
        return _names.lookup("data source", source, known, callables=False)
    if prefix in COLLECTIONS:
        return lambda directory, image_size: COLLECTIONS[prefix](name, directory)
    try:
        return _names.imported("data.source", source)
    except ValueError as error:
        raise ValueError(f"{error}; the sources that come along are {', '.join(DATASETS)}") from None


def _opened(source: str | Loader, function: Loader, directory: str, image_size: int) -> Dataset:
    dataset = function(directory, image_size)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"the data source {source} gives {type(dataset).__name__}: expected an nfjax.data.Dataset, such as "
            "nfjax.data.from_sequences(train, test, class_names) makes"
        )
    if not isinstance(dataset.class_names, tuple):
        dataset = dataclasses.replace(dataset, class_names=tuple(dataset.class_names))
    return dataset


def _check_splits(source: str | Loader, dataset: Dataset) -> None:
    """Raises ValueError unless both splits are images in memory, or have the members of `Encoded`."""
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        if not all(hasattr(split, member) for member in ("__len__", "reader", "reference", "name")):
            _check_images(source, name, split, len(dataset.class_names))


def _check_images(source: str | Loader, name: str, split: Any, num_classes: int) -> None:
    """Raises ValueError unless a split is made of images in memory, and of labels that are numbers of classes."""
    if not isinstance(split, Images):
        raise ValueError(
            f"{name} of the data source {source} is {type(split).__name__}: expected nfjax.data.Images, or what "
            "nfjax.data.from_sequences(train, test, class_names) makes of it"
        )
    if not len(split):
        raise ValueError(f"{name} of the data source {source} has no images")
    labels = np.asarray(split.labels)
    numbers = labels.dtype.kind in "iu" and labels.ndim == 1
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes)) if numbers else [0]
    if len(wrong):
        raise ValueError(
            f"{name} of the data source {source} has labels {labels.dtype} {list(labels.shape)}, label {wrong[0]} is "
            f"{labels[wrong[0]]}: expected int32 [{len(split)}], from 0 to {num_classes - 1}"
        )


def load(source: str | Loader, directory: str | os.PathLike[str], image_size: int) -> Dataset:
    """Opens a data set.

    Args:
        source: See `loader`.
        directory: For sources that keep files; ~ is the home directory.
        image_size: Height and width in pixels, for those that make their images up. What is in memory already must
            have that size; what is decoded gets it later.

    Raises:
        ValueError: There is no such source, image_size is not positive, images in memory have another size, or there
            are fewer than two classes.
        OSError: Files are missing or cannot be read.
        ImportError: The source needs a package that is not installed; the message names it.
    """
    if image_size < 1:
        raise ValueError(f"data.image_size={image_size} must be a positive number of pixels")
    dataset = _opened(source, _function(source), os.path.expanduser(directory), image_size)
    check_classes(dataset.class_names, f"the classes of {source} {directory}")
    _check_splits(source, dataset)
    for split in (dataset.train, dataset.test):
        if isinstance(split, Images) and split.images.shape[1:3] != (image_size, image_size):
            height, width = split.images.shape[1:3]
            raise ValueError(
                f"the images of {source} have {height}x{width} pixels: expected "
                f"{f'--config.data.image_size={height}' if height == width else 'as many rows as columns'}"
            )
    return dataset
