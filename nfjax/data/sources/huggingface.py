"""Image classification sets of the Hugging Face Hub, or such as `datasets` has saved.

The images stay as their files hold them, JPEG or PNG, and are decoded like all others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

from nfjax.data.sources.folder import FileReader
from nfjax.data.sources.sequences import from_sequences
from nfjax.data.splits import Dataset, check_classes

INSTALL = 'pip install "nfjax[huggingface]"'
TEST_NAMES = ("test", "validation", "valid", "val")


class Rows:
    """A split of a data set of `datasets` as a sequence of (the bytes of an image file, label)."""

    def __init__(self, rows: Any, image: str, label: str) -> None:
        """Takes two columns.

        Args:
            rows: A `datasets.Dataset`.
            image: The name of its column of images.
            label: The name of its column of labels.
        """
        from datasets import Image

        self._rows = rows.select_columns([image, label]).cast_column(image, Image(decode=False))
        self._image, self._label, self._read = image, label, FileReader("")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        row = self._rows[index]
        image = row[self._image]
        if image["bytes"] is not None:
            return image["bytes"], row[self._label]
        # A folder of images is kept by its paths.
        return self._read((os.fsencode(image["path"]), row[self._label]))


def load(name: str, directory: str = "", label: str | None = None) -> Dataset:
    """A data set with splits train, and test or validation, one column of images, and a column of classes.

    Args:
        name: On the Hub, such as "uoft-cs/cifar10", with ":config" behind it where there are several; or a local
            directory: of `save_to_disk`, or whatever else `datasets.load_dataset` takes.
        directory: Where what comes from the Hub is kept; empty for the place that `datasets` keeps it in.
        label: The column of classes; by default "label", or the only one.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: There is no such data set, here or on the Hub, or it lacks a split.
        ValueError: It has no such columns.
    """
    splits = _opened(name, directory)
    tests = [split for split in TEST_NAMES if split in splits and len(splits[split])]
    if "train" not in splits or not tests:
        found = ", ".join(f"{split} ({len(rows)})" for split, rows in splits.items())
        raise FileNotFoundError(
            f"huggingface:{name} has the splits {found}: expected train, and {' or '.join(TEST_NAMES)}. One can be "
            "divided by its train_test_split() and saved by save_to_disk(DIR), for huggingface:DIR"
        )
    train, *others = (splits[split] for split in ("train", *tests))
    image, label = _columns(name, train.features, label)
    class_names = tuple(train.features[label].names)
    check_classes(class_names, f"the classes of huggingface:{name}")
    # The labels of a competition's test split may be secret, -1.
    test = next((rows for rows in others if len(rows) and rows[0][label] != -1), others[0])
    _, test_label = _columns(f"{name} (its test split)", test.features, label)
    if tuple(test.features[test_label].names) != class_names:
        raise ValueError(f"huggingface:{name} has other classes, or another order of them, in test than in train")
    dataset = from_sequences(Rows(train, image, label), Rows(test, image, label), class_names)
    return dataclasses.replace(dataset, fingerprint=lambda: _fingerprint(train, test))


def _opened(name: str, directory: str) -> Any:
    """{split: rows}, a `datasets.DatasetDict`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"the source huggingface:{name} needs a package more: {INSTALL} ({error})") from error
    local = os.path.expanduser(name)
    if os.path.exists(os.path.join(local, "dataset_dict.json")):
        opened = datasets.load_from_disk(local)
    elif os.path.exists(os.path.join(local, "state.json")):
        opened = datasets.DatasetDict({"train": datasets.load_from_disk(local)})
    else:
        path, _, config = (local, "", "") if os.path.isdir(local) else name.partition(":")
        try:
            opened = datasets.load_dataset(path, config or None, cache_dir=directory or None)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"huggingface:{name} cannot be opened: {error}. Expected the name of a data set on the Hub, which is "
                "fetched where it is not there yet, or a local directory that datasets.load_dataset or "
                "datasets.load_from_disk opens"
            ) from error
    return opened


def _columns(name: str, features: Any, label: str | None) -> tuple[str, str]:
    """The names of the columns of images and of classes."""
    import datasets

    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    wanted = [key for key in classes if key == (label or "label")] or (classes if label is None else [])
    if len(images) != 1 or len(wanted) != 1:
        has = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise ValueError(
            f"huggingface:{name} has the columns {has}: expected one Image, and one ClassLabel"
            f"{f' named {label}' if label else ', or one of them named label'}; of several, a source of your own can "
            "choose: nfjax.data.sources.huggingface.load(NAME, label=COLUMN)"
        )
    return images[0], wanted[0]


def _fingerprint(*splits: Any) -> str:
    """Of what `datasets` says of its contents, and of the files that hold them."""
    digest = hashlib.sha256()
    for rows in splits:
        digest.update(f"{rows._fingerprint} {len(rows)}\n".encode())
        for file in rows.cache_files:
            status = os.stat(file["filename"])
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
