"""Data sets as uint8 images, where they come from, and the order in which they are visited.

A source is a function `(directory, image_size) -> Dataset`: one line in `DATASETS`, or "package.module:function". The
splits of a `Dataset` are arrays in memory, `Images`, or images as their files hold them, `Encoded`, which are decoded
all at once, or batch by batch in worker processes. `from_sequences` makes a `Dataset` of anything that has `__len__`
and `__getitem__`.
"""

from __future__ import annotations

from nfjax.data.loading.order import Classes, Order, epoch_end, eval_orders, train_indices, train_orders
from nfjax.data.sources import COLLECTIONS, DATASETS, load, loader
from nfjax.data.sources.sequences import from_sequences
from nfjax.data.splits import Dataset, Encoded, Images

__all__ = [
    "COLLECTIONS",
    "DATASETS",
    "Classes",
    "Dataset",
    "Encoded",
    "Images",
    "Order",
    "epoch_end",
    "eval_orders",
    "from_sequences",
    "load",
    "loader",
    "train_indices",
    "train_orders",
]


def __dir__() -> list[str]:
    return __all__
