"""ResNet-50 ConvShort with He fan-out on CIFAR-10 (paper, section 4, figure 3a).

    python -m nfjax.main --config=configs/cifar10_convshort.py --config.data.dir=DIR --workdir=WORKDIR

DIR has the layout DIR/{train,test}/<class>/*.png. Crops of 4 padded pixels, flips, RandAugment.
Expected: reaches or passes the same network with batch normalization at the end (figure 3; no number is printed). Time:
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
    config.data.mean = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's pixels
    config.data.std = (0.2470, 0.2435, 0.2616)

    config.augment.crop_padding = 4
    config.augment.flip = True
    config.augment.rand_operations = 2  # RandAugment's N and M: not stated by the paper
    config.augment.rand_magnitude = 9

    config.optim.learning_rate = 0.01  # paper, section 4; cosine to zero, changed after every epoch
    config.optim.momentum = 0.9
    return config
