"""Image classification sets of TensorFlow Datasets, read without TensorFlow.

tfds reads a set at random, and without TensorFlow, where it was prepared in the format array_record. Preparing needs
TensorFlow, once; the errors here say how. The images stay encoded: JPEG, or PNG for small ones such as CIFAR.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from nfjax import storage
from nfjax.data import remote
from nfjax.data.sources import array_records
from nfjax.data.splits import Dataset, Numbered, check_classes

TEST_NAMES = ("test", "validation")
FORMAT = "array_record"
METADATA = ("dataset_info.json", "features.json")
AGAIN = "copy it again, or prepare it again"
INSTALL = 'pip install "nfjax[prepare]"'
VERSION_NAME = re.compile(r"\d+\.\d+\.\d+")
# The Python classes that metadata may name: tfds imports the module of any that it does not know.
OWN_CLASS = re.compile(r"tensorflow_datasets\.core\.features(\.\w+)+")


class TfdsReader:
    """Reads example n of a split of a prepared data set: (image bytes, label).

    Raises ValueError that names the example where its hash does not match, where it cannot be parsed or where its label
    is out of range; OSError where its shard cannot be opened.
    """

    def __init__(self, name: str, directory: str, split: str, num_classes: int) -> None:
        self._name, self._directory, self._split, self._num_classes = name, directory, split, num_classes
        self._source: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}  # open files belong to the process that opened them

    def name(self, index: int) -> str:
        return f"{self._name} {self._split} example {index}"

    def __call__(self, reference: int) -> tuple[bytes, int]:
        if self._source is None:
            self._source = _open(self._directory, self._split)
        source, parse = self._source
        data = array_records.read(source, reference, self.name)
        try:
            example = parse(data)
            image, label = example["image"], example["label"]
        except Exception as error:  # of protobuf, or whatever tfds stumbles over
            raise ValueError(f"{self.name(reference)} cannot be parsed: {error!r}") from error
        if not isinstance(image, bytes):
            raise ValueError(f"{self.name(reference)} holds no encoded image")
        array_records.check_label(label, self._num_classes, lambda: self.name(reference))
        return image, label


def load(name: str, directory: str) -> Dataset:
    """A prepared data set with the splits train, and test or validation.

    Args:
        name: Of tensorflow-datasets, with `/config` and `:version` where needed.
        directory: Below which it lies as tfds lays it out, local or in a bucket (copied to the local disk first, see
            `remote.mirror`); empty for tfds's own default.

    Raises:
        FileNotFoundError, ValueError: It is missing, damaged, or prepared otherwise; the message has the command that
            prepares it.
        ImportError: tensorflow-datasets is not installed.
    """
    builder_dir = _prepared(name, directory)
    info = _builder(builder_dir).info
    _check_features(name, info.features)
    if FORMAT not in {file_format.value for file_format in info.available_file_formats()}:
        raise ValueError(
            f"{builder_dir} is prepared as {info.file_format.value}, which cannot be read at random: move it away, or "
            f"choose another directory, and prepare it as {FORMAT}. {_how(name, directory)}"
        )
    if remote.is_remote(builder_dir):
        builder_dir = _mirror(builder_dir)
    info = _builder(builder_dir, FORMAT).info
    class_names = _class_names(builder_dir, info.features["label"])
    check_classes(class_names, f"the classes of tfds:{name}")

    def split(of: str) -> Numbered:
        _check_shards(name, builder_dir, info.splits[of])
        return Numbered(TfdsReader(name, builder_dir, of, len(class_names)), info.splits[of].num_examples)

    sizes = {key: info.splits[key].num_examples for key in info.splits}
    if not sizes.get("train"):
        raise ValueError(f"tfds:{name} has no split train with examples: it has {_listed(sizes)}")
    tests = [split(key) for key in TEST_NAMES if sizes.get(key)]
    if not tests:
        raise ValueError(f"tfds:{name} has no split {' or '.join(TEST_NAMES)} with examples: it has {_listed(sizes)}")
    test = tests[-1] if len(tests) > 1 and not _has_labels(tests[0]) else tests[0]
    version = _fingerprint(builder_dir, times=False)
    return Dataset(
        split("train"), test, class_names, fingerprint=lambda: _fingerprint(builder_dir, True), version=version
    )


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{split} ({size})" for split, size in sizes.items()) or "none"


def _has_labels(test: Numbered) -> bool:
    """False for splits such as ImageNet's test, whose labels are secret, -1."""
    try:
        test.reader(test.reference(0))
    except ValueError as error:
        logging.info("the split validation stands in for test: %s", error)
        return False
    return True


def _how(name: str, directory: str) -> str:
    where = f"data_dir={directory!r}, " if directory else ""
    return (
        "Once, where TensorFlow may be installed:\n"
        f"  {INSTALL}\n"
        f'  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, {where}file_format='{FORMAT}').download_and_prepare()\"\n"
        "ImageNet must be fetched by hand first: see https://www.tensorflow.org/datasets/catalog/imagenet2012. "
        "Reading needs no TensorFlow."
    )


def _prepared(name: str, directory: str) -> str:
    """Where the newest prepared version of the data set lies."""
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:[\w.*]+)?", name):
        raise ValueError(f"tfds:{name} names no data set: expected tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION")
    try:
        from tensorflow_datasets.core import read_only_builder, registered
    except ImportError as error:
        raise ImportError(
            f'the source tfds:{name} needs a package more: pip install "nfjax[tfds]" ({error})'
        ) from error
    if directory:
        root = remote.path(directory)
        if not root.exists():
            raise FileNotFoundError(f"the data directory {directory} does not exist. {_how(name, directory)}")
    _check_metadata(name, directory)
    try:
        keywords = {"data_dir": directory} if directory else {}
        return os.fspath(read_only_builder.builder_from_files(name, **keywords).data_dir)
    except registered.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{directory or 'the default directory of tfds'} holds no prepared data set {name}: expected "
            f"{directory or '~/tensorflow_datasets'}/{name.replace(':', '/')}/…/{METADATA[0]}. {_how(name, directory)}"
        ) from error
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise _unreadable(f"tfds:{name} in {directory or 'the default directory of tfds'}", error) from error


def _check_metadata(name: str, directory: str) -> None:
    """Raises ValueError where the metadata of any version of the data set is damaged, or names Python classes that are
    not tfds's own. Before tfds sees them: it would import the modules of these, and so run what is in them.
    """
    from tensorflow_datasets.core.utils import file_utils

    for root in file_utils.list_data_dirs(given_data_dir=directory or None):
        for level in ("*", "*/*"):  # of versions, and of configs with versions
            for folder in (remote.path(os.fspath(root)) / re.match(r"\w+", name)[0]).glob(level):
                if VERSION_NAME.fullmatch(folder.name) and (folder / METADATA[1]).exists():
                    for file in METADATA:
                        _check_classes(folder / file)


def _check_classes(file: Any) -> None:
    try:
        found = storage.read_json(file, dict[str, Any], AGAIN)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing: {AGAIN}") from error
    for named in _named_classes(found, legacy=file.name == METADATA[1]):
        if not OWN_CLASS.fullmatch(named):
            raise storage.DamagedFileError(
                f"{file} names the Python class {named!r}: expected one of tensorflow_datasets.core.features, others "
                "are not imported; prepare the data set with features of tfds"
            )


def _named_classes(content: dict[str, Any], legacy: bool) -> Iterator[str]:
    """Every class that tfds might look up in a JSON object. legacy: also where it was called "type"."""
    keys = ("pythonClassName", "python_class_name", *(["type"] if legacy else []))
    waiting: list[Any] = [content]
    while waiting:  # not by recursion, which is deeper than Python allows where somebody wants it to be
        value = waiting.pop()
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, (dict, list)):
                waiting.append(inner)
            elif isinstance(inner, str) and key in keys:
                yield inner
            elif isinstance(inner, str) and key == "json":  # JSON within JSON
                try:
                    waiting.append([json.loads(inner)])
                except (ValueError, RecursionError):
                    continue  # tfds cannot read it either


def _class_names(builder_dir: str, label: Any) -> tuple[str, ...]:
    """Read here, because tfds takes a damaged file for none, and its classes for numbers."""
    file = remote.path(builder_dir) / "label.labels.txt"
    try:
        lines = storage.read_bytes(file, AGAIN).decode().split("\n")
    except FileNotFoundError:  # of classes that are numbers
        names = list(label.names)
    except UnicodeDecodeError as error:
        raise storage.DamagedFileError(
            f"{file} is damaged: byte {error.start} is no UTF-8 text, expected a class in each line; {AGAIN}"
        ) from error
    else:
        names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) != len(names) or len(names) != label.num_classes:
        raise storage.DamagedFileError(
            f"{file} names {len(names)} classes, {len(set(names))} of them different: expected the "
            f"{label.num_classes} of {METADATA[1]}; {AGAIN}"
        )
    return tuple(names)


def _check_shards(name: str, builder_dir: str, split: Any) -> None:
    """Raises ValueError, FileNotFoundError unless the shards lie in `builder_dir`, each once, with so many examples."""
    files, lengths = [os.fspath(file) for file in split.filepaths], list(split.shard_lengths)
    where = f"{builder_dir}/{METADATA[0]}"
    for file in files:
        folder, _, base = file.rpartition("/")
        if folder != builder_dir.rstrip("/"):
            raise storage.DamagedFileError(f"{where} names the shard {file!r}: expected one in {builder_dir}; {AGAIN}")
        storage.plain_name(base, where)
    if len(set(files)) != len(files) or len(lengths) != len(files) or any(length < 0 for length in lengths):
        raise storage.DamagedFileError(
            f"{where} counts {lengths} examples in the shards {[os.path.basename(file) for file in files]} of "
            f"{split.name}: expected a number of each; {AGAIN}"
        )
    if remote.is_remote(builder_dir):
        return
    for file in files:
        if not os.path.exists(file):
            raise FileNotFoundError(f"{file} is missing, a part of {name}: copy it, or prepare it again")
        if not storage.regular_file(pathlib.Path(file)):
            raise storage.DamagedFileError(f"{file} is a folder, a pipe or a device: expected a shard; {AGAIN}")
    array_records.check_counts(zip(files, lengths, strict=True), AGAIN)


def _unreadable(what: str, error: Exception) -> storage.DamagedFileError:
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return storage.DamagedFileError(f"the metadata of {what} cannot be read by tfds ({reason}): {AGAIN}")


def _builder(builder_dir: str, file_format: str | None = None) -> Any:
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_directory(builder_dir, file_format=file_format)
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise _unreadable(builder_dir, error) from error


def _open(builder_dir: str, split: str) -> tuple[Any, Callable[[bytes], dict[str, Any]]]:
    """The serialized examples of a split, and what makes {"image": encoded bytes, "label": int, …} of one."""
    from tensorflow_datasets.core import decode

    builder = _builder(builder_dir, FORMAT)
    array_records.allow_open_files(builder.info.splits[split].num_shards)
    source = builder.as_data_source(split, deserialize_method=decode.DeserializeMethod.RAW_BYTES)
    skip = {"image": decode.SkipDecoding()}
    return source, functools.partial(builder.info.features.deserialize_example_np, decoders=skip)


def _check_features(name: str, found: Any) -> None:
    from tensorflow_datasets.core import features

    for key, kind in (("image", features.Image), ("label", features.ClassLabel)):
        if key not in found or not isinstance(found[key], kind):
            has = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in sorted(found.items()))
            raise ValueError(
                f"tfds:{name} is no image classification set: expected an `image` (Image) and a `label` (ClassLabel); "
                f"it has {has}"
            )


def _mirror(builder_dir: str) -> str:
    """A local copy of a prepared data set: its metadata and its shards."""
    root = remote.path(builder_dir)
    files = [file for file in root.iterdir() if file.name.endswith((".json", ".txt")) or FORMAT in file.name]
    files = [file for file in files if not file.name.startswith(".") and not file.is_dir()]
    version = hashlib.sha256(b"".join((root / file).read_bytes() for file in METADATA)).hexdigest()
    return remote.mirror(builder_dir, {file.name: file.stat().length for file in files}, version)


def _fingerprint(builder_dir: str, times: bool = True) -> str:
    digest = hashlib.sha256()
    root = remote.path(builder_dir)
    for file in METADATA:
        digest.update((root / file).read_bytes())
    for file in sorted(root.iterdir()):
        if FORMAT in file.name:
            status = file.stat()
            digest.update(f"{file.name} {status.length} {status.mtime if times else ''}".encode())
            if times and not remote.is_remote(
                builder_dir
            ):  # mtime is in whole seconds, and whatever a program sets it to
                digest.update(f" {(local := os.stat(file)).st_mtime_ns} {local.st_ctime_ns}".encode())
            digest.update(b"\n")
    return digest.hexdigest()[:16]
