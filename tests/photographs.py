"""A tiny run on parts of two photographs, for the tests of what was trained."""

import pathlib

from PIL import Image
from sklearn import datasets

from nfjax import config as configs
from nfjax.training import loop
from tests.conftest import TINY

SIZE = 8


def write(root, per_class=12):
    """Two classes of JPEGs of several sizes; every third is stored on its side."""
    for name, whole in zip(("ant", "bee"), datasets.load_sample_images().images, strict=True):
        for split in ("train", "test"):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                part = whole[10 * i : 10 * i + 26 + 5 * i, 20 * i : 20 * i + 35 + (40 if split == "train" else 0)]
                noted = Image.Exif()
                noted[0x112] = 6 if i % 3 == 0 else 1
                Image.fromarray(part).save(root / split / name / f"{i:03d}.jpg", exif=noted, quality=95)


def train(folder: pathlib.Path):
    """(workdir, folder of images) of a run with batch norm, an average of the weights, a resize and EXIF."""
    write(folder / "set")
    config = configs.base()
    config.batch_size, config.epochs, config.optim.ema_decay = 8, 1, 0.5
    config.model.depth, config.model.width, config.model.norm = TINY, 2, "batch"
    config.data.source, config.data.dir, config.data.keep = "folder", str(folder / "set"), "host"
    config.data.image_size, config.data.resize, config.data.exif_orientation = SIZE, 12, True
    config.augment.crop_padding, config.augment.rand_operations = 1, 0
    config.train.onednn = False
    loop.train(config, str(folder / "run"))
    return folder / "run", folder / "set"
