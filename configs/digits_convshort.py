"""ConvShort, without batch normalization, on the handwritten digits that ship with scikit-learn. Not in the paper: a
first run.

    python -m nfjax.main --config=configs/digits_convshort.py --workdir=runs/digits_convshort

Expected: 98.3 to 99.2 % test accuracy, by seed (0 to 4), within a minute on two CPU cores.
"""

from nfjax import config as base


def get_config():
    config = base.base()
    config.batch_size = 32
    config.epochs = 40

    config.model.depth = 18
    config.model.width = 16
    config.model.residual = "convshort"
    config.model.norm = None
    config.model.init = "he_fan_out"

    config.data.source = "digits"
    config.data.image_size = 8
    config.data.mean = (0.305, 0.305, 0.305)
    config.data.std = (0.376, 0.376, 0.376)

    config.augment.crop_padding = 1
    config.augment.flip = False
    config.augment.rand_operations = 0

    config.optim.learning_rate = 0.02  # the best of 0.02, 0.04 and 0.06 over five seeds
    config.optim.momentum = 0.9
    config.log.every_steps = 15
    config.checkpoint.every_epochs = 5
    return config
