"""ResNet-50 ConvShort with He fan-out on ImageNet (paper, section 4, figure 5).

    python -m nfjax.main --config=configs/imagenet_convshort.py --config.data.dir=DIR --workdir=WORKDIR

DIR has ImageNet's layout, DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG (or a flat DIR/val with the devkit beside
it). Faster, from records packed once:

    python -m nfjax.data pack --source=folder --dir=DIR --out=RECORDS --short-side=256
    python -m nfjax.main --config=configs/imagenet_convshort.py --config.data.source=records \\
        --config.data.dir=RECORDS --workdir=WORKDIR

Random resized crops of 224 pixels, flips, RandAugment, label smoothing; the images stay on the disk.
Expected: in line with the 76.13 % that torchvision reports for ResNet-50 with batch normalization (the dashed line of
figure 5). Time: not measured yet on an accelerator.
"""

from nfjax import config as base


def get_config():
    return base.imagenet()
