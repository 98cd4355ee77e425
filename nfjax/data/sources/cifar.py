"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their author publishes them: found in a directory, or downloaded there.

The archives hold pickles, which can run any code when they are read. Each file's checksum is compared with the
published one, and the unpickler used here can build numbers, texts, lists, dictionaries and arrays of bytes, and
nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import io
import math
import os
import pathlib
import pickle
import platform
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm

from nfjax import storage
from nfjax.data.splits import Dataset, Images

PAGE = "https://www.cs.toronto.edu/~kriz/"
BLOCK = 1 << 20
TIMEOUT = 60.0  # seconds without an answer
LARGEST = 200_000_000  # bytes; the archives have 170 MB, the largest file in them 155 MB


@dataclasses.dataclass(frozen=True)
class Archive:
    """Where a data set lies, as published.

    Attributes:
        title: For messages.
        file: The archive.
        folder: In which its files lie.
        train: The files of the training split.
        test: Those of the test split.
        names: The file of the class names.
        labels_key: Of the labels, in the files of the splits.
        names_key: Of the class names, in theirs.
        md5: Of the archive, and of each file in it.
    """

    title: str
    file: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    labels_key: bytes
    names_key: bytes
    md5: dict[str, str]


CIFAR10 = Archive(
    title="CIFAR-10",
    file="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    names="batches.meta",
    labels_key=b"labels",
    names_key=b"label_names",
    md5={
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100 = Archive(
    title="CIFAR-100",
    file="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    train=("train",),
    test=("test",),
    names="meta",
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
    md5={
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)


def load_cifar10(directory: str) -> Dataset:
    """50 000 training and 10 000 test images [32, 32, 3] in 10 classes, from `directory`; see `load`."""
    return load(CIFAR10, directory)


def load_cifar100(directory: str) -> Dataset:
    """50 000 training and 10 000 test images [32, 32, 3] in 100 classes, from `directory`; see `load`."""
    return load(CIFAR100, directory)


def found(directory: str) -> Callable[[str], Dataset] | None:
    """`load_cifar10` or `load_cifar100`, whose archive lies in `directory`; None where there is none."""
    for archive, loader in ((CIFAR10, load_cifar10), (CIFAR100, load_cifar100)):
        if any(os.path.exists(os.path.join(directory, name)) for name in (archive.file, archive.folder)):
            return loader
    return None


def load(archive: Archive, directory: str) -> Dataset:
    """Reads the unpacked folder in a directory, else the archive, which is downloaded where it is missing.

    Args:
        archive: Which data set.
        directory: Where it lies, or is to be downloaded to.

    Raises:
        ValueError: A file is not the published one.
        OSError: Downloading fails; the message says how to get the archive by hand.
    """
    if not directory:
        raise ValueError(
            f"no data directory given (--config.data.dir=DIR, of pack --dir=DIR): expected one with {archive.file}, "
            "or to download it to"
        )
    root = pathlib.Path(directory)
    if root.is_dir() and (root / archive.folder).is_dir():
        contents = _from_folder(archive, root / archive.folder)
    else:
        if not (root / archive.file).exists():
            _download(archive, root)
        contents = _from_tar(archive, root / archive.file)
    names = _field(archive, contents, archive.names, archive.names_key)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes) and name for name in names):
        raise ValueError(f"{archive.title}: {archive.names} names no classes. {_by_hand(archive)}")
    class_names = tuple(name.decode("utf-8", "backslashreplace") for name in names)
    if len(set(class_names)) != len(class_names):
        raise ValueError(f"{archive.title}: {archive.names} names a class twice. {_by_hand(archive)}")
    train, test = (_images(archive, contents, files, len(names)) for files in (archive.train, archive.test))
    digest = "-".join(archive.md5[name] for name in (*archive.train, *archive.test))
    return Dataset(train, test, class_names, fingerprint=lambda: hashlib.sha256(digest.encode()).hexdigest()[:16])


class _Dtype:
    """What stands for the type of an array in a pickle."""

    def __init__(self, name: Any, *others: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """What stands for an array in a pickle. NumPy's own, made from a state that lies, could read any memory."""

    values: np.ndarray | None = None  # of an array of bytes that agrees with itself

    def __init__(self, *arguments: Any) -> None:
        """What an empty one is made of."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        is_bytes = isinstance(dtype, _Dtype) and dtype.name in ("u1", b"u1") and isinstance(data, bytes)
        if is_bytes and all(type(size) is int and size >= 0 for size in shape) and math.prod(shape) == len(data):
            self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _PlainUnpickler(pickle.Unpickler):
    """Builds arrays of bytes, numbers, texts, lists and dictionaries, and refuses whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        wanted = (module.replace("numpy._core", "numpy.core"), name)
        if wanted in (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray")):
            return _Array
        if wanted == ("numpy", "dtype"):
            return _Dtype
        if wanted == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _unpickled(archive: Archive, name: str, data: bytes) -> dict[bytes, Any]:
    try:
        content = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # unpicklers raise nearly anything on corrupt bytes
        raise ValueError(f"{archive.title}: {name} cannot be read: {error}. {_by_hand(archive)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{archive.title}: {name} holds {type(content).__name__}, expected a dictionary")
    return content


def _field(archive: Archive, contents: dict[str, bytes], name: str, key: bytes) -> Any:
    content = _unpickled(archive, name, contents[name])
    if key not in content:
        raise ValueError(f"{archive.title}: {name} lacks {key.decode()}. {_by_hand(archive)}")
    return content[key]


def _images(archive: Archive, contents: dict[str, bytes], files: tuple[str, ...], num_classes: int) -> Images:
    images, labels = [], []
    for name in files:
        content = _unpickled(archive, name, contents[name])
        array, numbers = content.get(b"data"), content.get(archive.labels_key)
        pixels = array.values if isinstance(array, _Array) else None
        if (
            pixels is None
            or pixels.shape[1:] != (3072,)
            or not isinstance(numbers, list)
            or len(numbers) != len(pixels)
        ):
            raise ValueError(f"{archive.title}: {name} holds no images [N, 3072] with N labels. {_by_hand(archive)}")
        wrong = [label for label in numbers if type(label) is not int or not 0 <= label < num_classes]
        if wrong:
            raise ValueError(f"{archive.title}: {name} has the label {wrong[0]!r}: expected 0 to {num_classes - 1}")
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
    return Images(np.ascontiguousarray(np.concatenate(images)), np.array(labels, np.int32))


def _from_folder(archive: Archive, folder: pathlib.Path) -> dict[str, bytes]:
    contents = {}
    for name in (*archive.train, *archive.test, archive.names):
        try:
            contents[name] = storage.read_bytes(folder / name, f"unpack {archive.file} again")
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder} lacks the file {name}: unpack {archive.file} again") from None
        _check(archive, name, hashlib.md5(contents[name], usedforsecurity=False).hexdigest(), folder / name)
    return contents


def _from_tar(archive: Archive, file: pathlib.Path) -> dict[str, bytes]:
    if not storage.regular_file(file):
        raise ValueError(f"{file} is a folder, a pipe or a device: expected an archive. {_by_hand(archive)}")
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    _check(archive, archive.file, digest, file)
    wanted = {f"{archive.folder}/{name}": name for name in (*archive.train, *archive.test, archive.names)}
    contents = {}
    try:
        with tarfile.open(file) as tar:  # read in memory: nothing is unpacked to disk
            for member in tar:
                if member.isfile() and member.name in wanted:
                    if member.size > LARGEST:  # a few bytes can stand for any number of zeros
                        raise tarfile.TarError(f"{member.name} has {member.size:,} bytes, expected at most {LARGEST:,}")
                    contents[wanted[member.name]] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}. {_by_hand(archive)}") from error
    missing = sorted(set(wanted.values()) - contents.keys())
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}. {_by_hand(archive)}")
    return contents


def _check(archive: Archive, name: str, digest: str, file: pathlib.Path) -> None:
    if digest != archive.md5[name]:
        raise ValueError(
            f"{file} is not the published file: its MD5 is {digest}, expected {archive.md5[name]}; it is damaged or "
            f"incomplete. Remove it to have it downloaded again. {_by_hand(archive)}"
        )


def _by_hand(archive: Archive) -> str:
    return f"By hand: fetch {PAGE}{archive.file} and put it in the data directory"


def _download(archive: Archive, root: pathlib.Path) -> None:
    url, target = PAGE + archive.file, root / archive.file
    digest, copied = hashlib.md5(usedforsecurity=False), 0
    try:
        root.mkdir(parents=True, exist_ok=True)
        with storage.replacing(target, f"{platform.node()}-{os.getpid()}") as part:
            with (
                urllib.request.urlopen(url, timeout=TIMEOUT) as response,
                open(part, "wb") as out,
                tqdm.tqdm(
                    total=int(response.headers.get("Content-Length", 0)) or None,
                    desc=archive.file,
                    unit="B",
                    unit_scale=True,
                ) as bar,
            ):
                while block := response.read(BLOCK):
                    copied += len(block)
                    if copied > LARGEST:
                        raise ValueError(f"what comes has more than the {LARGEST:,} bytes that were expected at most")
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
            _check(archive, archive.file, digest.hexdigest(), part)
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise OSError(
            f"{archive.title} cannot be downloaded from {url} to {root}: {reason}. {_by_hand(archive)}"
        ) from error
