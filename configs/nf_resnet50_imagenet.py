"""NF-ResNet-50 on ImageNet, as its authors train it (Brock et al. 2021a, and adaptive clipping of 2021b).

    python -m nfjax.main --config=configs/nf_resnet50_imagenet.py --config.data.dir=DIR --workdir=WORKDIR

DIR as for imagenet_convshort.py. Standardized weights, SGD with Nesterov momentum, a learning rate of 0.1 for every 256
images of a batch, 5 epochs of warm-up, cosine to zero, weight decay on kernels alone. Their program also has stochastic
depth, which is not here, and multiplies each branch by a further learned number that starts at 0.
Expected: not measured here yet; its authors put it beside the same network with batch normalization.
"""

from nfjax import config as base


def get_config():
    config = base.imagenet()
    config.batch_size = 1024  # their program
    config.epochs = 90  # their program

    config.model.residual = "nf"
    config.model.norm = None

    config.augment.rand_operations = 0  # their program: none for this network

    config.optim.name = "nesterov"
    config.optim.learning_rate = 0.1  # for 256 images
    config.optim.reference_batch_size = 256
    config.optim.warmup_epochs = 5.0
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 1e-4  # their program
    config.optim.adaptive_clip = 0.01  # Brock et al. 2021b, the classifier exempt
    return config
