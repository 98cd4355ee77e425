"""Folders of image files, listed at once and read one by one: nothing but the names is held in memory.

    DIR/train/<class>/*.jpg
    DIR/test/<class>/*.jpg     or DIR/val/<class>/*.jpg,
                               or DIR/val/*.JPEG with a file of labels beside it,
                                  see `nfjax.data.sources.labels`

Class names are the folder names, sorted, two at least. What is an image is told by the ending of its name, and where
that says nothing by its first bytes, see `nfjax.data.decoding.formats`; other files (Thumbs.db, lists, archives) are
left aside and counted by their ending, and those whose names begin with a dot are left alone. The orientation that a
camera has noted (EXIF) is ignored, as by Pillow and torchvision; --config.data.exif_orientation=True turns the images
upright. A directory that holds the CIFAR archives instead is read by `nfjax.data.sources.cifar`.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging

from nfjax.data.decoding import decode, formats
from nfjax.data.loading.skips import printable
from nfjax.data.sources import cifar, labels
from nfjax.data.splits import Dataset, check_classes, left_aside

TEST_NAMES = ("test", "val")
UNLABELLED_SHARE = 0.01
Reference = tuple[bytes, int]  # path relative to the root, label


class FileReader:
    """Reads an image file below a folder: (its bytes, label).

    Raises OSError where it cannot be read, BadImageError where it is too large to be an image.

    Attributes:
        root: The folder.
    """

    def __init__(self, root: str) -> None:
        self.root = os.fsencode(root)

    def __call__(self, reference: Reference) -> tuple[bytes, int]:
        path, label = reference
        # Opening a pipe that nobody writes to would wait for ever.
        with open(os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{printable(path)} is no regular file")
            if status.st_size > decode.MAX_BYTES:
                raise decode.BadImageError("too large", f"{status.st_size} bytes, at most {decode.MAX_BYTES} are read")
            return stream.read(), label


class Files:
    """A split: paths below `root`, kept as one array of bytes, and a label each."""

    def __init__(self, root: str, paths: Iterator[Reference]) -> None:
        self.reader = FileReader(root)
        names, ends, numbers = bytearray(), _Numbers(np.int64), _Numbers(np.int32)
        for path, label in paths:
            names += path
            ends.append(len(names))
            numbers.append(label)
        self._names, self._ends, self.labels = bytes(names), ends.array(), numbers.array()

    def __len__(self) -> int:
        return len(self.labels)

    def reference(self, index: int) -> Reference:
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]], int(self.labels[index])

    def name(self, index: int) -> str:
        return printable(self.reference(index)[0])


def load(directory: str) -> Dataset:
    """Lists `directory/train` and `directory/test` (or `val`).

    A class of train that test lacks is a warning, and so are class folders that look as if the classes were below them.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: It has another layout; the message names the folder, and the
            layout expected.
    """
    if not directory:
        raise ValueError(
            "no data directory given; set it with --config.data.dir=DIR (of pack: --dir=DIR), where DIR has the layout "
            "DIR/{train,test}/<class>/*.jpg"
        )
    root = pathlib.Path(directory)
    expected = (
        f"expected the layout\n  {root}/train/<class>/*.jpg\n  {root}/test/<class>/*.jpg   "
        f"(or {root}/val/<class>/*.jpg, or {root}/val/*.JPEG with a file of labels)"
    )
    if not root.exists():
        raise FileNotFoundError(f"the data directory {root} does not exist; {expected}")
    if not root.is_dir():
        raise NotADirectoryError(f"the data directory {root} is a file; {expected}")
    test_name = _test_folder(root)
    if not (root / "train").is_dir() and (load_cifar := cifar.found(directory)):
        return load_cifar(directory)
    if not (root / "train").is_dir() or test_name is None:
        missing = "train" if not (root / "train").is_dir() else "test (or val)"
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"the data directory {root} has no folder {missing}: it holds {found}; {expected}{_elsewhere(root)}"
        )

    class_names = _classes(root / "train")
    if not class_names:
        raise FileNotFoundError(f"{root / 'train'} has no class folders; {expected}")
    aside: collections.Counter[str] = collections.Counter()
    train = Files(directory, _images(root, _listed(root, "train", class_names), aside))
    test_classes, skipped = _classes(root / test_name), {}
    if test_classes:
        _check_known(root, test_name, test_classes, class_names)
        test = Files(directory, _images(root, _listed(root, test_name, class_names, test_classes), aside))
    else:
        names = {os.fsencode(name) for name in labels.file_names(test_name)}
        below = (path for path in _walk(os.fsencode(root / test_name), b"") if path not in names)
        below = ((os.fsencode(test_name) + b"/" + path, 0) for path in below)
        flat = [os.path.basename(path) for path, _ in _images(root, below, aside)]
        if not flat:
            raise FileNotFoundError(f"{root / test_name} has no class folders and no files; {expected}{_left(aside)}")
        numbers, skipped = labels.of_flat_folder(root, test_name, flat, class_names)
        if len(skipped) > UNLABELLED_SHARE * len(flat):
            raise ValueError(
                f"{len(skipped)} of the {len(flat)} files in {root / test_name} have no label, more than "
                f"{UNLABELLED_SHARE:.0%}: {', '.join(list(skipped)[:5])}; {next(iter(skipped.values()))}"
            )
        prefix = os.fsencode(test_name) + b"/"
        test = Files(directory, ((prefix + name, numbers[name]) for name in flat if name in numbers))
    for split, listed in (("train", train), (test_name, test)):
        if not len(listed):
            raise FileNotFoundError(
                f"{root / split} has class folders but no files in them that are images; {expected}{_left(aside)}"
            )
    too_deep = _one_level_too_deep(root, class_names)
    check_classes(class_names, f"the class folders of {root / 'train'}", too_deep)
    _check_none_empty(root, train, class_names)
    if too_deep:
        logging.warning("%s", too_deep)
    _warn_of_missing(root / test_name, test, class_names)
    if aside:
        logging.info("%s%s", root, _left(aside))
    fingerprint = functools.partial(_fingerprint, root, (train, test))
    return Dataset(train, test, class_names, skipped, fingerprint, dict(aside))


def of_class_folders(directory: str, class_names: Sequence[str]) -> Files:
    """The images of `directory/<class>`, with the labels of a network's classes; some of these may have no folder.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: There is no such folder, no image in it, or a folder of no
            class.
    """
    root = pathlib.Path(directory)
    expected = f"expected the layout {root}/<class>/*.jpg"
    if not root.exists():
        raise FileNotFoundError(f"the folder {root} does not exist; {expected}")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; {expected}")
    found = _classes(root)
    if unknown := [name for name in found if name not in class_names]:
        splits = [name for name in ("train", *TEST_NAMES) if name in unknown]
        hint = f"\ndid you mean {root / splits[-1]}?" if splits else ""
        raise ValueError(
            f"{root} has folders of no class of the network: {', '.join(map(printable, unknown[:8]))}"
            f"{' and more' if len(unknown) > 8 else ''}; it knows {', '.join(class_names[:8])}"
            f"{f' and {len(class_names) - 8} more' if len(class_names) > 8 else ''}{hint}"
        )
    aside: collections.Counter[str] = collections.Counter()
    files = Files(directory, _images(root, _listed(root, "", tuple(class_names), found), aside))
    if not len(files):
        raise FileNotFoundError(f"{root} has no images in folders of its classes; {expected}{_left(aside)}")
    return files


def images_below(directory: str, aside: collections.Counter[str]) -> Iterator[bytes]:
    """The paths of the images in a folder and in those below it, relative to it and sorted, whatever their classes.

    Args:
        directory: The folder.
        aside: Counts the files that are no images, by their ending.
    """
    listed = ((path, 0) for path in _walk(os.fsencode(directory), b""))
    return (path for path, _ in _images(pathlib.Path(directory), listed, aside))


def _test_folder(root: pathlib.Path) -> str | None:
    """Which of `TEST_NAMES` is there: with class folders, else with labels of its own, else val, for Kaggle's copy of
    ImageNet has a flat test folder whose labels nobody published.
    """
    there = [name for name in TEST_NAMES if (root / name).is_dir()]
    by_class = [name for name in there if _classes(root / name)]
    labelled = [name for name in there if labels.has_its_own(root, name)]
    return next(iter(by_class + labelled + there[::-1]), None)


def _images(root: pathlib.Path, listed: Iterable[Reference], aside: collections.Counter[str]) -> Iterator[Reference]:
    """Those that are images; the others are counted by their ending."""
    folder = os.fsencode(root)
    for path, label in listed:
        if formats.is_image(os.path.join(folder, path)):
            yield path, label
        else:
            aside[printable(formats.ending(path)) or "no ending"] += 1


def _left(aside: collections.Counter[str]) -> str:
    return f"; {left_aside(aside)}" if aside else ""


def _one_level_too_deep(root: pathlib.Path, class_names: tuple[str, ...]) -> str:
    """Names the class folders that hold several folders and no image of their own: are those the classes?"""
    found = {}
    for name in class_names:
        folders, images = [], False
        with os.scandir(root / "train" / name) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.append(entry.name)
                elif formats.is_image(entry.path):
                    images = True
                    break
        if len(folders) > 1 and not images:
            found[name] = sorted(folders)
    if not found:
        return ""
    examples = "; ".join(
        f"{root / 'train' / name} holds {', '.join(folders[:4])}{' and more' if len(folders) > 4 else ''}"
        for name, folders in list(found.items())[:3]
    )
    return (
        f"{len(found)} of {len(class_names)} class folders hold only folders, whose images count as one class: "
        f"{examples}. If those are the classes, move them to {root / 'train'}/<class>"
        f"{''.join(_did_you_mean(root / 'train' / name for name in found))}"
    )


def _elsewhere(root: pathlib.Path) -> str:
    """Where the layout is instead: one level below, or above."""
    above = [root.parent] if root.name in ("train", *TEST_NAMES) else []
    return _did_you_mean([*(path for path in sorted(root.iterdir()) if not path.name.startswith(".")), *above])


def _did_you_mean(places: Iterable[pathlib.Path]) -> str:
    there = [place for place in places if (place / "train").is_dir()]
    return "".join(f"\ndid you mean --config.data.dir={place}?" for place in there[:3])


class _Numbers:
    """A growing array: a list of a million Python numbers takes ten times the memory."""

    def __init__(self, dtype: type) -> None:
        self._buffer, self._size = np.empty(1024, dtype), 0

    def append(self, number: int) -> None:
        if self._size == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._size] = number
        self._size += 1

    def array(self) -> np.ndarray:
        return self._buffer[: self._size].copy()


def _classes(split: pathlib.Path) -> tuple[str, ...]:
    with os.scandir(split) as entries:
        return tuple(sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)))


def _listed(
    root: pathlib.Path, split: str, class_names: tuple[str, ...], present: tuple[str, ...] | None = None
) -> Iterator[Reference]:
    numbers = {name: label for label, name in enumerate(class_names)}
    for name in class_names if present is None else present:
        prefix = os.fsencode(os.path.join(split, name)) + b"/"
        for path in _walk(os.path.join(os.fsencode(root), prefix[:-1]), prefix):
            yield path, numbers[name]


def _walk(folder: bytes, prefix: bytes, visited: set[bytes] | None = None) -> Iterator[bytes]:
    """prefix + the path of each file in a folder, sorted, then of those in its subfolders; links are followed once, and
    not to a folder that this one lies in, whose images are not all of this class.
    """
    real = os.path.realpath(folder)
    if visited is None:
        visited = {os.fsencode(above) for above in pathlib.Path(os.fsdecode(real)).parents}
    if real in visited:  # a link to where the walk has been
        return
    visited.add(real)
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(b"."):
                (folders if _is_folder(entry) else files).append(entry.name)
    for name in sorted(files):
        yield prefix + name
    for name in sorted(folders):
        yield from _walk(os.path.join(folder, name), prefix + name + b"/", visited)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle: listed as a file, it is named when it is read
        return False


def _check_known(root: pathlib.Path, split: str, found: tuple[str, ...], class_names: tuple[str, ...]) -> None:
    unknown = sorted(set(found) - set(class_names))
    if unknown:
        raise ValueError(
            f"{root / split} has class folders that {root / 'train'} lacks: {', '.join(unknown[:8])}"
            f"{' and more' if len(unknown) > 8 else ''}; a network cannot predict a class it never sees: add them to "
            "train, or remove them"
        )


def _check_none_empty(root: pathlib.Path, train: Files, class_names: tuple[str, ...]) -> None:
    counts = np.bincount(train.labels, minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"{root / 'train'} has class folders without files: {', '.join(empty[:8])}"
            f"{' and more' if len(empty) > 8 else ''}; fill or remove them"
        )


def _warn_of_missing(split: pathlib.Path, files: Files, class_names: tuple[str, ...]) -> None:
    counts = np.bincount(files.labels, minlength=len(class_names))
    missing = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        logging.warning("%s has no image of %d classes: %s%s", split, len(missing), ", ".join(missing[:8]), more)


def _fingerprint(root: pathlib.Path, splits: tuple[Files, ...]) -> str:
    """Of names, labels, sizes and times. A file that was made anew may have the size of the one before, and its time of
    modification is whatever a program sets it to; the time of change (of a POSIX file system) is set by nobody.
    """
    digest = hashlib.sha256(os.fsencode(f"3 {root.resolve()}"))
    for files in splits:
        for index in range(len(files)):
            path, label = files.reference(index)
            try:
                status = os.stat(os.path.join(files.reader.root, path))
                times = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
                digest.update(path + f" {label} {status.st_size} {times}\n".encode())
            except OSError:  # a link to nowhere: reading will skip and name it
                digest.update(path + b" unreadable\n")
    return digest.hexdigest()[:16]
