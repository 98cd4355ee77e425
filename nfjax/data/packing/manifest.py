"""What a packed data set holds, and in which files.

    DIR/manifest.json                              see `Manifest`
    DIR/train-00000-of-00007.array_record, …     one msgpack map per image: {"image": bytes, "label": int, "name": str}
    DIR/test-00000-of-00001.array_record

A shard is written with `OPTIONS`: one record per chunk, so that one can be read without its neighbours, and not
compressed, because JPEG and PNG are. Every chunk carries a hash, which is checked at each read.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from typing import Annotated, Any

import msgspec

from nfjax import storage
from nfjax.data import remote

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


def read_manifest(directory: str) -> tuple[Manifest, str]:
    """The manifest of a packed directory, and its text.

    Args:
        directory: Local, or in a bucket.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of a later version.
    """
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


def check_sizes(directory: str, sizes: dict[str, int]) -> None:
    """Raises FileNotFoundError, ValueError unless the shards, {name: bytes}, lie in a local directory."""
    for name, size in sizes.items():
        file = pathlib.Path(directory, name)
        if not file.exists():
            raise FileNotFoundError(f"{directory} lacks the shard {name} that its {MANIFEST} lists: {AGAIN}")
        if not storage.regular_file(file):
            raise storage.DamagedFileError(f"{file} is a folder, a pipe or a device: expected a shard; {AGAIN}")
        if (found := file.stat().st_size) != size:
            raise storage.DamagedFileError(f"{file} has {found} bytes where {MANIFEST} says {size}: {AGAIN}")
