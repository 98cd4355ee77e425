"""Data sets as uint8 images, and the order in which they are visited.

A data set is one loader `(directory, image_size) -> Dataset` and one line in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable

from nfjax.data import digits, folder, synthetic
from nfjax.data.arrays import Dataset, Images, epoch_end, eval_indices, train_indices

DATASETS: dict[str, Callable[[str, int], Dataset]] = {
    "digits": digits.load,
    "synthetic": synthetic.load,
    "folder": folder.load,
}


def loader(source: str) -> Callable[[str, int], Dataset]:
    """The loader of that name in `DATASETS`."""
    if source not in DATASETS:
        raise ValueError(f"unknown data source {source!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[source]


def load(source: str, directory: str, image_size: int) -> Dataset:
    """Loads a data set by its name in `DATASETS`; `directory` is read by those that keep files."""
    if image_size < 1:
        raise ValueError(f"data.image_size={image_size} must be a positive number of pixels")
    return loader(source)(directory, image_size)


__all__ = ["DATASETS", "Dataset", "Images", "epoch_end", "eval_indices", "load", "loader", "train_indices"]
