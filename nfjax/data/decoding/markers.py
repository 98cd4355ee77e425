"""The segments of a JPEG file, without decoding: its size and form, whether it is all there, and the same image in a
file without oddities.

Some oddities cost no pixel: a version of JFIF that does not exist, an unknown colour transform, a broken colour
profile, bytes that belong to no segment. libjpeg warns of them as it does of damage, and after its first warning it
names no other. `mended` takes them away, so that what is warned of then is damage.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from nfjax.data.decoding import huffman

START = b"\xff\xd8\xff"
MAX_SCANS = 100  # a progressive file of thousands of scans costs minutes
MAX_WALKED = 4 * 2**20  # bytes of a scan that are walked through in Python, at a second or so for each MiB
_EOI, _SOI, _SOS, _DHT, _DRI, _APP0, _APP14, _COM = 0xD9, 0xD8, 0xDA, 0xC4, 0xDD, 0xE0, 0xEE, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers that no segment belongs to
_ENTROPY = -1  # what follows the header of a scan, up to the next marker
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the frame header says.

    Attributes:
        marker: Which kind of frame it is, the second byte of its marker.
        precision: Bits of a sample.
        height: In pixels.
        width: In pixels.
        sampling: {component: (horizontal, vertical) factors} in the order of the file.
    """

    marker: int
    precision: int
    height: int
    width: int
    sampling: dict[int, tuple[int, int]]

    @property
    def common(self) -> bool:
        """Whether decoders of 8-bit images know it: neither lossless nor of 12 bits."""
        return self.marker in (*_SEQUENTIAL, _PROGRESSIVE, 0xC9, 0xCA) and self.precision == 8

    @property
    def usual(self) -> bool:
        """Whether it is common, and grey or of three colours with unsubsampled brightness, as nearly all files are."""
        first, *others = self.sampling.values()
        return (
            self.common
            and len(others) in (0, 2)
            and len(set(others)) <= 1
            and all(first[i] % other[i] == 0 for other in others for i in (0, 1))
        )

    def mcus(self, components: list[int]) -> tuple[int, list[int]]:
        """(how many minimum coded units a scan of these components has, blocks of each component in one)."""
        across, down = (max(factors) for factors in zip(*self.sampling.values(), strict=True))
        if len(components) > 1:
            units = -(-self.width // (8 * across)) * -(-self.height // (8 * down))
            return units, [self.sampling[c][0] * self.sampling[c][1] for c in components]
        h, v = self.sampling[components[0]]
        width, height = -(-self.width * h // across), -(-self.height * v // down)
        return -(-width // 8) * -(-height // 8), [1]


def frame(data: bytes) -> Frame:
    """The frame header of a JPEG.

    Raises:
        ValueError: There is none.
    """
    for marker, segment in _segments(data):
        if marker in _FRAMES:
            return _frame(marker, segment)
        if marker in (_EOI, _SOS):
            break
    raise ValueError("it has no frame header")


def has_end(data: bytes) -> bool:
    """Whether an end-of-image marker stands behind the scans; what follows it is not looked at."""
    try:
        return any(marker == _EOI for marker, _ in _segments(data))
    except ValueError:
        return False


def has_too_many_scans(data: bytes) -> bool:
    """Whether there are more than `MAX_SCANS`."""
    if data.count(bytes([0xFF, _SOS])) <= MAX_SCANS:
        return False
    try:
        return sum(marker == _SOS for marker, _ in _segments(data)) > MAX_SCANS
    except ValueError:
        return True


def mended(data: bytes, complaint: str) -> bytes | None:
    """The same image without what costs no pixel.

    Args:
        data: A JPEG file.
        complaint: libjpeg's warning. If it is of bytes behind the data of a scan, they are taken away where that data
            is whole and they are no part of it: see `huffman.end`.

    Returns:
        A JPEG file; None where the segments cannot be followed.
    """
    try:
        return b"".join(_mended(data, complaint))
    except ValueError:
        return None


def _mended(data: bytes, complaint: str) -> Iterator[bytes]:
    yield bytes([0xFF, _SOI])
    form, tables, interval = frame(data), {}, 0
    too_many = _EXTRANEOUS.search(complaint)
    plan: tuple[int, list[huffman.Tables]] = (0, [])
    for marker, segment in _segments(data):
        if marker == _EOI:
            yield bytes([0xFF, _EOI])
            return
        if marker == _ENTROPY:
            if too_many:
                segment = _without_rest(segment, int(too_many[1]), form, plan, interval)
            yield segment
            continue
        if marker == _DHT:
            tables |= huffman.tables(segment)
        elif marker == _DRI:
            interval = int.from_bytes(segment[:2])
        elif marker == _SOS and too_many and form.marker in _SEQUENTIAL:
            plan = _plan(form, tables, segment)
        elif marker == _APP0 and segment.startswith(b"JFIF\0") and len(segment) >= 14:
            segment = segment[:5] + b"\1\1" + segment[7:]
        elif marker == _APP14 and segment.startswith(b"Adobe") and len(segment) >= 12:
            known = {3: (0, 1), 4: (0, 2)}.get(len(form.sampling))  # the last is what libjpeg takes others for
            if known and segment[11] not in known:
                segment = segment[:11] + bytes([known[-1]]) + segment[12:]
        elif _APP0 <= marker <= 0xEF or marker == _COM:
            continue
        yield bytes([0xFF, marker]) + (len(segment) + 2).to_bytes(2) + segment


def _without_rest(
    scan: bytes, warned: int, form: Frame, plan: tuple[int, list[huffman.Tables]], interval: int
) -> bytes:
    """The data of a scan without the bytes behind it that are none of it; as it is where that cannot be told."""
    if form.marker in _SEQUENTIAL:
        units, blocks = plan
        begin = 0
        for number, restart in enumerate(_RESTART.finditer(scan), 1):
            begin = restart.end()
            units = plan[0] - number * interval
        if len(scan) > MAX_WALKED or units < 1 or (interval and units > interval):
            return scan
        last = scan[begin:].replace(b"\xff\0", b"\xff")
        end = huffman.end(last, units, blocks)
        return scan if end is None else scan[:begin] + last[:end].replace(b"\xff", b"\xff\0")
    # The data of other scans can be followed only together with that of those before them. Padding is told by its look.
    rest = scan[-warned:]
    return scan[:-warned] if 0 < warned < len(scan) and rest == rest[:1] * warned else scan


def _plan(form: Frame, tables: dict[int, huffman.Table], header: bytes) -> tuple[int, list[huffman.Tables]]:
    """(minimum coded units of a scan, the tables of each block in one)."""
    try:
        chosen = {header[1 + 2 * k]: header[2 + 2 * k] for k in range(header[0])}
        units, counts = form.mcus(list(chosen))
        pairs = [(tables[byte >> 4], tables[16 + (byte & 15)]) for byte in chosen.values()]
    except (KeyError, IndexError) as error:
        raise ValueError(f"a scan of what is not there: {error!r}") from error
    return units, [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]


def _frame(marker: int, segment: bytes) -> Frame:
    if len(segment) < 9 or len(segment) != 6 + 3 * segment[5]:
        raise ValueError("its frame header has another length than it says")
    components = [segment[i : i + 3] for i in range(6, len(segment), 3)]
    sampling = {number: (factors >> 4, factors & 15) for number, factors, _ in components}
    if len(sampling) != len(components) or any(not 1 <= f <= 4 for pair in sampling.values() for f in pair):
        raise ValueError("its frame header has sampling factors that do not exist")
    height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
    return Frame(marker, segment[0], height, width, sampling)


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, what is in the segment) of each, to the end-of-image marker; (_ENTROPY, data) behind each `_SOS`.

    Bytes between segments are passed over, as libjpeg does. Raises ValueError where a segment is cut short.
    """
    at = 2
    while (at := data.find(b"\xff", at)) >= 0:
        while at < len(data) and data[at] == 0xFF:  # any number of them may stand before a marker
            at += 1
        marker = data[at] if at < len(data) else 0
        at += 1
        if marker == 0 or marker in _ALONE:
            continue
        if marker == _EOI:
            yield marker, b""
            return
        length = int.from_bytes(data[at : at + 2])
        if marker == _SOI or length < 2 or at + length > len(data):
            raise ValueError(f"its segment at byte {at - 2} is cut short")
        yield marker, data[at + 2 : at + length]
        at += length
        if marker == _SOS:
            end = _END_OF_SCAN.search(data, at)
            if end is None:
                break
            yield _ENTROPY, data[at : end.start()]
            at = end.start()
    raise ValueError("it has no end-of-image marker")
