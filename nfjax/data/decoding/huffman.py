"""Where the data of a scan of a sequential JPEG ends (ITU-T T.81, annex F), without making pixels of it.

libjpeg warns alike of bytes that somebody has left behind a whole image, and of the end of an image that was garbled: a
decoder soon falls into step again behind overwritten bytes, with a few blocks more or less than there were. This tells
them apart, so that the former is read and the latter is not.
"""

from __future__ import annotations

import numpy as np

Table = list[int]  # (length of the code << 8) | symbol, for each 16 bits that begin with that code; 0 for no code
Tables = tuple[Table, Table]  # of a block: for its mean (DC), for the rest (AC)


def tables(segment: bytes) -> dict[int, Table]:
    """The tables of a DHT segment, {number, from 0 for DC and from 16 for AC: table}.

    Raises:
        ValueError: It holds no tables.
    """
    found = {}
    while segment:
        number, counts = segment[0], segment[1:17]
        symbols = segment[17 : 17 + sum(counts)]
        segment = segment[17 + sum(counts) :]
        table, code, place = np.zeros(1 << 16, np.int32), 0, 0
        for length, count in enumerate(counts, 1):
            for symbol in symbols[place : place + count]:
                table[code << 16 - length : code + 1 << 16 - length] = length << 8 | symbol
                code += 1
            place += count
            if code > 1 << length:
                raise ValueError("a Huffman table with more codes than there can be")
            code <<= 1
        if len(counts) != 16 or place != len(symbols):
            raise ValueError("a Huffman table that is cut short")
        found[number] = table.tolist()
    return found


def end(data: bytes, units: int, blocks: list[Tables]) -> int | None:
    """How many bytes its first minimum coded units take.

    Args:
        data: Of a scan, or behind its last restart marker, without stuffed bytes.
        units: How many of them.
        blocks: The tables of each block of a unit, in order.

    Returns:
        The number of bytes; None where that is not certain.

    Certain means: all of them are there, and the last byte is filled with ones, as the standard has it; and what
    follows is not itself units to its end, as it would be if some before had been garbled and the last were left over.
    Damage in the last few dozen bytes may be taken for certain: a decoder needs some to fall into step.
    """
    place, done = 0, 0
    padded = data + bytes(8)
    while done < units:
        place = _unit(padded, place, blocks)
        if place is None or place > 8 * len(data):
            return None
        done += 1
    if not _filled_with_ones(data, place):
        return None
    whole, more = -(-place // 8), place
    if not data[whole:].strip(b"\0"):  # padding, which no units are
        return whole
    while 8 * len(data) - more >= 8:
        more = _unit(padded, more, blocks)
        if more is None or more > 8 * len(data):
            return whole  # what follows is something else
    return whole if more == place or not _filled_with_ones(data, more) else None


def _unit(data: bytes, place: int, blocks: list[Tables]) -> int | None:
    """The bit behind the unit that begins with bit `place`; None where that is no code."""
    for means, rest in blocks:
        entry = means[int.from_bytes(data[place >> 3 : (place >> 3) + 3]) >> 8 - (place & 7) & 0xFFFF]
        if not entry:
            return None
        place += (entry >> 8) + (entry & 0xFF)
        coefficient = 1
        while coefficient < 64:
            entry = rest[int.from_bytes(data[place >> 3 : (place >> 3) + 3]) >> 8 - (place & 7) & 0xFFFF]
            if not entry:
                return None
            place += (entry >> 8) + (entry & 15)
            if not entry & 0xFF:  # the rest of the block is zero
                break
            coefficient += (entry >> 4 & 15) + 1
    return place


def _filled_with_ones(data: bytes, place: int) -> bool:
    """Whether the bits from `place` to the end of its byte are all ones."""
    left = -place % 8
    return not left or data[place >> 3] & (1 << left) - 1 == (1 << left) - 1
