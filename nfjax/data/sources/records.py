"""Packed data sets: shards of array_record and a manifest, as `python -m nfjax.data pack` writes them.

    DIR/manifest.json                              what is in it, see `Manifest`
    DIR/train-00000-of-00007.array_record, …     one msgpack map per image: {"image": bytes, "label": int, "name": str}
    DIR/test-00000-of-00001.array_record

A shard is written with `OPTIONS`: one record per chunk, so that one can be read without its neighbours, and not
compressed, because JPEG and PNG are. Every chunk carries a hash, which is checked at each read.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import resource
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from absl import logging

from nfjax import storage
from nfjax.data import remote
from nfjax.data.splits import Dataset

MANIFEST = "manifest.json"
VERSION = 1
OPTIONS = "group_size:1,uncompressed"
SPLITS = ("train", "test")
AGAIN = "copy it again, or pack again"  # the way out where packed files are not what the manifest says

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records.

    Attributes:
        file: Its name.
        count: How many records.
        bytes: Of the file.
        sha256: Of the file.
    """

    file: str
    count: Count
    bytes: Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a packed directory holds.

    Attributes:
        class_names: Of label 0, label 1 and so on.
        shards: {split: its files, in order}.
        labels: {split: number of images of each class}.
        skipped: {split: {name of an image left out: why}}, and under "source" what the source itself could not offer.
        settings: source, short_side and the like, as given to `pack`.
        version: Of this format.
    """

    class_names: tuple[str, ...]
    shards: dict[str, tuple[Shard, ...]]
    labels: dict[str, tuple[Count, ...]]
    skipped: dict[str, dict[str, str]]
    settings: dict[str, Any]
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Reads a manifest.

        Args:
            text: JSON.
            where: It was read, for messages.

        Raises:
            ValueError: This is no manifest, one of a later version, or one that contradicts itself.
        """
        try:
            version = storage.parse_json(text, _Versioned, "it", "pack the data again").version
            if version != VERSION:
                raise ValueError(
                    f"{where} has format version {version!r}, this nfjax reads version {VERSION}: update nfjax, or "
                    "pack again"
                )
            manifest = storage.parse_json(text, cls, "it", "pack the data again")
        except storage.DamagedFileError as error:
            fields = ", ".join(field.name for field in dataclasses.fields(cls))
            raise storage.DamagedFileError(
                f"{where} is no manifest of packed records, an object of {fields}: {error}"
            ) from error
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Raises ValueError unless the names are those that `pack` gives, and the numbers agree with each other."""
        names = self.class_names
        wrong = [name for name, times in collections.Counter(names).items() if not name or times > 1]
        if wrong or not names:
            named = f"{wrong[0]!r}, {names.count(wrong[0])} times," if wrong else "nothing"
            raise storage.DamagedFileError(
                f"{where} names {named} as a class: expected one or more, each with a name of its own; pack again"
            )
        for split in SPLITS:
            if not all(split in fields for fields in (self.shards, self.labels, self.skipped)):
                raise storage.DamagedFileError(f"{where} lacks the split {split}; pack again")
            shards, labels = self.shards[split], self.labels[split]
            for k, shard in enumerate(shards):
                expected = shard_name(split, k, len(shards))
                if storage.plain_name(shard.file, where) != expected:
                    raise storage.DamagedFileError(
                        f"{where} names the file {shard.file!r} as a shard of {split}: expected {expected}; pack again"
                    )
                if shard.count > shard.bytes:
                    raise storage.DamagedFileError(
                        f"{where} says that {shard.file} holds {shard.count:,} records in {shard.bytes:,} bytes; pack "
                        "again"
                    )
            records = sum(shard.count for shard in shards)
            if len(labels) != len(names) or sum(labels) != records:
                raise storage.DamagedFileError(
                    f"{where} counts {sum(labels):,} labels of {len(labels):,} classes in {split}: expected "
                    f"{records:,}, as its shards hold, of {len(names):,}; pack again"
                )


@dataclasses.dataclass(frozen=True)
class _Versioned:
    version: Any


def shard_name(split: str, number: int, of: int) -> str:
    """The name of shard `number`, from 0, of so many."""
    return f"{split}-{number:05d}-of-{of:05d}.array_record"


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

    Shards are checked by size and number of records here, and record by record where they are read. `pack.verify`
    checks all.

    Raises:
        FileNotFoundError, ValueError: Something is missing or damaged; it is named.
    """
    manifest, text = read_manifest(directory)
    sizes = {shard.file: shard.bytes for split in SPLITS for shard in manifest.shards[split]}
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    if remote.is_remote(directory):
        checksums = {shard.file: shard.sha256 for split in SPLITS for shard in manifest.shards[split]}
        where = remote.mirror(directory, sizes, version, checksums)
    else:
        where = directory
        check_sizes(directory, sizes)
    if not remote.is_remote(where):
        check_counts(
            (os.path.join(where, shard.file), shard.count) for split in SPLITS for shard in manifest.shards[split]
        )
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
    where = f"{directory.rstrip('/')}/{MANIFEST}"
    try:
        text = storage.read_bytes(remote.path(directory) / MANIFEST, "pack again").decode()
    except UnicodeDecodeError as error:
        raise storage.DamagedFileError(
            f"{where} is no manifest of packed records: byte {error.start} is no UTF-8 text, expected JSON; pack again"
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{directory} holds no {MANIFEST}: expected a directory of records; pack one with\n"
            f"  python -m nfjax.data pack --source=folder --dir=IMAGES --out={directory}\n"
            "(a pack that was interrupted goes on when the same command is run again)"
        ) from error
    return Manifest.from_json(text, where), text


def read(source: Any, index: int, name: Any) -> bytes:
    """A record of an array_record source.

    Args:
        source: The source.
        index: Of the record.
        name: Index -> how the error calls it.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The record is damaged. (array_record reports any trouble as RuntimeError; a chunk whose hash does
            not match is one of them.)
    """
    try:
        return source[index]
    except RuntimeError as error:
        if "open() failed" in str(error):
            raise OSError(f"{name(index)}: {error}") from error
        raise ValueError(f"{name(index)} is damaged: {error}") from error


def check_label(label: Any, num_classes: int, name: Any) -> None:
    """Raises ValueError unless the label is a number of one of the classes."""
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise ValueError(f"{name()} has the label {label!r}: expected 0 to {num_classes - 1}")


def check_sizes(directory: str, sizes: dict[str, int]) -> None:
    """Raises FileNotFoundError, ValueError unless the shards {name: bytes} lie in a local directory."""
    for name, size in sizes.items():
        file = pathlib.Path(directory, name)
        if not file.exists():
            raise FileNotFoundError(f"{directory} lacks the shard {name} that its {MANIFEST} lists: {AGAIN}")
        if not storage.regular_file(file):
            raise storage.DamagedFileError(f"{file} is a folder, a pipe or a device: expected a shard; {AGAIN}")
        if (found := file.stat().st_size) != size:
            raise storage.DamagedFileError(f"{file} has {found} bytes where {MANIFEST} says {size}: {AGAIN}")


def check_counts(shards: Iterable[tuple[str, int]]) -> None:
    """Raises ValueError where a shard, (path, number of records), holds another number.

    What cannot be opened is left to whoever reads it, who names the record that is lost.
    """
    from array_record.python import array_record_module

    for path, count in shards:
        try:
            reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
            found = reader.num_records()
            reader.close()
        except RuntimeError:  # how array_record reports every trouble
            continue
        if found != count:
            raise storage.DamagedFileError(
                f"{path} holds {found:,} records where the metadata beside it says {count:,}; {AGAIN}"
            )


def warn_of_missing_classes(what: str, counts: Any, class_names: tuple[str, ...]) -> None:
    """Warns where a split has no example of some classes, by name."""
    missing = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        named = ", ".join(name if name.isprintable() else ascii(name) for name in missing[:8])
        logging.warning("%s has no example of %d classes: %s%s", what, len(missing), named, more)


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
