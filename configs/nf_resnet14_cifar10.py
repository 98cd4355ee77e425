"""A network of 0.7 MB for CIFAR-10, for a CPU core and an hour: the one in results/nf_resnet14_cifar10.

    python -m nfjax.main --config=configs/nf_resnet14_cifar10.py --config.data.dir=DIR --workdir=WORKDIR
    nfjax export --model=WORKDIR --ema --step=19532 --out=results/nf_resnet14_cifar10 --format=safetensors \\
        --license=apache-2.0 --data-name="CIFAR-10 (JPEG copy)" --overwrite

DIR as for cifar10_convshort.py. The rule is NF-ResNet's (Brock et al. 2021a), which of those without norm learned
fastest in docs/results/rules.md; three stages of two blocks, as He et al. (2016) have for CIFAR-10.
Expected: 85.4 % of the test images and 90.9 % of the training images of CIFAR-10 (JPEG copy), as measured once. Time:
65 minutes on a CPU core with jax 0.12 (results/nf_resnet14_cifar10_training). The step is the last one.
"""

from nfjax import config as base


def get_config():
    config = base.cifar()
    config.batch_size = 128
    config.epochs = 50

    config.model.residual = "nf"
    config.model.norm = None
    config.model.block = "basic"
    config.model.stage_sizes = (2, 2, 2)
    config.model.width = 16

    config.augment.rand_operations = 0

    config.optim.name = "nesterov"
    config.optim.learning_rate = 0.2  # the better one of 0.1 and 0.2 after 2 epochs
    config.optim.warmup_epochs = 1.0
    config.optim.schedule = "cosine"
    config.optim.weight_decay = 2e-4
    config.optim.adaptive_clip = 0.02
    config.optim.ema_decay = 0.999
    return config
