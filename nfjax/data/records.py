"""Packed data sets: shards of array_record and a manifest, as `python -m nfjax.data pack` writes them.

    DIR/manifest.json                              what is in it, see `Manifest`
    DIR/train-00000-of-00007.array_record, …     one msgpack map per image: {"image": bytes, "label": int, "name": str}
    DIR/test-00000-of-00001.array_record

A shard is written with `OPTIONS`: one record per chunk, so that one can be read without its neighbours, and not
compressed, because JPEG and PNG are. Every chunk carries a hash, which is checked at each read.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import resource
from typing import Any

from absl import logging

from nfjax.data import remote
from nfjax.data.splits import Dataset

MANIFEST = "manifest.json"
VERSION = 1
OPTIONS = "group_size:1,uncompressed"
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records: its name, how many, its bytes and their SHA-256."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a packed directory holds.

    settings: source, short_side and the like, as given to `pack`; skipped: {split: {name of an image left out: why}},
    and under "source" what the source itself could not offer; labels: {split: number of images of each class}.
    """

    class_names: tuple[str, ...]
    shards: dict[str, tuple[Shard, ...]]
    labels: dict[str, tuple[int, ...]]
    skipped: dict[str, dict[str, str]]
    settings: dict[str, Any]
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Raises ValueError where this is no manifest, or one of a later version."""
        try:
            fields = json.loads(text)
            if fields["version"] != VERSION:
                raise ValueError(
                    f"{where} has format version {fields['version']!r}, this nfjax reads version {VERSION}: update "
                    "nfjax, or pack again"
                )
            shards = {split: tuple(Shard(**shard) for shard in fields["shards"][split]) for split in SPLITS}
            labels = {split: tuple(fields["labels"][split]) for split in SPLITS}
            return cls(tuple(fields["class_names"]), shards, labels, fields["skipped"], fields["settings"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{where} is no manifest of packed records ({error!r}); pack the data again") from error


class RecordReader:
    """Reads record number n of a split: (image bytes, label).

    Raises ValueError that names the record where its hash does not match, where it is no record of ours, or where its
    label is out of range; OSError where its shard cannot be opened.
    """

    def __init__(self, directory: str, shards: tuple[Shard, ...], num_classes: int) -> None:
        self._directory, self._num_classes = directory, num_classes
        self._files = tuple(shard.file for shard in shards)
        self._counts = tuple(shard.count for shard in shards)
        self._source: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}  # open files belong to the process that opened them

    def name(self, index: int) -> str:
        """The shard, and the number of the record in it."""
        ends = list(itertools.accumulate(self._counts))
        shard = bisect.bisect_right(ends, index)
        return f"{self._files[shard]} record {index - ends[shard] + self._counts[shard]}"

    def record(self, index: int) -> dict[str, Any]:
        """{"image", "label", "name"} of record `index`, checked."""
        import msgpack

        if self._source is None:
            self._source = _open(self._directory, self._files, self._counts)
        data = read(self._source, index, self.name)
        try:
            record = msgpack.unpackb(data)
            image, label = record["image"], record["label"]
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"{self.name(index)} holds no packed image: {error!r}") from error
        if not isinstance(image, bytes):
            raise ValueError(f"{self.name(index)} holds {type(image).__name__} instead of the bytes of an image")
        check_label(label, self._num_classes, lambda: self.name(index))
        return record

    def __call__(self, reference: int) -> tuple[bytes, int]:
        record = self.record(reference)
        return record["image"], record["label"]


class Records:
    """A packed split: references are numbers of records."""

    def __init__(self, reader: RecordReader, size: int) -> None:
        self.reader, self._size = reader, size

    def __len__(self) -> int:
        return self._size

    def reference(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return self.reader.name(index)


def load(directory: str) -> Dataset:
    """A directory that `pack` wrote, local or in a bucket (copied to the local disk first, see `remote.mirror`).

    Raises FileNotFoundError, ValueError that name what is missing or damaged; shards are checked by size here, and
    record by record where they are read. `pack.verify` checks all.
    """
    manifest, text = read_manifest(directory)
    sizes = {shard.file: shard.bytes for shards in manifest.shards.values() for shard in shards}
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    if remote.is_remote(directory):
        checksums = {shard.file: shard.sha256 for shards in manifest.shards.values() for shard in shards}
        where = remote.mirror(directory, sizes, version, checksums)
    else:
        where = directory
        _check_sizes(directory, sizes)
    left_out = sum(map(len, manifest.skipped.values()))
    if left_out:
        logging.info("%d images were left out when %s was packed: %s names them", left_out, directory, MANIFEST)
    splits = {}
    for split in SPLITS:
        shards = manifest.shards[split]
        reader = RecordReader(where, shards, len(manifest.class_names))
        splits[split] = Records(reader, sum(shard.count for shard in shards))
        warn_of_missing_classes(f"{directory} {split}", manifest.labels[split], manifest.class_names)
    return Dataset(splits["train"], splits["test"], manifest.class_names, fingerprint=lambda: version, version=version)


def read_manifest(directory: str) -> tuple[Manifest, str]:
    """The manifest of a packed directory, and its text. Raises FileNotFoundError where there is none."""
    if not directory:
        raise ValueError(
            "no data directory given (--config.data.dir=DIR): expected one that `python -m nfjax.data pack` wrote"
        )
    file = remote.path(directory) / MANIFEST
    try:
        text = file.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{directory}/{MANIFEST} is no manifest of packed records ({error}); pack again") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{directory} holds no {MANIFEST}: expected a directory of records; pack one with\n"
            f"  python -m nfjax.data pack --source=folder --dir=IMAGES --out={directory}\n"
            "(a pack that was interrupted goes on when the same command is run again)"
        ) from error
    return Manifest.from_json(text, f"{directory}/{MANIFEST}"), text


def read(source: Any, index: int, name: Any) -> bytes:
    """Record `index` of an array_record source. `name`: index -> how the error calls it.

    array_record reports any trouble as RuntimeError; a chunk whose hash does not match is one of them.
    """
    try:
        return source[index]
    except RuntimeError as error:
        if "open() failed" in str(error):
            raise OSError(f"{name(index)}: {error}") from error
        raise ValueError(f"{name(index)} is damaged: {error}") from error


def check_label(label: Any, num_classes: int, name: Any) -> None:
    """Raises ValueError unless the label is a number of one of the classes."""
    if not isinstance(label, int) or not 0 <= label < num_classes:
        raise ValueError(f"{name()} has the label {label!r}: expected 0 to {num_classes - 1}")


def warn_of_missing_classes(what: str, counts: Any, class_names: tuple[str, ...]) -> None:
    """Warns where a split has no example of some classes, by name."""
    missing = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        logging.warning("%s has no example of %d classes: %s%s", what, len(missing), ", ".join(missing[:8]), more)


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, as far as the system lets it: a reader keeps every shard open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count if hard == resource.RLIM_INFINITY else min(hard, soft + count)
    if soft != resource.RLIM_INFINITY and wanted > soft and count > soft // 2:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _open(directory: str, files: tuple[str, ...], counts: tuple[int, ...]) -> Any:
    from array_record.python import array_record_data_source

    allow_open_files(len(files))
    # With the range of records in the path, the files are opened when they are needed, and not all at once here.
    paths = [f"{directory.rstrip('/')}/{file}[0:{count}]" for file, count in zip(files, counts, strict=True)]
    return array_record_data_source.ArrayRecordDataSource(paths)


def _check_sizes(directory: str, sizes: dict[str, int]) -> None:
    for file, size in sizes.items():
        try:
            found = os.path.getsize(os.path.join(directory, file))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{directory} lacks the shard {file} that its {MANIFEST} lists: copy it again, or pack again"
            ) from None
        if found != size:
            raise ValueError(
                f"{directory}/{file} has {found} bytes where {MANIFEST} says {size}: copy it again, or pack again"
            )
