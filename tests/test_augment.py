import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfjax import augment


def images(batch=64, size=8):
    return jax.random.randint(jax.random.key(0), (batch, size, size, 3), 1, 256).astype(jnp.uint8)


def test_crops_are_windows_of_the_padded_image():
    batch = images()
    cropped = np.asarray(augment.random_crop(jax.random.key(1), batch, 2))
    assert cropped.dtype == np.uint8
    padded = np.pad(batch, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, source in zip(cropped, padded, strict=True):
        places = [(i, j) for i in range(5) for j in range(5) if (source[i : i + 8, j : j + 8] == image).all()]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 15  # of 25 places, over 64 images


def test_flips_mirror_half_of_the_images():
    batch = images(400)
    flipped = np.asarray(augment.random_flip(jax.random.key(1), batch))
    mirrored = np.asarray(batch[:, :, ::-1])
    is_mirrored = (flipped == mirrored).all((1, 2, 3))
    assert ((flipped == np.asarray(batch)).all((1, 2, 3)) | is_mirrored).all()
    assert 150 < is_mirrored.sum() < 250


def test_normalize():
    batch = images()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = (np.asarray(batch, np.float64) / 255 - mean) / std
    np.testing.assert_allclose(augment.normalize(batch, mean, std), expected, rtol=1e-5, atol=1e-6)


def test_augmentation_depends_on_the_key_only():
    batch = images()
    for function in (lambda key: augment.random_crop(key, batch, 2), lambda key: augment.random_flip(key, batch)):
        np.testing.assert_array_equal(function(jax.random.key(1)), jax.jit(function)(jax.random.key(1)))
        assert (function(jax.random.key(1)) != function(jax.random.key(2))).any()


FOUR_DEVICES = """
import functools
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from nfjax import augment

def alone(key, images):
    crop, flip, policy, erase = jax.random.split(key, 4)
    images = augment.random_flip(flip, augment.random_crop(crop, images, 2))
    return augment.random_erasing(erase, augment.rand_augment(policy, images, interpolation="bilinear"))

def everything(key, images):
    key, mix, cut = jax.random.split(key, 3)
    images = alone(key, images)
    mixed = augment.mixup(mix, augment.normalize(images, (0.5,) * 3, (0.25,) * 3), 0.4)
    return images, mixed, augment.cutmix(cut, images, 1.0)

assert jax.device_count() == 4
images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
one, four = (jax.jit(everything)(jax.random.key(7), x) for x in (images, sharded))
assert len(four[0].sharding.device_set) == 4, four[0].sharding
jax.tree.map(np.testing.assert_array_equal, one, four)
program = jax.jit(alone).lower(jax.random.key(7), sharded).compile().as_text()
crossing = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
assert not any(f" {name}(" in program for name in crossing), "what a device does to its images concerns no other"
print("equal")
"""


def test_four_devices_augment_as_one():
    xla_flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", FOUR_DEVICES], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "equal", run.stderr


def test_erased_rectangles():
    batch = jnp.full((2000, 24, 30, 3), 200, jnp.uint8)
    erase = jax.jit(lambda key, images: augment.random_erasing(key, images, value=(0, 1, 2)))
    erased = np.asarray(erase(jax.random.key(0), batch))
    assert set(np.unique(erased)) == {0, 1, 2, 200}
    is_erased = erased[..., 0] == 0
    assert ((erased == (0, 1, 2)).all(-1) == is_erased).all()
    hit = is_erased[is_erased.any((1, 2))]
    assert abs(len(hit) / 2000 - 0.5) < 0.04
    rows, columns = hit.any(2), hit.any(1)
    # What is erased is the rectangle of its rows and columns, which have no gaps.
    assert (hit == rows[:, :, None] & columns[:, None, :]).all()
    for line in (rows, columns):
        assert (np.abs(np.diff(np.pad(line, ((0, 0), (1, 1))).astype(int))).sum(1) == 2).all()
    height, width = rows.sum(1), columns.sum(1)
    area, ratio = height * width / (24 * 30), height / width
    # Sides are rounded to pixels.
    assert 0.01 < area.min() < 0.03
    assert 0.3 < area.max() < 0.36
    assert 0.2 < ratio.min() < 0.35
    assert 2.8 < ratio.max() < 3.9
    assert abs(area.mean() - 0.175) < 0.02
    assert abs(np.log(ratio).mean()) < 0.1
    for line, size in ((rows, 24), (columns, 30)):
        assert line[:, 0].any()
        assert line[:, -1].any()
        assert abs(line.mean(0)[: size // 2].sum() - line.mean(0)[size - size // 2 :].sum()) < 0.5


def test_erasing_with_noise_always_and_never():
    batch = jnp.full((64, 16, 16, 3), 9.0)
    erase = jax.jit(augment.random_erasing, static_argnames=("probability", "value"))
    erased = np.asarray(erase(jax.random.key(0), batch, probability=1.0, value="random"))
    noise = erased[erased != 9]
    assert (erased != 9).any((1, 2, 3)).all()
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.05
    np.testing.assert_array_equal(erase(jax.random.key(0), batch, probability=0.0), batch)


mixup = jax.jit(augment.mixup, static_argnames="alpha")


def test_mixup_is_the_weighted_sum_with_the_partner():
    batch = jax.random.normal(jax.random.key(0), (256, 4, 4, 3))
    mixed, partner, weight = mixup(jax.random.key(1), batch, alpha=0.4)
    assert partner.dtype == jnp.int32
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.sort(partner), np.arange(256))
    share = np.asarray(weight, np.float64)[:, None, None, None]
    x = np.asarray(batch, np.float64)
    np.testing.assert_allclose(mixed, share * x + (1 - share) * x[partner], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_weights_are_from_beta(alpha):
    _, _, weight = mixup(jax.random.key(2), jnp.zeros((20_000, 1, 1, 1)), alpha=alpha)
    weight = np.asarray(weight, np.float64)
    assert np.isfinite(weight).all()
    assert abs(weight.mean() - 0.5) < 0.015
    assert abs(weight.var() - 1 / (4 * (2 * alpha + 1))) < 0.005


def test_mixup_passes_gradients():
    key, batch = jax.random.key(1), jnp.ones((256, 4, 4, 3))
    gradient = jax.grad(lambda x: mixup(key, x, alpha=0.4)[0].sum())(batch)
    _, partner, weight = mixup(key, batch, alpha=0.4)
    expected = weight + jnp.zeros(256).at[partner].add(1 - weight)
    np.testing.assert_allclose(gradient[:, 0, 0, 0], expected, rtol=1e-6)


def test_mixup_and_cutmix_keep_the_dtype():
    batch = jax.ShapeDtypeStruct((8, 4, 4, 3), jnp.bfloat16)
    for function in (augment.mixup, augment.cutmix):
        mixed, _, weight = jax.eval_shape(lambda x, f=function: f(jax.random.key(0), x, 0.2), batch)
        assert mixed.dtype == jnp.bfloat16
        assert weight.dtype == jnp.float32


def test_cutmix_pastes_a_rectangle_and_weighs_it_exactly():
    batch = jnp.broadcast_to(jnp.arange(200, dtype=jnp.uint8)[:, None, None, None], (200, 12, 20, 3))
    mixed, partner, weight = jax.jit(augment.cutmix, static_argnums=2)(jax.random.key(3), batch, 1.0)
    mixed, partner = np.asarray(mixed), np.asarray(partner)
    pasted = mixed[..., 0] != np.arange(200)[:, None, None]
    assert (mixed == np.where(pasted, partner[:, None, None], np.arange(200)[:, None, None])[..., None]).all()
    moved = partner != np.arange(200)
    np.testing.assert_allclose(weight[moved], 1 - pasted.mean((1, 2))[moved], rtol=2e-7)
    assert (pasted == pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :]).all()
    assert 0.5 < weight.mean() < 0.75  # more than the 1/2 of Beta(1, 1): rectangles are cut off at the border


def test_examples_that_are_not_there_are_mixed_into_no_other():
    batch = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    mask = jnp.ones(64).at[jnp.array([0, 7, 8, 63])].set(0.0)
    for function in (augment.mixup, augment.cutmix):
        mixed, partner, weight = jax.jit(lambda x, f=function: f(jax.random.key(1), x, 1.0, mask))(batch)
        alone = np.asarray(mask)[partner] == 0
        np.testing.assert_array_equal(np.flatnonzero(alone), [0, 1, 8, 9])
        np.testing.assert_array_equal(weight[alone], 1)
        np.testing.assert_array_equal(mixed[alone], batch[alone])
        assert (np.asarray(weight)[~alone] < 1).mean() > 0.8


def test_alpha_zero_mixes_nothing():
    batch = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    for function in (augment.mixup, augment.cutmix):
        mixed, _, weight = jax.jit(lambda x, f=function: f(jax.random.key(1), x, 0))(batch)
        np.testing.assert_array_equal(mixed, batch)
        np.testing.assert_array_equal(weight, np.ones(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: augment.mixup(jax.random.key(0), x, 0.2), "dtype uint8: mixup expects floats.*`normalize` first"),
        (lambda x: augment.cutmix(jax.random.key(0), x, -1.0), "alpha=-1.0: expected 0, for no mixing"),
        (lambda x: augment.cutmix(jax.random.key(0), x[0], 1.0), r"shape \(8, 8, 3\): expected \[B, H, W, C\]"),
        (lambda x: augment.random_erasing(jax.random.key(0), x, probability=2), "probability=2: expected a probab"),
        (lambda x: augment.random_erasing(jax.random.key(0), x, scale=(0.5, 0.1)), r"scale=\(0.5, 0.1\): expected"),
        (lambda x: augment.random_erasing(jax.random.key(0), x, ratio=(0, 2)), r"ratio=\(0, 2\): expected"),
        (lambda x: augment.random_erasing(jax.random.key(0), x, value="random"), "'random' for images of dtype uint8"),
        (lambda x: augment.random_erasing(jax.random.key(0), x, value=0.5), "expected integers from 0 to 255"),
        (lambda x: augment.random_erasing(jax.random.key(0), x, value=(1, 2)), "expected one number or 3"),
    ],
)
def test_arguments_that_cannot_work(call, message):
    with pytest.raises(ValueError, match=message):
        call(images(4))


KEYED = {
    "random_crop": lambda key, x: augment.random_crop(key, x, 2),
    "random_flip": augment.random_flip,
    "random_erasing": augment.random_erasing,
    "rand_augment": augment.rand_augment,
    "cutmix": lambda key, x: augment.cutmix(key, x, 1.0),
    "mixup": lambda key, x: augment.mixup(key, augment.normalize(x, (0.5,) * 3, (0.5,) * 3), 1.0),
}
PLAIN = {
    "normalize": lambda x: augment.normalize(x, (0.5,) * 3, (0.5,) * 3),
    "apply": lambda x: augment.apply(x, "rotate", 9),
}


@pytest.mark.parametrize("name", [*KEYED, *PLAIN])
def test_what_is_no_batch_of_images_is_refused(name):
    call = PLAIN.get(name) or (lambda x: KEYED[name](jax.random.key(0), x))
    call(images(2))
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\): expected \[B, H, W, C\].*images\[None\]"):
        call(images(2)[0])
    with pytest.raises(ValueError, match=r"shape \(8, 8\): expected \[B, H, W, C\]"):
        call(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"images of type list: expected an array \[B, H, W, C\]"):
        call(images(2).tolist())


@pytest.mark.parametrize("name", KEYED)
def test_what_is_no_key_is_refused(name):
    for key, shown in ((0, "int"), (None, "NoneType"), (np.zeros(2, np.int32), "int32"), (jnp.float32(3), "float32")):
        with pytest.raises(ValueError, match=rf"key of type {shown}.*: expected one key, such as jax.random.key\(0\)"):
            KEYED[name](key, images(2))
    with pytest.raises(ValueError, match="expected one key"):
        KEYED[name](jax.random.split(jax.random.key(0)), images(2))
    old, new = KEYED[name](jax.random.PRNGKey(3), images(2)), KEYED[name](jax.random.key(3), images(2))
    jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: augment.normalize(x.astype(jnp.float32), (0.5,) * 3, (0.5,) * 3), r"dtype float32: expected uint8"),
        (lambda x: augment.normalize(x.astype(jnp.int32), (0.5,) * 3, (0.5,) * 3), "dtype int32: expected uint8"),
        (lambda x: augment.normalize(x, (124.0, 116.0, 104.0), (0.5,) * 3), "mean=.*0 to 1.*divided by 255"),
        (lambda x: augment.normalize(x, (0.5,) * 3, (58.0, 57.0, 57.0)), "std=.*more than 0 to 1.*divided by 255"),
        (lambda x: augment.normalize(x, (0.5,) * 3, (0.5, 0.0, 0.5)), r"std=\(0.5, 0.0, 0.5\): expected more than 0"),
        (lambda x: augment.normalize(x, (0.5,) * 3, (0.5, float("nan"), 0.5)), "std=.*expected more than 0 to 1"),
        (lambda x: augment.normalize(x, (0.5, 0.5), (0.5,) * 3), r"mean=\(0.5, 0.5\): expected 3 numbers"),
        (lambda x: augment.normalize(x, 0.5, (0.5,) * 3), "mean=0.5: expected 3 numbers, one per channel"),
        (lambda x: augment.normalize(x[..., :1], (0.5,) * 3, (0.5,) * 3), "expected 1 numbers, one per channel"),
        (lambda x: augment.random_crop(jax.random.key(0), x, 8), "padding=8: expected 0 to 7, less than the image's"),
        (lambda x: augment.random_crop(jax.random.key(0), x, -1), "padding=-1: expected 0 to 7"),
        (lambda x: augment.random_crop(jax.random.key(0), x, 1.5), "padding=1.5: expected a Python integer"),
        (lambda x: augment.cutmix(jax.random.key(0), x, float("nan")), "alpha=nan: expected 0, for no mixing"),
        (lambda x: augment.cutmix(jax.random.key(0), x, 1.0, jnp.ones(3)), r"mask of shape \(3,\): expected .*\[4\]"),
    ],
)
def test_more_arguments_that_cannot_work(call, message):
    with pytest.raises(ValueError, match=message):
        call(images(4))


def test_a_mean_of_zero_and_a_deviation_of_one_give_pixels_from_0_to_1():
    batch = images(2)
    given = augment.normalize(batch, (0.0,) * 3, (1.0,) * 3)
    np.testing.assert_allclose(given, np.asarray(batch) / 255.0, rtol=1e-6)
