"""Files that may be cut short, damaged, or made by somebody else.

They are written in full or not at all, and read with a message that says which file, where in it, what was expected,
and the way out.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pathlib
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from absl import logging

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

LARGEST = 1 << 28  # bytes of a JSON file that is read: the longest list of names that anyone has takes a tenth of it


class DamagedFileError(ValueError):
    """A file that does not hold what it should. The message names it, the place, what was expected, and a way out."""


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that is there in full or not at all: until all of it is on the disk, the one before it stays.

    Raises:
        OSError: It cannot be written; the message names it, and nothing is left beside it.
    """
    try:
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path, writer: str = "") -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, for whoever writes a file piece by piece: it takes the place of `path` when the
    block has ended and all of it is on the disk. Where the block fails, nothing is left of it.

    Args:
        path: The file.
        writer: Tells processes apart that may do this to one path at the same time. What a kill leaves of them stays;
            where there is one at a time, the next write replaces it.
    """
    part = path.with_name(f".{path.name}{writer and '.'}{writer}.part")
    part.unlink(missing_ok=True)  # and a link that somebody put there is not followed
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """`write_bytes` of UTF-8; what is no character of it, as in some file names, is written as an escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: pathlib.Path, value: Any, indent: int | None = 1) -> None:
    """`write_text` of a value as JSON, with a line end."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_csv(path: pathlib.Path, rows: Iterable[Iterable[Any]]) -> None:
    """`write_text` of rows of text and numbers, separated by commas."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows(rows)
    write_text(path, stream.getvalue())


def write_figure(path: pathlib.Path, figure: Figure, dpi: int) -> None:
    """`write_bytes` of a picture, in the format that the name says."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for a letter that no font has
        figure.savefig(stream, format=path.suffix[1:], dpi=dpi)
    write_bytes(path, stream.getvalue())


def parse_json(data: str | bytes, expected: type[T] | Any, where: str, way_out: str) -> T:
    """The value in JSON text, checked against a type: `dict[str, float]`, a dataclass, a msgspec.Struct, any nesting of
    them, with `Annotated[int, msgspec.Meta(ge=0)]` and the like for ranges. NaN and Infinity are numbers.

    Args:
        data: The text.
        expected: The type.
        where: What it was read from, for messages.
        way_out: What to do about a damaged one, the end of a sentence.

    Raises:
        DamagedFileError: It is no JSON, or holds something else.
    """
    import msgspec  # here: those who only write files do without it

    try:
        text = data if isinstance(data, str) else data.decode()
        if not text.strip():
            raise DamagedFileError(f"{where} is empty: expected {_described(expected)}; {way_out}")
        return msgspec.convert(json.loads(text), expected)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DamagedFileError(f"{where} is damaged at {place}: expected JSON ({error.msg}); {way_out}") from error
    except UnicodeDecodeError as error:
        raise DamagedFileError(
            f"{where} is damaged: byte {error.start} is no UTF-8 text, expected JSON; {way_out}"
        ) from error
    except msgspec.ValidationError as error:
        raise DamagedFileError(f"{where} does not hold what it should: {error}; {way_out}") from error
    except RecursionError as error:
        raise DamagedFileError(f"{where} is damaged: JSON nested too deeply; {way_out}") from error
    except DamagedFileError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise DamagedFileError(f"{where} is damaged: {error}; {way_out}") from error


def read_json(path: Any, expected: type[T] | Any, way_out: str) -> T:
    """`parse_json` of a file, a pathlib.Path or one in a bucket.

    Raises:
        DamagedFileError: It holds something else, is no ordinary file, or has more than `LARGEST` bytes.
        OSError: It cannot be read; FileNotFoundError where it is not there.
    """
    return parse_json(read_bytes(path, way_out), expected, str(path), way_out)


def read_bytes(path: Any, way_out: str) -> bytes:
    """The bytes of a small file, a pathlib.Path or one in a bucket; errors as of `read_json`."""
    status = path.stat()
    if isinstance(status, os.stat_result):
        mode, size = status.st_mode, status.st_size
    else:  # etils's, whose mode a bucket leaves out
        mode, size = status.mode or 0, status.length
    if any(kind(mode) for kind in (stat.S_ISFIFO, stat.S_ISSOCK, stat.S_ISCHR, stat.S_ISBLK)):
        raise DamagedFileError(f"{path} is a pipe or a device, which may never end: expected a file; {way_out}")
    if size > LARGEST:
        raise DamagedFileError(f"{path} has {size:,} bytes: expected at most {LARGEST:,}; {way_out}")
    return path.read_bytes()


def set_aside(path: pathlib.Path, reason: object) -> pathlib.Path:
    """Renames a damaged file that can be done without to `<name>.damaged`, with a warning; returns its new name."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged{number}")
    path.rename(aside)
    logging.warning("%s; it is set aside as %s", reason, aside.name)
    return aside


def plain_name(name: Any, where: str) -> str:
    """`name`, if it is that of a file inside of a folder: no separator, no "..", nothing that a terminal would obey.

    Args:
        name: What was found.
        where: Which file gave it.

    Raises:
        DamagedFileError: It is something else, and would be read or written elsewhere.
    """
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or any(character in "/\\:" or not character.isprintable() for character in name)
        or len(os.fsencode(name)) > 255
    ):
        raise DamagedFileError(f"{where} names the file {name!r}: expected a plain name, which stays inside its folder")
    return name


def regular_file(path: pathlib.Path) -> bool:
    """Whether this is an ordinary file and no pipe, socket or device, which would block whoever opens it."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _described(expected: Any) -> str:
    origin = getattr(expected, "__origin__", expected)
    return {dict: "a JSON object", list: "a JSON list", Mapping: "a JSON object"}.get(origin, "a JSON object")
