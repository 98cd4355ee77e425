"""One shard of a packed data set: its images made ready in parallel and written in order, with a note beside it.

The note, `<shard>.json`, says that the shard is complete and what it holds; the manifest takes its place at the end.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
from absl import logging

from nfjax import storage
from nfjax.data.decoding import decode
from nfjax.data.loading.skips import explained
from nfjax.data.packing import manifest
from nfjax.data.sources import array_records
from nfjax.data.splits import Encoded, Images


@dataclasses.dataclass(frozen=True)
class Note:
    """What a shard holds.

    Attributes:
        shard: The file.
        labels: Of its images, in order.
        skipped: {name of an image left out: why}.
    """

    shard: manifest.Shard
    labels: tuple[manifest.Count, ...]
    skipped: dict[str, str]


Example = tuple[str, bytes, int, str]  # (name, image, label, "") or, of a bad one, (name, b"", 0, "cause: detail")


def example(examples: Images | Encoded, convert: Callable[[bytes], bytes], num_classes: int, index: int) -> Example:
    """An example of a split, made ready for its record.

    Args:
        examples: The split.
        convert: Called with the bytes of an image file; an array becomes a PNG instead.
        num_classes: Labels are below it.
        index: Of the example.
    """
    if isinstance(examples, Images):
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(examples.images[index]).save(stream, "PNG")
        return str(index), stream.getvalue(), int(examples.labels[index]), ""
    name = examples.name(index)
    try:
        data, label = examples.reader(examples.reference(index))
        array_records.check_label(label, num_classes, lambda: name)
        return name, convert(data), label, ""
    except Exception as error:  # any file may be bad in any way
        return name, b"", 0, ": ".join(explained(error))


def converted(data: bytes, short_side: int | None, quality: int) -> bytes:
    """An image file as it is packed: decoded to see that it can be, and reduced where it is too large.

    Args:
        data: The bytes of the file.
        short_side: Pixels above which the short side is reduced to it; None for never.
        quality: Of the JPEG that a reduced image becomes. What EXIF says of its orientation is kept, for those who ask
            for it.

    Raises:
        BadImageError: It cannot be decoded.
    """
    pixels = decode.decode(data)
    short = min(pixels.shape[:2])
    if short_side is None or short <= short_side:
        return data
    import simplejpeg
    from PIL import Image

    height, width = (int(short_side * n / short) for n in pixels.shape[:2])  # as torchvision and `crops` round
    reduced = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    packed = simplejpeg.encode_jpeg(reduced, quality=quality, colorspace="RGB", colorsubsampling="420")
    return decode.with_orientation(packed, decode.header(data, upright=True).orientation)


def in_order(pool: Any, function: Callable[[int], Any], indices: range, ahead: int) -> Iterator[Any]:
    """function(index) of each index, in order, computed by a pool of threads, at most `ahead` of them at a time."""
    waiting: collections.deque = collections.deque()
    try:
        for index in indices:
            waiting.append(pool.submit(function, index))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def write(file: pathlib.Path, examples: Iterator[Example], bar: Any) -> Note:
    """Writes a shard, and the note beside it.

    Args:
        file: The shard.
        examples: Of it; bad ones are noted.
        bar: Shows the progress.

    Raises:
        OSError: It cannot be written; nothing is left of it then.
    """
    try:
        with storage.replacing(file) as part:
            labels, skipped = _write_records(part, examples, bar)
            shard = manifest.Shard(file.name, len(labels), part.stat().st_size, sha256(part))
    except RuntimeError as error:  # how array_record reports every trouble
        raise OSError(f"{file} cannot be written: {error}; is the disk full?") from error
    note = Note(shard, tuple(labels), skipped)
    storage.write_json(note_of(file), dataclasses.asdict(note), indent=None)
    return note


def _write_records(temporary: pathlib.Path, examples: Iterator[Example], bar: Any) -> tuple[list[int], dict[str, str]]:
    from array_record.python import array_record_module

    labels, skipped = [], {}
    writer = array_record_module.ArrayRecordWriter(str(temporary), manifest.OPTIONS)
    try:
        for name, image, label, problem in examples:
            bar.update()
            if problem:
                skipped[name] = problem
                continue
            writer.write(msgpack.packb({"image": image, "label": label, "name": name}))
            labels.append(label)
    finally:
        writer.close()
    reader = array_record_module.ArrayRecordReader(str(temporary))
    written = reader.num_records()
    reader.close()
    if written != len(labels):
        raise RuntimeError(f"{written} records instead of {len(labels)}")
    return labels, skipped


def finished(file: pathlib.Path, num_classes: int) -> Note | None:
    """The note of a shard that an earlier run completed; None, with a warning, for one that is not what it should be:
    the shard is packed again.
    """
    try:
        note = storage.read_json(note_of(file), Note, "the shard is packed again")
        size = file.stat().st_size
    except FileNotFoundError:
        return None
    except storage.DamagedFileError as error:
        logging.warning("%s", error)
        return None
    if (
        note.shard.file != file.name
        or note.shard.count != len(note.labels)
        or max(note.labels, default=0) >= num_classes
    ):
        logging.warning("%s is the note of another shard; the shard is packed again", note_of(file))
        return None
    return note if size == note.shard.bytes else None


def note_of(file: pathlib.Path) -> pathlib.Path:
    """Where the note of a shard lies."""
    return file.with_name(file.name + ".json")


def sha256(file: pathlib.Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
