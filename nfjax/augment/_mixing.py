"""Pairs of examples in one: Mixup (Zhang et al. 2018, arXiv 1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899).

Both return `(images, partner, weight)`: each example keeps `weight` of itself and takes the rest from the example
`partner` of the batch. The loss of an example is

    weight * cross_entropy(logits, labels) + (1 - weight) * cross_entropy(logits, labels[partner])

The partner is the example before: in a shuffled batch as good as any other, and where the batch is divided over
devices, only one image per device has to travel. The weight is drawn for each example; the authors' programs draw one
for the whole batch, which has the same distribution for each example and makes the batches differ more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nfjax.augment._checks import check_images, check_key, check_mask

Mixed = tuple[jax.Array, jax.Array, jax.Array]  # (images, partner int32 [B], weight float32 [B])


def mixup(key: jax.Array, images: jax.Array, alpha: float, mask: jax.Array | None = None) -> Mixed:
    """weight x + (1 - weight) x[partner], weight from Beta(alpha, alpha) (Zhang et al. 2018).

    Args:
        key: Of the weights.
        images: Floats [B, H, W, C], behind `normalize`; the result has their dtype.
        alpha: 0.2 to 0.4 on ImageNet and 1 on CIFAR in the paper; 0 changes nothing.
        mask: [B], 0 for examples that are not there; their neighbours keep all of themselves.

    Returns:
        (images, partner int32 [B], weight float32 [B]).

    Raises:
        ValueError: The images are integers, or alpha is negative.
    """
    check_key(key)
    check_images(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images of dtype {images.dtype}: mixup expects floats, for a weighted sum of levels is no level; call "
            "`normalize` first"
        )
    partner, weight = _pairs(key, images.shape[0], alpha, mask)
    share = weight.astype(images.dtype)[:, None, None, None]
    return share * images + (1 - share) * _of_partners(images), partner, weight


def cutmix(key: jax.Array, images: jax.Array, alpha: float, mask: jax.Array | None = None) -> Mixed:
    """A rectangle of each image replaced by the same rectangle of its partner.

    The rectangle has the image's proportions and the share 1 - l of its area, l from Beta(alpha, alpha); its centre is
    any pixel, and what lies outside of the image is cut off. The weight is the share that remains, counted in pixels
    (Yun et al. 2019).

    Args:
        key: Of the rectangles.
        images: [B, H, W, C] of any dtype, which the result keeps.
        alpha: 1 in the paper; 0 changes nothing.
        mask: As in `mixup`.

    Returns:
        (images, partner int32 [B], weight float32 [B]).

    Raises:
        ValueError: Alpha is negative.
    """
    check_key(key)
    check_images(images)
    batch, height, width, _ = images.shape
    pair_key, centre_key = jax.random.split(key)
    partner, kept = _pairs(pair_key, batch, alpha, mask)
    side = jnp.sqrt(1 - kept)
    centre = jax.random.uniform(centre_key, (batch, 2), jnp.float32)
    inside = jnp.ones((1, 1, 1), bool)
    area = jnp.ones((batch,), jnp.int32)
    for axis, size in enumerate((height, width)):
        middle = jnp.minimum((centre[:, axis] * size).astype(jnp.int32), size - 1)
        half = (side * size).astype(jnp.int32) // 2
        start, stop = jnp.maximum(middle - half, 0), jnp.minimum(middle + half, size)
        positions = jax.lax.broadcasted_iota(jnp.int32, (1, height, width), axis + 1)
        inside = inside & (positions >= start[:, None, None]) & (positions < stop[:, None, None])
        area *= stop - start
    weight = (height * width - area).astype(jnp.float32) / (height * width)
    return jnp.where(inside[..., None], _of_partners(images), images), partner, weight


def _pairs(key: jax.Array, batch: int, alpha: float, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The partners, int32 [B], and weights from Beta(alpha, alpha), float32 [B]."""
    if isinstance(alpha, str) or not 0 <= alpha <= jnp.finfo(jnp.float32).max:
        raise ValueError(f"alpha={alpha}: expected 0, for no mixing, or a positive number")
    check_mask(mask, batch)
    partner = _of_partners(jnp.arange(batch, dtype=jnp.int32))
    if alpha == 0:
        return partner, jnp.ones((batch,), jnp.float32)
    # Beta(alpha, alpha) is X / (X + Y) of two gammas; through logarithms, for those of a small alpha underflow.
    log_x, log_y = jax.random.loggamma(key, alpha, (2, batch), jnp.float32)
    weight = jax.nn.sigmoid(log_x - log_y)
    return partner, weight if mask is None else jnp.where(_of_partners(mask) > 0, weight, 1.0)


def _of_partners(values: jax.Array) -> jax.Array:
    return jnp.roll(values, 1, axis=0)
