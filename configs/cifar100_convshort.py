"""ResNet-50 ConvShort with He fan-out on CIFAR-100 (paper, section 4, figure 4).

    python -m nfjax.main --config=configs/cifar100_convshort.py --config.data.dir=DIR --workdir=WORKDIR

Expected: slightly above the same network with batch normalization at the end
(figure 4; no number is printed). Time: not measured yet on an accelerator.
"""

from nfjax import config as base


def get_config():
    config = base.cifar100()
    config.model.depth = 50
    return config
