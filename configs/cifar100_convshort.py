"""ResNet-50 ConvShort with He fan-out on CIFAR-100 (paper, section 4, figure 4).

    python -m nfjax.main --config=configs/cifar100_convshort.py --config.data.dir=DIR --workdir=WORKDIR

DIR has the layout DIR/{train,test}/<class>/*.png. Crops of 4 padded pixels, flips, RandAugment.
Expected: slightly above the same network with batch normalization at the end (figure 4; no number is printed). Time:
not measured yet on an accelerator.
"""

from nfjax import config as base


def get_config():
    config = base.base()
    config.batch_size = 128  # paper, section 4
    config.epochs = 200  # not stated by the paper

    config.model.depth = 50
    config.model.residual = "convshort"
    config.model.norm = None
    config.model.init = "he_fan_out"

    config.data.image_size = 32
    config.data.mean = (0.5071, 0.4866, 0.4409)  # of CIFAR-100's pixels
    config.data.std = (0.2673, 0.2564, 0.2762)

    config.augment.crop_padding = 4
    config.augment.flip = True
    config.augment.rand_operations = 2  # RandAugment's N and M: not stated by the paper
    config.augment.rand_magnitude = 9

    config.optim.learning_rate = 0.01  # paper, section 4; cosine to zero, changed after every epoch
    config.optim.momentum = 0.9
    return config
