"""NF-ResNet-18 on CIFAR-10, trained as nf_resnet50_imagenet.py is (Brock et al. 2021a and b, who have ImageNet only).

    python -m nfjax.main --config=configs/nf_resnet18_cifar10.py --config.data.dir=DIR --workdir=WORKDIR

DIR as for cifar10_convshort.py. The learning rate is theirs for 256 images, at a batch of 128; crops, flips and
RandAugment as in the other configs for CIFAR-10.
Expected: not measured here yet.
"""

from nfjax import config as base


def get_config():
    config = base.cifar()
    config.batch_size = 128
    config.epochs = 200

    config.model.depth = 18
    config.model.residual = "nf"
    config.model.norm = None

    config.optim.name = "nesterov"
    config.optim.learning_rate = 0.1
    config.optim.reference_batch_size = 256
    config.optim.warmup_epochs = 5.0
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 5e-4  # usual for CIFAR; ours
    config.optim.adaptive_clip = 0.01
    return config
