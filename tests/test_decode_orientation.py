"""EXIF orientation: ignored unless it is asked for, and then what Pillow's exif_transpose gives."""

import io

import numpy as np
import pytest
import simplejpeg
from odd_jpegs import HARMLESS, PHOTO, encoded, sampled
from PIL import ExifTags, Image, ImageOps
from test_decode import decoder  # noqa: F401

from nfjax.data.decoding import crops, decode
from nfjax.data.packing import shards

pytestmark = pytest.mark.usefixtures("decoder")
ALL = range(1, 9)


def oriented(orientation, kind="JPEG", pixels=PHOTO, **options):
    noted = Image.Exif()
    noted[ExifTags.Base.Orientation] = orientation
    return encoded(pixels, kind, exif=noted, **({"quality": 90, "subsampling": 0} if kind == "JPEG" else {}), **options)


def upright(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("orientation", ALL)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_turned_as_pillow_does(orientation, kind):
    data = oriented(orientation, kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = upright(data)
    header = decode.header(data, upright=True)
    assert (header.height, header.width) == expected.shape[:2]
    rng = np.random.default_rng(orientation)
    boxes = [(0, 0, *expected.shape[:2]), *_boxes(rng, expected.shape, 6)]
    for box in boxes:
        pixels = decode.region(data, box, 1, False, header.orientation)
        top, left, height, width = box
        np.testing.assert_array_equal(pixels, expected[top : top + height, left : left + width])
        assert pixels.flags.c_contiguous or header.orientation == 1


def _boxes(rng, shape, count):
    for _ in range(count):
        top, left = int(rng.integers(0, shape[0] - 8)), int(rng.integers(0, shape[1] - 8))
        yield top, left, int(rng.integers(1, shape[0] - top + 1)), int(rng.integers(1, shape[1] - left + 1))


@pytest.mark.parametrize("orientation", ALL)
def test_ignored_by_default(orientation):
    """As by Pillow and torchvision. Of a TIFF, Pillow does not ignore it."""
    data = oriented(orientation)
    assert decode.header(data) == decode.Header(203, 301, (8, 4, 2, 1), 1)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode.decode(data), np.asarray(image))
    for crop in (crops.CentreCrop(40, 48), crops.RandomResizedCrop(40)):
        np.testing.assert_array_equal(crop(data, 5), crop(oriented(1), 5))
    tiff = oriented(orientation, "TIFF")
    assert decode.size(tiff) == upright(tiff).shape[:2]
    np.testing.assert_array_equal(decode.decode(tiff), upright(tiff))


@pytest.mark.parametrize("orientation", ALL)
@pytest.mark.parametrize("pixels", [PHOTO, PHOTO[:200, :296]], ids=["odd", "multiples of 8"])
def test_crops_are_those_of_the_upright_image(orientation, pixels):
    """Compared with the same crops of the upright pixels in a file of their own, which needs no reduction."""
    data = oriented(orientation, pixels=pixels)
    turned = encoded(upright(data), "PNG")
    exact = ((crops.RandomResizedCrop, {"scale": (0.4, 1.0), "seed": 3}), (crops.CentreCrop, {"resize": 190}))
    for kind, options in exact:
        ours, theirs = kind(180, upright=True, **options), kind(180, **options)
        for position in range(3):
            np.testing.assert_array_equal(ours(data, position), theirs(turned, position))


@pytest.mark.parametrize("orientation", ALL)
def test_reduced_crops_are_those_of_the_upright_image(orientation):
    """Of the upright pixels in a JPEG of their own, which is reduced likewise."""
    data = oriented(orientation, pixels=np.tile(PHOTO[:104, :152], (2, 2, 1)))
    turned = encoded(upright(data), quality=95, subsampling=0)
    for kind, options in ((crops.RandomResizedCrop, {"scale": (0.9, 1.0)}), (crops.CentreCrop, {"resize": 26})):
        ours, theirs = kind(24, upright=True, **options), kind(24, **options)
        for position in range(3):
            difference = ours(data, position).astype(int) - theirs(turned, position)
            assert np.abs(difference).mean() < 1


def test_a_reversed_image_is_reduced_only_by_what_divides_it():
    at = {o: decode.header(oriented(o, pixels=PHOTO[:200, :300]), upright=True).reductions for o in ALL}
    assert at == {1: (8, 4, 2, 1), 2: (4, 2, 1), 3: (4, 2, 1), 4: (8, 4, 2, 1)} | {
        5: (8, 4, 2, 1), 6: (8, 4, 2, 1), 7: (4, 2, 1), 8: (4, 2, 1)
    }  # fmt: skip


def test_odd_files_are_turned_too():
    odd = HARMLESS["JFIF 0.00"]
    data = decode.with_orientation(odd, 6)
    header = decode.header(data, upright=True)
    assert header.orientation == 6
    np.testing.assert_array_equal(decode.region(data, (0, 0, 301, 203), 1, False, 6), upright(data))
    unusual = decode.with_orientation(sampled([(4, 2), (1, 1), (1, 1)]), 8)
    np.testing.assert_array_equal(decode.region(unusual, (0, 0, 301, 203), 1, False, 8), upright(unusual))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_a_number_that_means_nothing_turns_nothing(orientation):
    assert decode.header(oriented(orientation), upright=True) == decode.Header(203, 301, (8, 4, 2, 1), 1)


def test_exif_that_is_none():
    broken = encoded()[:20] + b"\xff\xe1\x00\x10Exif\0\0brokenex" + encoded()[20:]
    assert decode.header(broken, upright=True).orientation == 1
    np.testing.assert_array_equal(crops.CentreCrop(32, 32, True)(broken), crops.CentreCrop(32, 32)(encoded()))


@pytest.mark.parametrize("orientation", ALL)
def test_packing_keeps_what_was_noted(orientation):
    data = oriented(orientation)
    assert shards.converted(data, None, 90) == data
    reduced = shards.converted(data, 100, 95)
    with Image.open(io.BytesIO(reduced)) as image:
        assert image.size == (148, 100)
        assert image.getexif().get(ExifTags.Base.Orientation, 1) == orientation
    assert reduced == decode.with_orientation(shards.converted(oriented(1), 100, 95), orientation)
    assert simplejpeg.decode_jpeg_header(reduced)[:2] == (100, 148)
    ours = crops.CentreCrop(64, 64, upright=True)
    assert np.abs(ours(reduced).astype(int) - ours(data)).mean() < 4
