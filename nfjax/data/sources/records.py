"""Packed data sets, as `python -m nfjax.data pack` writes them: see `nfjax.data.packing.manifest`."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from typing import Any

from absl import logging

from nfjax.data import remote
from nfjax.data.packing.manifest import AGAIN, MANIFEST, SPLITS, Shard, check_sizes, read_manifest
from nfjax.data.sources import array_records
from nfjax.data.splits import Dataset, Numbered, warn_of_missing_classes


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
        data = array_records.read(self._source, index, self.name)
        try:
            record = msgpack.unpackb(data)
            image, label = record["image"], record["label"]
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"{self.name(index)} holds no packed image: {error!r}") from error
        if not isinstance(image, bytes):
            raise ValueError(f"{self.name(index)} holds {type(image).__name__} instead of the bytes of an image")
        array_records.check_label(label, self._num_classes, lambda: self.name(index))
        return record

    def __call__(self, reference: int) -> tuple[bytes, int]:
        record = self.record(reference)
        return record["image"], record["label"]


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
        array_records.check_counts(
            ((os.path.join(where, shard.file), shard.count) for split in SPLITS for shard in manifest.shards[split]),
            AGAIN,
        )
    left_out = sum(map(len, manifest.skipped.values()))
    if left_out:
        logging.info("%d images were left out when %s was packed: %s names them", left_out, directory, MANIFEST)
    splits = {}
    for split in SPLITS:
        shards = manifest.shards[split]
        reader = RecordReader(where, shards, len(manifest.class_names))
        splits[split] = Numbered(reader, sum(shard.count for shard in shards))
        warn_of_missing_classes(f"{directory} {split}", manifest.labels[split], manifest.class_names)
    return Dataset(splits["train"], splits["test"], manifest.class_names, fingerprint=lambda: version, version=version)


def _open(directory: str, files: tuple[str, ...], counts: tuple[int, ...]) -> Any:
    from array_record.python import array_record_data_source

    array_records.allow_open_files(len(files))
    # With the range of records in the path, the files are opened when they are needed, and not all at once here.
    paths = [f"{directory.rstrip('/')}/{file}[0:{count}]" for file, count in zip(files, counts, strict=True)]
    return array_record_data_source.ArrayRecordDataSource(paths)
