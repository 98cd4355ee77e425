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
    config = base.base()
    config.batch_size = 100  # paper, section 4
    config.epochs = 90  # not stated by the paper

    config.model.depth = 50
    config.model.residual = "convshort"
    config.model.norm = None
    config.model.init = "he_fan_out"
    config.model.stem = "imagenet"

    config.data.keep = "disk"
    config.data.image_size = 224
    config.data.resize = 256
    config.data.mean = (0.485, 0.456, 0.406)  # ImageNet's, as torchvision publishes them
    config.data.std = (0.229, 0.224, 0.225)

    config.augment.crop_padding = 0
    config.augment.resized_crop_scale = (0.08, 1.0)
    config.augment.flip = True
    config.augment.rand_operations = 2  # RandAugment's N and M: not stated by the paper
    config.augment.rand_magnitude = 9

    config.optim.learning_rate = 0.01  # paper, section 4; cosine to zero, changed after every epoch
    config.optim.momentum = 0.9
    config.optim.label_smoothing = 0.1  # paper: for ImageNet only; 0.1 not stated
    return config
