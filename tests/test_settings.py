"""Settings on a command line, beyond what `test_main` types."""

import json
import pathlib
import time

import pytest
from absl import flags
from ml_collections import ConfigDict

from nfjax import config as configs
from nfjax.cli import settings
from nfjax.training import checks, ranges, schedules
from nfjax.training import optimizers as optim


def parsed(*arguments, config="configs/imagenet_convshort.py"):
    values, argv = flags.FlagValues(), ["nfjax", f"--config={config}", *arguments]
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
        checks.check(parsed(f"--config.{setting}"))


# ---------------------------------------------------------------- every field, and what it cannot be

NAN, INF = float("nan"), float("inf")
MAY_BE_ZERO = {
    "seed", "data.max_skipped", "augment.crop_padding", "augment.rand_operations", "augment.rand_magnitude",
    "augment.rand_fill", "augment.erasing_probability", "augment.mixup_alpha", "augment.cutmix_alpha",
    "optim.warmup_epochs", "optim.momentum", "optim.weight_decay", "optim.label_smoothing",
}  # fmt: skip
AT_MOST_ONE = {
    "data.share", "data.max_skipped", "augment.erasing_probability", "optim.momentum", "optim.label_smoothing",
}  # fmt: skip
MAY_BE_EMPTY = {"data.dir", "model.arguments", "optim.arguments"}
STAGES = "model.stage_sizes"
PAIRS = ("augment.resized_crop_scale", "augment.resized_crop_ratio")
FIELDS = {name: kind for name, _, kind in ranges.leaves(configs.base())}
NUMBERS = {name: kind for name, kind in FIELDS.items() if kind in (int, float)}


def with_value(name, value):
    """A config as a file could return it: of the right fields, but with any value."""
    plain = configs.base().to_dict()
    *above, last = name.split(".")
    node = plain
    for part in above:
        node = node[part]
    node[last] = value
    return ConfigDict(plain)


def refused(name, value):
    with pytest.raises(ValueError, match=r"expected|must be") as caught:
        checks.check(with_value(name, value))
    return str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_a_field_cannot_be(name):
    wrong = [-1, -(10**30), True, "", "3", (3,), [], 10**30 if NUMBERS[name] is int else 10.0**300]
    wrong += [] if name in MAY_BE_ZERO else [0]
    wrong += [1.5, NAN, INF] if NUMBERS[name] is int else [-0.5, NAN, INF, -INF, 1 + 2j]
    wrong += [1.5] if name in AT_MOST_ONE else []
    wrong += [1e-60] if name in ("optim.learning_rate", "optim.clip_norm", "optim.adaptive_clip") else []
    for value in wrong:
        message = refused(name, value)
        assert name.rpartition(".")[2] in message
        assert str(value) in message


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if kind is tuple and name != STAGES])
def test_tuples_that_a_field_cannot_be(name):
    length = 2 if name in PAIRS else 3
    good = (0.5,) * length
    ranges.check(with_value(name, good), checks.RANGES)
    wrong = [(), good[1:], (*good, 0.5), 0.5, "0.5", ("a",) * length, (True,) * length]
    for bad in (NAN, INF, -0.5, 1e300, None):
        wrong += [(bad, *good[1:]), (*good[1:], bad)]
    wrong += [(0.9, 0.1), (0.0, 0.5)] if name in PAIRS else [(0.5, 0.5, 127.5)]
    wrong += [(0.5, 1.5)] if name == "augment.resized_crop_scale" else []
    for value in wrong:
        assert f"{name}=" in refused(name, value)


def test_stages_that_a_network_cannot_have():
    for good in ((1,), (3, 4, 6, 3), [2] * 8, (2048,)):
        ranges.check(with_value(STAGES, good), checks.RANGES)
    wrong = [(), 2, "2", ("2",), (True,), (2.0,), (0,), (2, -1), (1,) * 9, (2048, 1), (10**12,), (None,), (NAN,)]
    for value in wrong:
        assert "model.stage_sizes=" in refused(STAGES, value)


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if kind in (str, bool)])
def test_texts_and_switches_of_another_kind(name):
    wrong = [3, 0.5, ("a",)] + ["true", 1] * (FIELDS[name] is bool) + [True] * (FIELDS[name] is str)
    for value in wrong + [""] * (FIELDS[name] is str and name not in MAY_BE_EMPTY):
        assert f"{name}=" in refused(name, value)


def test_means_of_levels_are_given_back_divided():
    message = refused("data.mean", (123.675, 116.28, 103.53))
    assert "--config.data.mean='(0.4850, 0.4560, 0.4060)'" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment.crop_padding": 32}, r"augment.crop_padding=32 must be less than data.image_size=32"),
        ({"data.resize": 16}, r"data.resize=16: a square of 32 pixels cannot be cut out"),
        ({"train.state_shards": 7}, r"train.state_shards=7: the state cannot be divided over 7"),
        ({"model.width": 65536}, r"model.width=65536, model.depth=18: .* parameters .* GiB, of .* choose less"),
        ({"batch_size": 2**24, "data.image_size": 512}, r"batch_size=16777216, data.image_size=512: .* GiB, of "),
        ({"data.ahead": 10**6, "data.image_size": 2048}, r"data.ahead=1000000: the batches decoded ahead would take"),
        ({"optim.warmup_epochs": 201.0}, r"optim.warmup_epochs=201.0 must be from 0 to epochs=200"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    config = configs.base()
    config.update_from_flattened_dict(changes)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        checks.check(config)
    assert time.perf_counter() - start < 60  # at once, and not after the network was drawn


def test_more_steps_than_are_counted():
    for schedule in (lambda: schedules.cosine_by_epoch(0.1, [1, 2**31]), lambda: schedules.cosine(0.1, [2**31])):
        with pytest.raises(ValueError, match="2,147,483,648 steps: expected 1 to 2,147,483,647; choose fewer epochs"):
            schedule()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"momentum": 1.0}, "momentum=1.0: expected"),
        ({"momentum": 0.9, "weight_decay": -1}, "weight_decay=-1: expected 0"),
        ({"momentum": 0.9, "weight_decay": INF}, "weight_decay=inf: expected 0"),
        ({"momentum": 0.9, "clip_norm": 0.0}, "clip_norm=0.0: expected a positive"),
        ({"momentum": 0.9, "adaptive_clip": NAN}, "adaptive_clip=nan: expected a positive"),
    ],
)
def test_the_optimizer_refuses_as_well(given, message):
    with pytest.raises(ValueError, match=message):
        optim.make("sgd", lambda step: 0.1, **given)


# ---------------------------------------------------------------- config files


def test_a_config_lacks_a_field_or_has_one_more():
    config = configs.base().to_dict()
    del config["optim"]["momentum"]
    with pytest.raises(ValueError, match=r"the config lacks a field, optim.momentum: a config file starts from"):
        checks.check(ConfigDict(config))
    more = json.loads(configs.base().to_json_best_effort()) | {"momentum": 0.9}
    with pytest.raises(ValueError, match="the config has a field that nothing reads, momentum"):
        checks.check(ConfigDict(more))
    with pytest.raises(ValueError, match="the config is of type dict: expected a ConfigDict"):
        checks.check(configs.base().to_dict())


@pytest.mark.parametrize("override", ["--", "--config.epochs=3", "--config.data.resize=none"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"file.py: there is no file .*file.py \(from .*\); expected a config file"),
        ("def get_config(): return {'epochs': 3}", r"file.py returns dict from get_config, expected a ConfigDict"),
        ("def get_config(): pass", r"file.py returns NoneType from get_config, expected a ConfigDict"),
        ("def get_config(): return 1 / 0", r"file.py raises ZeroDivisionError: division by zero"),
        ("def get_config(a, b): pass", r"file.py raises TypeError: get_config\(\) missing 2 required"),
        ("def get_config(:", r"file.py is no config file, which is Python: invalid syntax"),
        ("\0", r"file.py is no config file, which is Python: "),
        ("import nfjax.nothing", r"file.py cannot be loaded: ModuleNotFoundError: No module named 'nfjax.nothing'"),
        ("config = 3", r"file.py is no config file: it has no function get_config"),
        (
            "from nfjax import config\ndef get_config():\n  c = config.base()\n  c.lr = 1\n  return c",
            r"file.py sets or reads a field that does not exist: .*lr",
        ),
    ],
)
def test_config_files_that_are_none(tmp_path, text, message, override):
    path = tmp_path / "file.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parsed(override, config=path)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.mean[0]=0.5",
            r"--config.data.mean\[0\]: config.data.mean is set as a whole, --config.data.mean='\(0.485",
        ),
        ("data[0]=1", r"unknown config field 'data\[0\]': config has "),
        ("model=3", "--config.model=3: model has fields of its own, "),
        ("epochs.x=3", r"unknown config field 'epochs.x': config.epochs has nothing below it"),
        (".epochs=3", r"unknown config field '.epochs': config has "),
        ("augment.flip=perhaps", r"config.augment.flip=perhaps"),
        ("epochs=1.5", r"config.epochs=1.5: invalid literal for int"),
    ],
)
def test_overrides_that_set_nothing(override, message):
    with pytest.raises(ValueError, match=message):
        parsed(f"--config.{override}")


def test_overrides_without_a_file():
    values, argv = flags.FlagValues(), ["nfjax", "--config.epochs=3"]
    settings.define(values, argv)
    with pytest.raises(ValueError, match=r"--config is missing, such as --config=configs/digits_convshort.py"):
        settings.parse(values, argv)


def test_colons_and_home_in_the_path_of_a_config(tmp_path, monkeypatch):
    folder = tmp_path / "a:b"
    folder.mkdir()
    text = pathlib.Path("configs/cifar10.py").read_text()
    for name in ("plain.py", "c:d.py"):
        (folder / name).write_text(text)
        assert parsed(config=folder / name).model.depth == 50
        assert parsed("--config.epochs=3", config=f"{folder / name}:depth=101,init=brock").model.depth == 101
    monkeypatch.setenv("HOME", str(folder))
    assert parsed(config="~/plain.py:depth=34").model.depth == 34
    assert settings.split("nowhere/x.py:depth=34") == ("nowhere/x.py", ["depth=34"])
    assert settings.split("nowhere") == ("nowhere", [])


def test_arguments_for_a_config_without_any():
    with pytest.raises(ValueError, match="raises TypeError: it takes no arguments behind a colon"):
        parsed(config="configs/digits_convshort.py:depth=18")
