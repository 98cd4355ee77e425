"""Settings on a command line, beyond what `test_main` types."""

import pytest
from absl import flags

from nfjax import assembly, settings

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # how ml_collections imports


def parsed(*arguments):
    values, argv = flags.FlagValues(), ["nfjax", "--config=configs/imagenet_convshort.py", *arguments]
    settings.define(values, argv)
    settings.parse(values, argv)
    return values.config


def test_none_empties_a_field_that_may_be_empty():
    assert parsed().data.resize == 256
    config = parsed(
        "--config.data.resize=none",
        "--config.augment.resized_crop_scale=None",
        "--config.optim.clip_norm=none",
        "--config.model.norm=none",
        "--config.epochs=3",
    )
    assert config.data.resize is config.augment.resized_crop_scale is None
    assert config.optim.clip_norm is config.model.norm is None
    assert config.epochs == 3
    assert parsed("--config.augment.resized_crop_scale=(0.5, 1.0)").augment.resized_crop_scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "augment.resized_crop_scale=0.5",
            r"augment.resized_crop_scale=\(0.5,\): expected the smallest and the largest",
        ),
        ("augment.resized_crop_ratio=(0.75,)", r"augment.resized_crop_ratio=\(0.75,\): expected the smallest"),
        ("augment.mixup_alpha=inf", "alpha=inf: expected 0, for no mixing, or a positive number"),
        ("data.image_size=-3", "data.image_size=-3 must be a positive number of pixels"),
        ("seed=99999999999", "seed=99999999999 must be from 0 to 4294967295"),
    ],
)
def test_values_that_cannot_be(setting, message):
    with pytest.raises(ValueError, match=message):
        assembly.check(parsed(f"--config.{setting}"))
