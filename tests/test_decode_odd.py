"""JPEG files as strangers have them: what Pillow reads is read, damage is not, and no file changes the next."""

import concurrent.futures

import numpy as np
import pytest
import simplejpeg
from odd_jpegs import DAMAGED, GOOD, HARMLESS, NOISE, PHOTO, adobe, encoded, pillow, replaced, sampled
from test_decode import decoder  # noqa: F401

from nfjax.data.decoding import crops, decode, huffman, markers

pytestmark = pytest.mark.usefixtures("decoder")
WHOLE = pillow(GOOD)
BOX = (64, 40, 100, 160)


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_what_costs_no_pixel_is_no_damage(data):
    expected = pillow(data)
    np.testing.assert_array_equal(decode.decode(data), expected)
    np.testing.assert_array_equal(decode.region(data, BOX, 1), expected[64:164, 40:200])
    np.testing.assert_array_equal(decode.region(data, BOX, 1, checked=True), expected[64:164, 40:200])
    if expected.shape == WHOLE.shape and np.array_equal(expected, WHOLE):
        reduced = decode.region(data, BOX, 4).copy()
        np.testing.assert_array_equal(reduced, decode.region(GOOD, BOX, 4))


@pytest.mark.parametrize("data", (HARMLESS | DAMAGED).values(), ids=HARMLESS | DAMAGED)
def test_a_good_file_after_each(data):
    """The decoder of this thread is the same for all; twice, for a state might show later only."""
    for _ in range(2):
        try:
            decode.decode(data)
        except decode.BadImageError:
            assert any(data is one for one in DAMAGED.values())
        np.testing.assert_array_equal(decode.decode(GOOD), WHOLE)
        np.testing.assert_array_equal(decode.region(GOOD, BOX, 1), WHOLE[64:164, 40:200])


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_found_and_named(data):
    with pytest.raises(decode.BadImageError) as caught:
        decode.decode(data)
    assert caught.value.cause in ("damaged JPEG", "truncated JPEG", "no pixels", "too many scans")


def test_threads_with_bad_files_among_the_good():
    files = [file for bad in [*HARMLESS.values(), *DAMAGED.values()] for file in (bad, GOOD, GOOD)]

    def decoded(data):
        try:
            return decode.decode(data).copy()
        except decode.BadImageError:
            return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for data, pixels in zip(files, pool.map(decoded, files), strict=True):
            if data is GOOD:
                np.testing.assert_array_equal(pixels, WHOLE)
            assert (pixels is None) == any(data is one for one in DAMAGED.values())


def test_bytes_left_behind_are_told_from_an_end_that_was_garbled():
    """Both make libjpeg warn of extraneous bytes. Every file that it warns of is refused, unless the bytes are ours."""
    rng, small = np.random.default_rng(0), encoded(PHOTO[:120, :160], quality=85)
    found = 0
    for _ in range(50):
        at = int(rng.integers(small.index(b"\xff\xda") + 20, len(small) - 200))
        damaged = replaced(small, at, rng.integers(0, 255, 16, dtype=np.uint8).tobytes())
        try:
            simplejpeg.decode_jpeg(damaged)
        except ValueError as warning:
            found += "extraneous" in str(warning)
            with pytest.raises(decode.BadImageError, match="damaged JPEG"):
                decode.decode(damaged)
    assert found >= 5
    for length in (1, 2, 3, 8, 20, 50, 150, 400):
        left = rng.integers(0, 255, length, dtype=np.uint8).tobytes().replace(b"\xff", b"")
        np.testing.assert_array_equal(decode.decode(small[:-2] + left + small[-2:]), pillow(small))


SAMPLINGS = {
    "4:1:0": [(4, 2), (1, 1), (1, 1)],
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "4:4:1": [(1, 4), (1, 1), (1, 1)],
    "4:4:0": [(1, 2), (1, 1), (1, 1)],
    "4:2:0": [(2, 2), (1, 1), (1, 1)],
    "3:1:1": [(3, 1), (1, 1), (1, 1)],
    "4:4:4 by other factors": [(2, 1), (2, 1), (2, 1)],
    "4:2:2 by other factors": [(2, 2), (1, 2), (1, 2)],
    "mixed": [(2, 2), (2, 1), (1, 1)],
    "colours finer than brightness": [(1, 1), (2, 2), (2, 2)],
    "one colour finer": [(2, 1), (1, 1), (2, 1)],
}
FOUR = {
    "4:4:4:4": [(1, 1)] * 4,
    "4:2:0:4": [(2, 2), (1, 1), (1, 1), (2, 2)],
    "odd": [(2, 1), (1, 2), (1, 1), (2, 2)],
}


@pytest.mark.parametrize("factors", SAMPLINGS.values(), ids=SAMPLINGS)
def test_any_chroma_subsampling(factors):
    compare_with_pillow(sampled(factors))


@pytest.mark.parametrize("factors", FOUR.values(), ids=FOUR)
@pytest.mark.parametrize("transform", [0, 2, 7])
def test_four_components_of_any_subsampling(factors, transform):
    """CMYK, YCCK, and a transform that does not exist."""
    compare_with_pillow(sampled(factors, "CMYK", transform))


@pytest.mark.parametrize("transform", [0, 1])
def test_three_components_by_adobe(transform):
    """RGB, and YCbCr."""
    compare_with_pillow(sampled([(1, 1)] * 3, "RGB" if transform == 0 else "YCbCr", transform))


def compare_with_pillow(data):
    expected = pillow(data)
    assert expected.std() > 20  # it is a picture at all
    assert decode.size(data) == PHOTO.shape[:2]
    np.testing.assert_array_equal(decode.decode(data), expected)
    rng = np.random.default_rng(0)
    for _ in range(12):
        top, left = int(rng.integers(0, 200)), int(rng.integers(0, 290))
        height, width = int(rng.integers(1, 204 - top)), int(rng.integers(1, 302 - left))
        for checked in (False, True):
            pixels = decode.region(data, (top, left, height, width), 1, checked)
            np.testing.assert_array_equal(pixels, expected[top : top + height, left : left + width])
    reduced = decode.region(data, (0, 0, 203, 301), 2)
    assert reduced.shape == (102, 151, 3)
    means = expected[:202, :300].reshape(101, 2, 150, 2, 3).mean((1, 3))
    assert np.abs(reduced[:101, :150] - means).mean() < 2.5
    crop = crops.RandomResizedCrop(64)(data, 3)
    assert crop.shape == (64, 64, 3)


@pytest.mark.parametrize("factors", [SAMPLINGS["4:1:0"], [(1, 1)] * 3])
def test_damage_in_an_unusual_file_is_found(factors, decoder):  # noqa: F811
    """Pillow passes over it. Where the library of the fast path knows the form, it is asked; simplejpeg does not."""
    transform = None if factors == SAMPLINGS["4:1:0"] else 0
    data = sampled(factors, "YCbCr" if transform is None else "RGB", transform)
    cut = data[: len(data) - 400] + b"\xff\xd9"
    if decode._region_decoder() is None and transform is None:
        np.testing.assert_array_equal(decode.decode(cut), pillow(cut))
        return
    with pytest.raises(decode.BadImageError, match="damaged JPEG: Corrupt JPEG data"):
        decode.decode(cut)
    np.testing.assert_array_equal(decode.decode(data), pillow(data))


def test_what_nobody_decodes_is_named_so():
    """Twelve bits; factors that do not divide each other."""
    at = GOOD.index(b"\xff\xc0")
    for data in (replaced(replaced(GOOD, at + 1, b"\xc1"), at + 4, b"\x0c"), sampled([(3, 1), (2, 1), (1, 1)])):
        with pytest.raises(decode.BadImageError, match="unknown kind of JPEG"):
            decode.decode(data)
        np.testing.assert_array_equal(decode.decode(GOOD), WHOLE)


def test_the_frame_header():
    assert markers.frame(GOOD) == markers.Frame(0xC0, 8, 203, 301, {1: (2, 2), 2: (1, 1), 3: (1, 1)})
    units, blocks = markers.frame(GOOD).mcus([1, 2, 3])
    assert (units, blocks) == (13 * 19, [4, 1, 1])
    assert markers.frame(GOOD).mcus([2]) == (-(-102 // 8) * -(-151 // 8), [1])
    with pytest.raises(ValueError, match="no frame header"):
        markers.frame(DAMAGED["no frame"])


def test_huffman_codes_are_those_of_the_standard():
    """Table K.3: the codes for the categories of luminance DC differences."""
    counts, symbols = bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]), bytes(range(12))
    table = huffman.tables(b"\0" + counts + symbols)[0]
    for category, code in enumerate(["00", "010", "011", "100", "101", "110", "1110", "11110", "111110"]):
        for rest in ("0", "1"):
            assert table[int(code.ljust(16, rest), 2)] == len(code) << 8 | category
    assert table[0xFFFF] == 0
    for broken in (b"\0" + bytes([3]) + bytes(15) + symbols[:3], b"\0" + counts + symbols[:5], b"\0\1"):
        with pytest.raises(ValueError, match="Huffman table"):
            huffman.tables(broken)
    assert adobe(1)[:4] == b"\xff\xee\x00\x0e"
    assert len(NOISE) == 700


def test_zeros_behind_a_whole_image_are_padding_however_many():
    """Some numbers of zeros read as whole units of nothing."""
    small = encoded(PHOTO[:24, :32], quality=85)
    for count in range(1, 400, 3):
        np.testing.assert_array_equal(decode.decode(small[:-2] + bytes(count) + small[-2:]), pillow(small))
