"""Crops on the host: geometry by torchvision's rules, pixels by Pillow's."""

import numpy as np
import pytest
from PIL import Image
from test_decode import PHOTO, encoded, pillow

from nfjax.data.decoding import crops


def test_boxes_have_the_areas_and_aspects_asked_for():
    crop = crops.RandomResizedCrop(224)
    boxes = np.array([crop.box(400, 500, position) for position in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 500).all()
    share, ratio = height * width / 200_000, width / height
    assert 0.079 < share.min() < 0.09
    assert 0.95 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.03
    # Uniform in area where every box fits: half of those below a half are below the middle of that range.
    small = share[share < 0.5]
    assert np.mean(small < 0.29) == pytest.approx(0.5, abs=0.03)
    assert left[width < 300].max() + 300 > 480


def test_a_crop_is_a_function_of_seed_and_position():
    first, other = crops.RandomResizedCrop(32, seed=1), crops.RandomResizedCrop(32, seed=2)
    assert first.box(100, 100, 7) == crops.RandomResizedCrop(32, seed=1).box(100, 100, 7)
    assert len({first.box(100, 100, p) for p in range(50)} | {other.box(100, 100, p) for p in range(50)}) == 100


def test_no_box_fits_a_very_long_image():
    crop = crops.RandomResizedCrop(8)
    assert crop.box(20, 20_000, 0) == (0, 9986, 20, 27)
    assert crop.box(20_000, 20, 0) == (9986, 0, 27, 20)
    assert crop.box(1, 1, 0) == (0, 0, 1, 1)
    assert crop(encoded(Image.new("RGB", (1, 1), (5, 6, 7)), "PNG"), 0).tolist() == [[[5, 6, 7]] * 8] * 8


@pytest.mark.parametrize(("size", "mean", "most"), [(224, 1.0, 2.5), (96, 2.0, 4.0), (32, 2.5, 5.0)])
def test_pixels_are_pillows_antialiased_ones(size, mean, most):
    """Within one grey level on average at 224 pixels; this photograph is one of fine detail, reduced up to 13 times."""
    data, crop, differences = encoded(quality=90), crops.RandomResizedCrop(size), []
    for position in range(40):
        ours = crop(data, position)
        assert ours.shape == (size, size, 3)
        assert ours.dtype == np.uint8
        box = crop.box(427, 640, position)
        factor = crops.reduction(box, size)
        top, left, height, width = (n // factor * factor for n in box)
        whole = Image.fromarray(pillow(data)[top : top + height, left : left + width])
        theirs = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR), np.int32)
        differences.append(np.abs(ours - theirs).mean())
    assert np.mean(differences) < mean
    assert np.max(differences) < most


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (64, 64), (8, 10), (500, 512)])
def test_the_centre_is_that_of_resizing_and_cutting_with_pillow(kind, size, resize):
    data = encoded(kind=kind, **({"quality": 90} if kind == "JPEG" else {}))
    whole = Image.fromarray(pillow(data))
    width = int(resize * 640 / 427)
    whole = whole.resize((width, resize), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((resize - size) / 2)
    expected = np.asarray(whole.crop((left, top, left + size, top + size)), np.int32)
    ours = crops.CentreCrop(size, resize)(data)
    assert ours.dtype == np.uint8
    assert np.abs(ours - expected).mean() < (0.1 if kind == "PNG" or size > 213 else 2)


def test_an_image_of_the_right_size_is_left_alone():
    small = PHOTO[:32, :32]
    np.testing.assert_array_equal(crops.CentreCrop(32, 32)(encoded(small, "PNG")), small)


@pytest.mark.parametrize("shape", [(1, 1), (20, 20_000), (20_000, 20), (223, 224), (3, 2)])
def test_centre_of_any_shape(shape):
    for kind in ("JPEG", "PNG"):
        pixels = crops.CentreCrop(224, 256)(encoded(Image.new("RGB", shape, (50, 60, 70)), kind))
        assert pixels.shape == (224, 224, 3)
        assert np.abs(pixels.astype(int) - (50, 60, 70)).max() <= 3


def test_a_constant_image_stays_constant():
    for factor in (0.5, 1.0, 1.3, 2.0, 2.7, 5.0):
        side = int(64 * factor)
        pixels = crops.resize(np.full((side, side + 3, 3), 200, np.uint8), 64)
        np.testing.assert_array_equal(pixels, 200)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crops.RandomResizedCrop(8, scale=(0.0, 1.0)), "scale=.*expected 0 < low <= high <= 1"),
        (lambda: crops.RandomResizedCrop(8, scale=(0.1, 1.5)), "scale="),
        (lambda: crops.RandomResizedCrop(8, ratio=(2, 1)), "ratio="),
        (lambda: crops.CentreCrop(224, 200), "expected resize >= size"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
