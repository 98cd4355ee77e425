"""ResNet-50 ConvShort with He fan-out on ImageNet (paper, section 4, figure 5).

    python -m nfjax.main --config=configs/imagenet_convshort.py --config.data.dir=DIR --workdir=WORKDIR

Expected: in line with the 76.13 % that torchvision reports for ResNet-50 with batch normalization (the dashed line of
figure 5).
"""

from nfjax import config as base


def get_config():
    return base.imagenet()
