"""JPEG files of any form for the tests: other chroma subsamplings than encoders offer, oddities, damage."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

PHOTO = load_sample_image("china.jpg")[:203, :301]  # of no multiple of anything


def encoded(pixels=PHOTO, kind="JPEG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def sampled(factors, mode="YCbCr", transform=None, pixels=PHOTO):
    """A baseline JPEG whose components have these sampling factors, each in a scan of its own, made of grey JPEGs.

    mode: of Pillow, for the components. transform: of an Adobe marker, in the place of the JFIF one.
    """
    height, width = pixels.shape[:2]
    across, down = (max(f) for f in zip(*factors, strict=True))
    image = Image.fromarray(pixels)
    if mode == "CMYK":  # inverted, as Adobe stores it
        image.putalpha(image.convert("L").point(lambda level: 155 + level // 3))
    else:
        image = image.convert(mode)
    planes = []
    for (h, v), plane in zip(factors, image.split(), strict=True):
        size = -(-width * h // across), -(-height * v // down)
        planes.append(encoded(plane.resize(size, Image.Resampling.BOX), quality=85))
    frame = planes[0].index(b"\xff\xc0")
    begins = [plane.index(b"\xff\xda") for plane in planes]
    count = len(factors)
    components = b"".join(bytes([i, h << 4 | v, 0]) for i, (h, v) in enumerate(factors, 1))
    header = b"\xff\xc0" + (8 + 3 * count).to_bytes(2) + b"\x08" + height.to_bytes(2) + width.to_bytes(2)
    tables = planes[0][frame + 13 : begins[0]]
    scans = [
        plane[at : at + 5] + bytes([i]) + plane[at + 6 : -2]
        for i, (plane, at) in enumerate(zip(planes, begins, strict=True), 1)
    ]
    head = planes[0][:frame] if transform is None else planes[0][:2] + adobe(transform) + planes[0][20:frame]
    return head + header + bytes([count]) + components + tables + b"".join(scans) + b"\xff\xd9"


def adobe(transform):
    return b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00" + bytes([transform])


def before(data, marker, inserted, last=False):
    at = data.rindex(marker) if last else data.index(marker)
    return data[:at] + inserted + data[at:]


def replaced(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def _without(data, marker):
    while marker in data:
        at = data.index(marker)
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    return data


GOOD = encoded(quality=85)
RESTARTS = encoded(quality=85, restart_marker_blocks=7)
PROGRESSIVE = encoded(quality=85, progressive=True)
IN_SCANS = sampled([(1, 1)] * 3)
DQT, DHT, SOF, SOS, EOI = b"\xff\xdb", b"\xff\xc4", b"\xff\xc0", b"\xff\xda", b"\xff\xd9"
NO_JFIF = GOOD[:2] + GOOD[20:]
VERSION = GOOD.index(b"JFIF\0") + 5
NOISE = np.random.default_rng(1).integers(0, 255, 700, dtype=np.uint8).tobytes()
ICC = b"ICC_PROFILE\0\x02\x05no profile"  # the second of five parts, alone

# What costs no pixel, and what Pillow reads.
HARMLESS = {
    "JFIF 0.00": replaced(GOOD, VERSION, b"\0\0"),
    "JFIF 9.99": replaced(GOOD, VERSION, b"\x09\x63"),
    "bytes before the tables": before(GOOD, DQT, b"\x12\x34"),
    "bytes before the frame": before(GOOD, SOF, b"\0"),
    "bytes before the scan": before(GOOD, SOS, b"abc\xff\x00def"),
    "both": replaced(before(GOOD, DQT, b"\x12\x34"), VERSION, b"\0\0"),
    "fill bytes": before(GOOD, SOS, b"\xff" * 9),
    "a restart marker in the header": before(GOOD, DHT, b"\xff\xd3"),
    "part of a colour profile": before(GOOD, DQT, b"\xff\xe2" + (len(ICC) + 2).to_bytes(2) + ICC),
    "unknown Adobe transform": NO_JFIF[:2] + adobe(9) + NO_JFIF[2:],
    "a few zeros before the end": before(GOOD, EOI, bytes(4), last=True),
    "zeros before the end": before(GOOD, EOI, bytes(600), last=True),
    "noise before the end": before(GOOD, EOI, NOISE.replace(b"\xff", b""), last=True),
    "text before the end": before(GOOD, EOI, b"left here by somebody", last=True),
    "text before the end, JFIF 0.00": replaced(
        before(GOOD, EOI, b"left here by somebody", last=True), VERSION, b"\0\0"
    ),
    "text behind the last restart": before(RESTARTS, EOI, b"left here by somebody", last=True),
    "text behind three scans": before(IN_SCANS, EOI, b"left here by somebody", last=True),
    "text between two scans": before(IN_SCANS, SOS, b"left here by somebody", last=True),
    "padding of a progressive file": before(PROGRESSIVE, EOI, bytes(500), last=True),
    "text behind the end": GOOD + b"left here by somebody" * 100,
    "another image behind the end": GOOD + encoded(PHOTO[:50, :50]),
    "a thumbnail with an end of its own": GOOD[:20] + b"\xff\xe1\x00\x0aExif\0\0\xff\xd9" + GOOD[20:],
    "a grey image of twofold sampling": replaced(
        encoded(PHOTO[..., 0]), encoded(PHOTO[..., 0]).index(SOF) + 11, b"\x22"
    ),
    "restarts": RESTARTS,
    "other Huffman tables": encoded(quality=85, optimize=True),
    "the standard's Huffman tables, left out": _without(GOOD, DHT),
}

_MIDDLE = len(GOOD) // 2
_BROKEN_TABLE = GOOD.index(DHT) + 5
DAMAGED = {
    "cut": GOOD[:_MIDDLE],
    "cut before the scan": GOOD[: GOOD.index(SOS)],
    "no end": GOOD[:-2],
    "cut, with an end": GOOD[:_MIDDLE] + EOI,
    "cut, with an end and padding": GOOD[:_MIDDLE] + bytes(300) + EOI,
    "overwritten": replaced(GOOD, _MIDDLE, NOISE[:16]),
    "overwritten, JFIF 0.00": replaced(replaced(GOOD, _MIDDLE, NOISE[:16]), VERSION, b"\0\0"),
    "overwritten between restarts": replaced(RESTARTS, len(RESTARTS) // 2, NOISE[:16]),
    "overwritten, progressive": replaced(PROGRESSIVE, len(PROGRESSIVE) * 3 // 4, NOISE[:200]),
    "a piece taken out": GOOD[:_MIDDLE] + GOOD[_MIDDLE + 999 :],
    "a piece twice": GOOD[:_MIDDLE] + GOOD[_MIDDLE - 999 :],
    "no frame": GOOD[:20] + EOI,
    "no table": GOOD[: GOOD.index(DQT)] + GOOD[GOOD.index(SOF) :],
    "a broken table": replaced(GOOD, _BROKEN_TABLE, b"\xff" * 16),
    "two beginnings": before(GOOD, DQT, b"\xff\xd8"),
    "a segment of no length": before(GOOD, DQT, b"\xff\xe5\0\0"),
    "no rows": replaced(GOOD, GOOD.index(SOF) + 5, b"\0\0"),
    "a sampling factor of 0": replaced(GOOD, GOOD.index(SOF) + 11, b"\0"),
    "5 components": replaced(GOOD, GOOD.index(SOF) + 9, b"\5"),
    "half of a component": GOOD[: GOOD.index(SOF) + 3] + b"\x0f" + GOOD[GOOD.index(SOF) + 4 :],
    "thousands of scans": PROGRESSIVE[:-2] + PROGRESSIVE[PROGRESSIVE.rindex(SOS) : -2] * 2000 + EOI,
}
