"""CIFAR-100 (paper, section 4, figure 4), any network of the paper.

    python -m nfjax.main --config=configs/cifar100.py:depth=50,residual=identity,norm=batch \\
        --config.data.dir=DIR --workdir=WORKDIR

Arguments: depth (18, 34, 50, 101, 152), residual, norm (none or batch), init. Without them it is
cifar100_convshort.py, which shows the other settings. DIR has the layout DIR/{train,test}/<class>/*.png.
Expected: the paper prints no number; its figure 4 shows ConvShort slower at first and slightly better at the end than
batch normalization. Time: not measured yet on an accelerator.
"""

from nfjax import config as base


def get_config(arguments=None):
    config = base.cifar100()
    config.model.update(base.parse_arguments(arguments, base.NETWORK))
    return config
