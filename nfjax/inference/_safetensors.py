"""Arrays by name in one file, in the format of safetensors: a JSON header of names, types, shapes and places, then the
numbers, little-endian. Nothing in it is executed, and a header that lies is refused before anything is read.

The format: https://github.com/huggingface/safetensors, of which this reads and writes all that NumPy has types for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nfjax import storage

MOST_HEADER = 100_000_000  # bytes, as the format's own readers allow
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16,
    "BF16": jnp.bfloat16, "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64,
    "F64": np.float64, "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "C64": np.complex64,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array lies in a file.

    Attributes:
        dtype: Of its numbers.
        shape: Of it.
        begin: Of its first byte, behind the header.
        end: Behind its last one.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def encode(arrays: Mapping[str, Any]) -> bytes:
    """The file of these arrays.

    Raises:
        ValueError: One has a type that the format lacks.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise ValueError(f"{name} has the dtype {array.dtype}: safetensors has {', '.join(map(str, _NAMES))}")
    header, parts, end = {}, [], 0
    # Wide numbers first, so that every array begins at a multiple of its numbers' size.
    for name in sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name)):
        array = arrays[name]
        parts.append(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_places(path: pathlib.Path) -> dict[str, Place]:
    """What a file says it holds, by name. Only the header is read.

    Raises:
        storage.DamagedFileError: It is no such file, or says what cannot be true.
        OSError: It cannot be read.
    """
    if not storage.regular_file(path) and path.exists():
        raise _damaged(path, "it is no ordinary file")
    with open(path, "rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise _damaged(path, f"a header of {length:,} bytes in a file of {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        places = {name: _place(name, told) for name, told in header.items() if name != _METADATA}
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise _damaged(path, f"{name!r} begins at byte {place.begin}: expected {end}, where the one before it ends")
        end = place.end
    if end != size - 8 - length:
        raise _damaged(path, f"its arrays take {end:,} bytes, and {size - 8 - length:,} follow the header")
    return places


def decode(data: bytes, places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """The arrays in the bytes of a file whose `read_places` these are."""
    start = 8 + int.from_bytes(data[:8], "little")
    return {name: _array(data, start, place) for name, place in places.items()}


def _array(data: bytes, start: int, place: Place) -> np.ndarray:
    dtype = place.dtype.newbyteorder("<")
    flat = np.frombuffer(data, dtype, count=math.prod(place.shape), offset=start + place.begin)
    return flat.astype(place.dtype, copy=False).reshape(place.shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _place(name: str, told: Any) -> Place:
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: expected dtype, shape and data_offsets")
    if not isinstance(told["dtype"], str) or told["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the dtype {told['dtype']!r}: expected one of {', '.join(DTYPES)}")
    shape, offsets = told["shape"], told["data_offsets"]
    if not _whole(shape) or len(shape) > 32:
        raise ValueError(f"{name!r} has the shape {shape}: expected whole numbers, 32 at most")
    if not _whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has the data_offsets {offsets}: expected two whole numbers")
    dtype = np.dtype(DTYPES[told["dtype"]])
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} takes bytes {offsets[0]} to {offsets[1]}, which is not what {dtype}{shape} takes")
    return Place(dtype, tuple(shape), *offsets)


def _whole(numbers: Any) -> bool:
    """Whether these are sizes or offsets; nothing that a file can hold has more than 2^63 bytes."""
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _damaged(path: pathlib.Path, what: str) -> storage.DamagedFileError:
    return storage.DamagedFileError(f"{path} is damaged: {what[:300]}; export the network again, or copy it again")
