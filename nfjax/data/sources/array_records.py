"""Files of array_record: opening many, reading one record, and what is checked of them before and then."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable
from typing import Any

from nfjax import storage


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, as far as the system lets it: a reader keeps every shard open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count if hard == resource.RLIM_INFINITY else min(hard, soft + count)
    if soft != resource.RLIM_INFINITY and wanted > soft and count > soft // 2:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_counts(shards: Iterable[tuple[str, int]], way_out: str) -> None:
    """Compares the number of records in some files with what is said of them.

    What cannot be opened is left to whoever reads it, who names the record that is lost.

    Args:
        shards: (path, number of records) of each.
        way_out: What to do about a wrong one, the end of a sentence.

    Raises:
        ValueError: A file holds another number of records.
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
                f"{path} holds {found:,} records where the metadata beside it says {count:,}; {way_out}"
            )


def read(source: Any, index: int, name: Callable[[int], str]) -> bytes:
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


def check_label(label: Any, num_classes: int, name: Callable[[], str]) -> None:
    """Raises ValueError unless the label is a number of one of the classes."""
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise ValueError(f"{name()} has the label {label!r}: expected 0 to {num_classes - 1}")
