"""CIFAR-10 (paper, section 4, figures 3 and 7), any network of the paper.

    python -m nfjax.main --config=configs/cifar10.py:depth=101,residual=idshort,init=brock \\
        --config.data.dir=DIR --workdir=WORKDIR

Arguments: depth (18, 34, 50, 101, 152), residual, norm (none or batch), init. The paper's curves:
residual=identity,norm=batch; residual=idshort, learnscalar or convshort with init=he_fan_out, and with init=brock.
Without arguments it is cifar10_convshort.py, which shows the other settings. DIR has the layout
DIR/{train,test}/<class>/*.png.
Expected: the paper prints no number; its figures show every he_fan_out curve training, and brock failing at depth 50
and 101. Time: not measured yet on an accelerator.
"""

from nfjax import config as base


def get_config(arguments=None):
    config = base.cifar()
    config.model.update(base.parse_arguments(arguments, base.NETWORK))
    return config
