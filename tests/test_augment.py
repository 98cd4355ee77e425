import jax
import jax.numpy as jnp
import numpy as np

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
