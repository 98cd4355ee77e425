"""ResNet-50 ConvShort with He fan-out on ImageNet (paper, section 4, figure 5).

    python -m nfjax.main --config=configs/imagenet_convshort.py --config.data.dir=DIR --workdir=WORKDIR

This version keeps the images in memory, and flips what is already resized and cut: ImageNet itself needs the streaming
loader with random resized crops, and RandAugment, that come next. The network and the optimizer are the paper's.
Expected: in line with the 76.13 % that torchvision reports for ResNet-50 with batch normalization (the dashed line of
figure 5). Time: not measured yet on an accelerator.
"""

from nfjax import config as base


def get_config():
    return base.imagenet()
