"""nfjax data show --config=FILE|NAME [--config.data.dir=DIR ...] [--out=samples.png]

Draws a contact sheet of a training batch: every image as it is in the file, and as the network sees it.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nfjax import _contact_sheet as contact_sheet
from nfjax import data, storage
from nfjax.cli import settings
from nfjax.cli._outcome import UsageError
from nfjax.cli._parser import PICTURES, Parser, check_file, path
from nfjax.data.decoding import crops
from nfjax.data.loading import stream
from nfjax.training import checks, loader, preprocessing, pretrained, rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: Parser) -> None:
    settings.add_config(parser)
    parser.add_argument(
        "--out", default="samples.png", type=path, metavar="FILE", help="a PNG, SVG or PDF (samples.png)"
    )
    parser.add_argument("--count", type=int, default=16, metavar="N", help="images (16)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="the training step whose batch it is (0)")


def run(arguments: argparse.Namespace) -> None:
    check_file("--out", arguments.out, PICTURES)
    config = settings.read(arguments)
    if arguments.count < 1 or arguments.step < 0:
        raise UsageError(
            f"--count={arguments.count} --step={arguments.step}: expected at least one image, of step 0 or later"
        )
    config = pretrained.resolve(config)
    checks.check(config)
    storage.write_figure(pathlib.Path(arguments.out), draw(config, arguments.count, arguments.step), dpi=130)
    print(arguments.out)


def draw(config: ConfigDict, count: int = 16, step: int = 0) -> Figure:
    """The first `count` images of the batch of training step `step`, in pairs: the whole image (its middle square)
    above, what a run with this config trains on below, with their labels.

    An image that cannot be read is black, as in training, and its title says why. Raises ValueError for settings or
    data that cannot be used.
    """
    dataset = loader.open_data(config, config.data.dir)
    split, size = dataset.train, config.data.image_size
    (order,) = loader.train_orders(config, split, step, step + 1)
    causes: dict[int, str] = {}
    if isinstance(split, data.Images):
        batch = split.take(order.indices) | {"mask": order.mask}
        plain = batch["image"]
    else:

        def made(transform: stream.Transform) -> dict[str, np.ndarray]:
            def note(index: int, cause: str, detail: str) -> None:
                causes[index] = cause

            shape = (size, size, 3)
            (batch,) = stream.stream(split, transform, shape, iter([order]), note, config.data.workers)
            return batch

        middle = crops.CentreCrop(size, size, config.data.exif_orientation)
        batch, plain = made(loader.transform(config, "train")), made(middle)["image"]
    seen, partner, weight = _as_seen(config, batch, step)
    names = [dataset.class_names[label] for label in batch["label"]]
    tiles = []
    for i in range(min(count, len(names))):
        cause = causes.get(int(order.indices[i]))
        title = [cause] if cause else _title(names[i], names[partner[i]], weight[i])
        tiles.append(contact_sheet.Tile((plain[i], seen[i]), title))
    return contact_sheet.draw(tiles)


def _as_seen(config: ConfigDict, batch: dict[str, np.ndarray], step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(uint8 images, partner, weight), the last two of what is mixed."""
    mix = preprocessing.make_mix(config)

    @jax.jit
    def seen(key: jax.Array, images: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        images = preprocessing.make_preprocess(config)(key, images)
        partner, weight = jnp.arange(len(images)), jnp.ones(len(images))
        if mix is not None:
            images, partner, weight = mix(key, images, mask)
        shift, scale = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (config.data.mean, config.data.std))
        levels = jnp.round(255 * (images * scale + shift))
        return jnp.clip(levels, 0, 255).astype(jnp.uint8), partner, weight

    key = rng.of_step(rng.of_seed(config.seed, "training"), step)
    return jax.device_get(seen(key, jnp.asarray(batch["image"]), jnp.asarray(batch["mask"])))


def _title(name: str, partner: str, weight: float) -> list[str]:
    short, other = contact_sheet.short(name), contact_sheet.short(partner)
    return [short] if weight == 1 else [f"{weight:.0%} {short}", f"{1 - weight:.0%} {other}"]
