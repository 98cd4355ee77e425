"""Every setting of a run, once, with its source. A config file starts from one of these and changes what differs.

"paper" stands for Civitelli et al., "A Robust Initialization of Residual Blocks for Effective ResNet Training without
Batch Normalization"; "ours" for what concerns this program only.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, config_dict

# The arguments of the parameterised configs, with their defaults.
NETWORK = {"depth": 50, "residual": "convshort", "norm": None, "init": "he_fan_out"}


def base() -> ConfigDict:
    """Every field with its default, locked: a field that is not here cannot be set."""
    config = ConfigDict()
    config.seed = 0  # of initialization, order and augmentation; paper: three runs, seeds not stated
    config.batch_size = 128  # over all devices; paper, section 4
    config.epochs = 200  # not stated by the paper
    # The workdir of a run with whose best weights this one begins. Where mean, std, image_size, resize and
    # exif_orientation of config.data have their defaults, they are that run's. None for random weights. Ours.
    config.init_from = config_dict.placeholder(str)

    config.model = ConfigDict()
    # A name in nfjax.models.MODELS, or package.module:function for a Flax model of one's own. The fields below are
    # those of ours. Ours.
    config.model.name = "preact_resnet"
    config.model.arguments = ""  # further keyword arguments of it, such as activation=silu,width=96; ours
    config.model.depth = 18  # 10, 18, 34, 50, 101 or 152; paper: 18, 50, 101
    # Blocks in each stage, such as (2, 2, 2), with model.block; none for those of model.depth. Ours.
    config.model.stage_sizes = config_dict.placeholder(tuple)
    config.model.block = config_dict.placeholder(str)  # "basic" or "bottleneck"; none for that of model.depth; ours
    # A name in nfjax.residual.RESIDUALS, or package.module:function. Paper, section 3.3, and the rules of others.
    config.model.residual = "convshort"
    # None, or a name in nfjax.layers.NORMS: "batch", "group" (with standardized weights), "dyt", "derf". Paper, section
    # 4: none or "batch".
    config.model.norm = config_dict.placeholder(str)
    config.model.init = "he_fan_out"  # a name in nfjax.initializers.INITIALIZERS or OF_JAX; paper, eq. 2
    # What changes the kernels before the first step, on its images: a name in nfjax.training.rescaling.METHODS, "lsuv",
    # "balance", "balance_forward" or "balance_backward", which are nfjax.rescale's; none for none. Paper: none.
    config.model.rescale = config_dict.placeholder(str)
    config.model.stem = "cifar"  # "cifar" (3x3) or "imagenet" (7x7, stride 2, max-pooling); not stated by the paper
    config.model.width = 64  # channels of the first stage; He et al. 2016, and implied by the paper's tables
    # Whether a block's activations are computed anew for its gradient, instead of being kept: less memory, more time.
    # Ours.
    config.model.remat = False
    config.model.dtype = "float32"  # of activations, "float32" or "bfloat16"; parameters stay float32; ours

    config.data = ConfigDict()
    # A name in nfjax.data.DATASETS, tfds:NAME, huggingface:NAME, or package.module:function for a source of one's own;
    # ours.
    config.data.source = "folder"
    config.data.dir = ""  # of the files, for sources that have any; ours
    # Share of each split that is used, spread evenly over it: a short version of an experiment keeps its classes. Ours.
    config.data.share = 1.0
    config.data.image_size = 32  # height and width in pixels; paper, tables 1 and 2
    config.data.mean = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's pixels in [0, 1], per channel; not stated by the paper
    config.data.std = (0.2470, 0.2435, 0.2616)  # likewise
    # Where the images are kept: decoded on the "device" or on the "host", or encoded on the "disk", from which every
    # batch is decoded anew. Ours.
    config.data.keep = "device"
    # Short side in pixels to which test images are resized before the middle is cut out, none for image_size; paper,
    # section 4: "standard", which is 256 for ImageNet.
    config.data.resize = config_dict.placeholder(int)
    # Whether images are turned and mirrored as the camera has noted (EXIF orientation), or as they are stored, which is
    # what Pillow and torchvision give. Ours.
    config.data.exif_orientation = False
    # Whether an epoch draws as many images of each class, with as many in all: those of a rare class more often, those
    # of a frequent one not all. Ours.
    config.data.balance_classes = False
    config.data.workers = config_dict.placeholder(int)  # processes that decode from the disk; none: one a core; ours
    # Batches decoded from the disk before they are asked for; none: two, or enough to keep all workers busy. Ours.
    config.data.ahead = config_dict.placeholder(int)
    config.data.max_skipped = 0.01  # share of a split that may be unreadable before the run stops; ours

    config.augment = ConfigDict()
    config.augment.crop_padding = 4  # zeros around the image before a random crop, 0 for no crop; paper: "standard"
    config.augment.flip = True  # mirror left to right at random; paper: "standard"
    # Random resized crop: the box's share of the area and its aspect ratio, smallest and largest; none for the whole
    # image. Where the images are kept on the disk. Paper, section 4: "standard" for ImageNet (Szegedy et al. 2015).
    config.augment.resized_crop_scale = config_dict.placeholder(tuple)
    config.augment.resized_crop_ratio = (3 / 4, 4 / 3)  # likewise

    # RandAugment (Cubuk et al. 2020), after crop and flip; paper, section 4, with no settings stated.
    config.augment.rand_operations = 2  # N, operations on each image, 0 for none; not stated by the paper
    config.augment.rand_magnitude = 9  # M, of torchvision's scale from 0 to 30; not stated by the paper
    config.augment.rand_fill = 0  # grey level of what comes in from outside of the image; not stated by the paper
    config.augment.rand_interpolation = "nearest"  # or "bilinear"; not stated by the paper

    # Off in the paper. The probability with which a rectangle of an image becomes the mean (Zhong et al. 2020), and the
    # parameter of the Beta distribution of Mixup's (Zhang et al. 2018) and of CutMix's weights (Yun et al. 2019), 0 for
    # none; where both are on, each batch gets one of the two.
    config.augment.erasing_probability = 0.0  # paper: none
    config.augment.mixup_alpha = 0.0  # paper: none
    config.augment.cutmix_alpha = 0.0  # paper: none

    config.optim = ConfigDict()
    # A name in nfjax.training.optimizers.OPTIMIZERS, or package.module:function, such as optax:lion. Paper, section 4:
    # SGD with momentum.
    config.optim.name = "sgd"
    config.optim.arguments = ""  # further keyword arguments of it, such as b1=0.9,b2=0.95; ours
    config.optim.learning_rate = 0.01  # paper, section 4
    # Batch size that the learning rate is for: it is scaled linearly to the one that is used (Goyal et al. 2017); none
    # for no scaling. Not stated by the paper.
    config.optim.reference_batch_size = config_dict.placeholder(int)
    config.optim.warmup_epochs = 0.0  # in which the learning rate rises linearly (likewise); not stated by the paper
    config.optim.momentum = 0.9  # of optimizers that have one; paper, section 4
    # A name in nfjax.training.schedules.SCHEDULES, or package.module:function. Paper, section 4: cosine to zero,
    # changed after every epoch.
    config.optim.schedule = "cosine_by_epoch"
    config.optim.weight_decay = 0.0  # not stated by the paper ("without further regularization")
    config.optim.weight_decay_mask = "kernels"  # what decays: a name in nfjax.training.optimizers.MASKS; ours
    config.optim.clip_norm = config_dict.placeholder(float)  # global gradient norm; paper: none
    config.optim.adaptive_clip = config_dict.placeholder(float)  # Brock et al. 2021's lambda, such as 0.01; paper: none
    # By which the learning rate is multiplied for parameters that are single numbers: alpha of LearnScalar and of
    # SkipInit, Fixup's scales and biases, whose authors take 0.1. Paper: 1.
    config.optim.scalar_rate = 1.0
    # Factors of the learning rate, "pattern=factor" separated by commas, such as head=10,blocks/0=0.1; of several
    # patterns that match a parameter, see nfjax.training.patterns, the last one counts. None for 1. Ours.
    config.optim.rate_by_pattern = config_dict.placeholder(str)
    # By which the learning rate falls from one block to the one before it, from 1 for the head, such as 0.75; none for
    # no fall (as in BEiT, Bao et al. 2021). Paper: none.
    config.optim.layer_decay = config_dict.placeholder(float)
    # Parameters that stay as they are, patterns separated by commas, such as stem,blocks/0; batch norm below them keeps
    # its running statistics, and uses them. Ours.
    config.optim.freeze = config_dict.placeholder(str)
    config.optim.label_smoothing = 0.0  # paper, section 4: for ImageNet only
    # Factors of the loss by class: "balanced" for images / (classes * images of the class), or a number for each class,
    # separated by commas; none for 1. Ours.
    config.optim.class_weights = config_dict.placeholder(str)
    # Decay per step of an average of the weights, such as 0.9999, which is scored beside them; none for no average.
    # Paper: none.
    config.optim.ema_decay = config_dict.placeholder(float)

    # Training steps per dispatch, where the images are on the device. None: all up to the next log step on an
    # accelerator, and 1 on a CPU, where a signal to stop would be heard too late. Ours.
    config.steps_per_dispatch = config_dict.placeholder(int)

    config.train = ConfigDict()
    # Parts of a batch that are computed one after the other: the gradient of the whole, in the memory of one. Ours.
    config.train.accumulate_steps = 1
    # Devices over which parameters and optimizer state are divided, 1 for a copy on each of them; ours.
    config.train.state_shards = 1
    # On a CPU, whether convolutions and products are oneDNN's, where jaxlib has it (0.11 or newer); ours.
    config.train.onednn = True
    # Whether the memory of a step is kept for the next one, on Linux with glibc where there is no accelerator; ours.
    config.train.keep_memory = True

    config.log = ConfigDict()
    config.log.every_steps = 50  # training steps between two lines of metrics.jsonl; ours
    # Epochs from one scoring of the test images to the next; the last epoch is always scored. Ours.
    config.log.evaluate_every_epochs = 1
    # Where the numbers go, besides metrics.jsonl: names in nfjax.runs.trackers.TRACKERS, or package.module:class,
    # separated by commas. Ours.
    config.log.trackers = "tensorboard"
    # Training steps between two measurements of every block's forward and backward variance on the first training batch
    # (nfjax.spp), a multiple of log.every_steps; none for no measurements. One costs less than a training step. With
    # them come, of the step before, the ratio of update to weights and the norm of the gradient in each block, and,
    # where a batch is computed in parts or on several devices, the gradient's noise. Ours.
    config.log.signal_every_steps = config_dict.placeholder(int)
    # Class names of what counts as a block there, separated by commas; none for residual blocks, which are found by
    # themselves. Ours.
    config.log.signal_where = config_dict.placeholder(str)

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1  # epochs from one checkpoint to the next, scored or not; ours
    # Training steps after which a checkpoint is due, at the next log step, also within an epoch; ours.
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2  # of the newest, besides the one with the best test accuracy; ours
    return config.lock()


def cifar() -> ConfigDict:
    """CIFAR-10 (paper, section 4, figures 3 and 7)."""
    return base()


def cifar100() -> ConfigDict:
    """CIFAR-100 (paper, section 4, figure 4). The number of classes comes from the data."""
    config = base()
    config.data.mean = (0.5071, 0.4866, 0.4409)  # CIFAR-100's
    config.data.std = (0.2673, 0.2564, 0.2762)
    return config


def imagenet() -> ConfigDict:
    """ImageNet (paper, section 4, figure 5)."""
    config = base()
    config.batch_size = 100  # paper, section 4
    config.epochs = 90  # not stated by the paper
    config.model.depth = 50
    config.model.stem = "imagenet"
    config.data.image_size = 224
    config.data.mean = (0.485, 0.456, 0.406)  # ImageNet's, as torchvision publishes them
    config.data.std = (0.229, 0.224, 0.225)
    config.data.keep = "disk"
    config.data.resize = 256  # paper, section 4: "standard"
    config.augment.crop_padding = 0
    config.augment.resized_crop_scale = (0.08, 1.0)
    config.optim.label_smoothing = 0.1  # paper: "Label Smoothing"; 0.1 not stated by the paper (Szegedy et al. 2016)
    return config


def parse_arguments(text: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a parameterised config: "depth=101,residual=idshort" over `defaults`; "none" stands for None.

    Raises ValueError that lists the known names for an unknown one, and for a value of the wrong type.
    """
    values = dict(defaults)
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in defaults:
            known = ", ".join(f"{k}={v}" for k, v in defaults.items())
            raise ValueError(f"unknown config argument {part!r}: expected name=value, separated by commas, of {known}")
        convert = str if defaults[name] is None else type(defaults[name])
        try:
            values[name] = None if value.lower() == "none" else convert(value)
        except ValueError:
            example = f"{name}={defaults[name]}"
            raise ValueError(f"config argument {part!r}: expected {convert.__name__}, such as {example}") from None
    return values
