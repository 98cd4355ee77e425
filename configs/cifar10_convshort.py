"""ResNet-50 ConvShort with He fan-out on CIFAR-10 (paper, section 4, figure 3a).

    python -m nfjax.main --config=configs/cifar10_convshort.py --config.data.dir=DIR --workdir=WORKDIR

Expected: reaches or passes the same network with batch normalization at the end
(figure 3; no number is printed). Time: not measured yet on an accelerator.
"""

from nfjax import config as base


def get_config():
    config = base.cifar()
    config.model.depth = 50
    return config
