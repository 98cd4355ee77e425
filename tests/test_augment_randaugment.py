"""RandAugment against Pillow: every operation at every bin with both signs, on photographs and on degenerate images."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from nfjax import augment
from nfjax.augment import _color

BINS = 31
FILL = (7, 130, 255)
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}

PILLOW = {
    "identity": lambda image, m, how: image,
    "shear_x": lambda image, m, how: affine(image, (1, m, 0, 0, 1, 0), how),
    "shear_y": lambda image, m, how: affine(image, (1, 0, 0, m, 1, 0), how),
    "translate_x": lambda image, m, how: affine(image, (1, 0, -int(m), 0, 1, 0), how),
    "translate_y": lambda image, m, how: affine(image, (1, 0, 0, 0, 1, -int(m)), how),
    "rotate": lambda image, m, how: image.rotate(m, RESAMPLING[how], fillcolor=FILL),
    "brightness": lambda image, m, how: ImageEnhance.Brightness(image).enhance(1 + m),
    "color": lambda image, m, how: ImageEnhance.Color(image).enhance(1 + m),
    "contrast": lambda image, m, how: ImageEnhance.Contrast(image).enhance(1 + m),
    "sharpness": lambda image, m, how: ImageEnhance.Sharpness(image).enhance(1 + m),
    "posterize": lambda image, m, how: ImageOps.posterize(image, int(m)),
    "solarize": lambda image, m, how: ImageOps.solarize(image, m),
    "autocontrast": lambda image, m, how: ImageOps.autocontrast(image),
    "equalize": lambda image, m, how: ImageOps.equalize(image),
}


def affine(image, matrix, how):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, RESAMPLING[how], fillcolor=FILL)


@functools.cache
def photographs(height, width):
    """Four pieces of two photographs, coarse and fine, uint8 [4, H, W, 3]."""
    pieces = []
    for photograph in load_sample_images().images:
        image = Image.fromarray(photograph)
        for box in ((0, 0, 640, 427), (250, 150, 250 + 3 * width, 150 + 3 * height)):
            pieces.append(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return np.stack([np.asarray(piece) for piece in pieces])


@functools.cache
def samples(height, width):
    """The photographs, and images with few levels, some of which have only one."""
    random = np.random.default_rng(0)
    shape = (height, width, 3)
    made = [
        np.zeros(shape),
        np.full(shape, 255),
        np.full(shape, (0, 77, 200)),
        np.where(random.random(shape) < 0.3, 20, 201),
        np.where(np.arange(height * width * 3).reshape(shape) == 5, 9, 8),
        random.integers(100, 103, shape),
        random.integers(0, 256, shape),
    ]
    return np.concatenate([photographs(height, width), np.stack(made).astype(np.uint8)])


@functools.cache
def compiled(interpolation):
    return jax.jit(functools.partial(augment.apply, bins=BINS, fill=FILL, interpolation=interpolation))


def ours_and_pillows(name, images, interpolation, bins=range(BINS)):
    """Both uint8 [bins * 2 * B, H, W, 3], for every bin and sign."""
    height, width = images.shape[1:3]
    operation = augment.OPERATIONS[name]
    magnitudes = operation.magnitudes(BINS, height, width) if operation.magnitudes else np.zeros(BINS)
    settings = [(i, sign) for i in bins for sign in (1, -1)]
    chosen, signs = (np.repeat(column, len(images)).astype(np.int32) for column in zip(*settings, strict=True))
    position = np.full(len(chosen), list(augment.OPERATIONS).index(name), np.int32)
    ours = compiled(interpolation)(np.tile(images, (len(settings), 1, 1, 1)), position, chosen, signs)
    theirs = []
    for i, sign in settings:
        magnitude = float(magnitudes[i]) * (sign if operation.signed else 1)
        theirs += [np.asarray(PILLOW[name](Image.fromarray(image), magnitude, interpolation)) for image in images]
    return np.asarray(ours), np.stack(theirs)


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_every_bin_and_sign_is_exactly_pillows(name, size):
    ours, theirs = ours_and_pillows(name, samples(*size), "nearest")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_bilinear_is_pillows(name, size):
    ours, theirs = ours_and_pillows(name, samples(*size), "bilinear")
    difference = np.abs(ours.astype(int) - theirs)
    if name == "rotate":  # a rotation by float64 can put a pixel just below a whole level
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.002
    else:
        assert difference.max() == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 5)])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_images_of_a_few_pixels(name, size):
    ours, theirs = ours_and_pillows(name, samples(*size), "nearest", bins=(0, 9, 30))
    np.testing.assert_array_equal(ours, theirs)


def test_autocontrast_of_every_pair_of_levels():
    low, high = np.triu_indices(256)
    low, high = (np.append(x, [0] * (-len(x) % 3)).reshape(-1, 1, 1, 3) for x in (low, high))
    images = np.clip(np.arange(256).reshape(1, 1, 256, 1), low, high).astype(np.uint8)
    ours = jax.jit(lambda x: _color.apply_table(x, _color.autocontrast_table(_color.histogram(x))))(images)
    theirs = [np.asarray(ImageOps.autocontrast(Image.fromarray(image))) for image in images]
    np.testing.assert_array_equal(ours, np.stack(theirs))


def test_blend_of_every_pair_of_levels():
    magnitudes = augment.OPERATIONS["color"].magnitudes(BINS, 32, 32).astype(np.float64)
    factors = np.concatenate([1 + magnitudes, 1 - magnitudes, [1 / 3, 2.5, 7.7]])
    degenerate, image = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    ours = jax.jit(_color.blend)(
        degenerate[None].astype(np.int32), image[None].astype(np.uint8), factors.astype(np.float32).reshape(-1, 1, 1)
    )
    first, second = (Image.fromarray(x.astype(np.uint8)) for x in (degenerate, image))
    np.testing.assert_array_equal(ours, np.stack([np.asarray(Image.blend(first, second, f)) for f in factors]))


def test_both_histograms():
    images = samples(33, 47)
    expected = [[np.bincount(image[..., i].ravel(), minlength=256) for i in range(3)] for image in images]
    for histogram in (_color.histogram, _color.histogram_by_scatter, _color.histogram_by_comparison):
        np.testing.assert_array_equal(jax.jit(histogram)(images), expected)


def test_magnitudes_are_those_of_torchvision():
    # The first, second, second to last and last of torch.linspace, and posterize by its own formula.
    expected = {
        "translate_x": (0.0, 0.70996976, 20.589123, 21.299093),
        "translate_y": (0.0, 0.4984894, 14.456193, 14.954682),
        "solarize": (255.0, 246.5, 8.5, 0.0),
        "rotate": (0.0, 1.0, 29.0, 30.0),
    }
    for name, values in expected.items():
        magnitudes = augment.OPERATIONS[name].magnitudes(31, 33, 47)
        assert magnitudes.dtype == np.float32
        np.testing.assert_array_equal(magnitudes[[0, 1, 29, 30]], np.float32(values))
    bits = augment.OPERATIONS["posterize"].magnitudes(31, 33, 47)
    assert bits.tolist() == [8] * 4 + [7] * 8 + [6] * 7 + [5] * 8 + [4] * 4
    assert {name for name, operation in augment.OPERATIONS.items() if operation.signed} == {
        *GEOMETRIC, "brightness", "color", "contrast", "sharpness"
    }  # fmt: skip


def test_the_policy_is_its_operations_one_after_the_other():
    images, key = np.concatenate([samples(32, 32)] * 6), jax.random.key(3)
    augmented = jax.jit(functools.partial(augment.rand_augment, magnitude=17, fill=FILL))(key, images)
    operations, signs = augment.choose(key, len(images), 2)
    names = list(augment.OPERATIONS)
    for i, image in enumerate(images):
        expected = Image.fromarray(image)
        for position, sign in zip(operations[:, i].tolist(), signs[:, i].tolist(), strict=True):
            operation = augment.OPERATIONS[names[position]]
            magnitude = float(operation.magnitudes(BINS, 32, 32)[17]) if operation.magnitudes else 0.0
            magnitude *= sign if operation.signed else 1
            expected = PILLOW[names[position]](expected, magnitude, "nearest")
        np.testing.assert_array_equal(augmented[i], expected)


def test_operations_and_signs_are_drawn_evenly_and_independently():
    operations, signs = (np.asarray(x) for x in augment.choose(jax.random.key(0), 14_000, 2))
    assert operations.shape == signs.shape == (2, 14_000)
    for row in operations:
        counts = np.bincount(row, minlength=14)
        assert counts.size == 14
        assert (abs(counts - 1000) < 150).all()
    assert abs((operations[0] == operations[1]).mean() - 1 / 14) < 0.01
    assert set(signs.ravel().tolist()) == {1, -1}
    assert (abs(signs.mean(1)) < 0.05).all()


def test_an_example_does_not_depend_on_the_others():
    images = np.concatenate([samples(32, 32), photographs(32, 32)])[:14]
    operations, magnitudes, signs = (np.full(14, value, np.int32) for value in (0, 20, -1))
    operations += np.arange(14, dtype=np.int32)
    apply = jax.jit(augment.apply)
    together = np.asarray(apply(images, operations, magnitudes, signs))
    for i in (0, 5, 13):  # the others become copies of this one
        one = np.full(14, i)
        alone = apply(images[one], operations[one], magnitudes, signs)
        np.testing.assert_array_equal(alone, together[one])


def test_names_positions_and_single_numbers_mean_the_same():
    images = samples(32, 32)[:3]
    names = ["rotate", "equalize", "color"]
    positions = np.array([list(augment.OPERATIONS).index(name) for name in names], np.int32)
    by_name = jax.jit(lambda images: augment.apply(images, names, 12, -1))(images)
    by_position = jax.jit(augment.apply)(images, positions, np.full(3, 12, np.int32), np.full(3, -1, np.int32))
    np.testing.assert_array_equal(by_name, by_position)


def test_no_operations_change_nothing():
    images = samples(32, 32)
    np.testing.assert_array_equal(augment.rand_augment(jax.random.key(0), images, num_operations=0), images)
    same = jax.jit(lambda images: augment.apply(images, "identity", 9))(images)
    np.testing.assert_array_equal(same, images)


def test_an_operation_of_ones_own(monkeypatch):
    invert = augment.Operation(lambda magnitude, height, width: augment.Change(threshold=0))
    monkeypatch.setitem(augment.OPERATIONS, "invert", invert)
    images = samples(32, 32)
    inverted = jax.jit(lambda images: augment.apply(images, "invert", 0))(images)
    np.testing.assert_array_equal(inverted, 255 - images)
    operations, _ = augment.choose(jax.random.key(0), 1000, 1)
    assert operations.max() == 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magnitude": 31}, "magnitude=31: expected 0 to 30; `bins`"),
        ({"magnitude": 9.5}, "magnitude=9.5: expected a Python integer"),
        ({"num_operations": -1}, "num_operations=-1: expected 0 or more"),
        ({"bins": 1, "magnitude": 0}, "bins=1: expected 2 or more"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': expected one of nearest, bilinear"),
        ({"fill": 256}, "fill=256: expected an integer from 0 to 255"),
        ({"fill": (1, 2)}, r"fill=\(1, 2\): expected an integer"),
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "dtype float32: expected uint8; augment before `normalize`"),
        ({"images": np.zeros((8, 8, 3), np.uint8)}, r"shape \(8, 8, 3\): expected \[B, H, W, C\]"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8)}, "expected 3 channels"),
        ({"images": np.zeros((1, 1, 2049, 3), np.uint8)}, "expected sides of 1 to 2048 pixels"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        augment.rand_augment(jax.random.key(0), **{"images": np.zeros((2, 8, 8, 3), np.uint8)} | settings)


@pytest.mark.parametrize(
    ("operations", "magnitudes", "message"),
    [
        ("invert", 9, "unknown operation 'invert': expected one of identity, shear_x"),
        (["identity"], 9, r"operations of shape \(1,\): expected one per image, \[2\]"),
        (14, 9, "operations from 14 to 14: expected 0 to 13"),
        (np.float32(1), 9, "operations of dtype float32: expected integers"),
        ("identity", 31, "magnitudes=31: expected 0 to 30"),
        ("identity", np.array([0, 31]), "magnitudes from 0 to 31: expected 0 to 30"),
    ],
)
def test_operations_that_there_are_not(operations, magnitudes, message):
    with pytest.raises(ValueError, match=message):
        augment.apply(np.zeros((2, 8, 8, 3), np.uint8), operations, magnitudes)
