"""Configs: every file loads, every value has an effect, overrides and arguments are checked."""

import importlib.util
import pathlib

import jax
import ml_collections
import pytest
from flax import nnx

from nfjax import config as configs
from nfjax.training import checks, networks
from nfjax.training import loop as train

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.py"))


def load(path, *arguments):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config(*arguments)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_builds_its_network(path):
    module, config = load(path)
    checks.check(config)
    model = nnx.eval_shape(lambda: networks.build(config, 10, jax.random.key(0)))
    size = config.data.image_size
    assert nnx.eval_shape(lambda m: m(jax.numpy.zeros((1, size, size, 3))), model).shape == (1, 10)
    assert f"--config=configs/{path.name}" in module.__doc__  # the exact command
    assert "Expected:" in module.__doc__


def test_the_papers_settings():
    _, cifar = load(FOLDER / "cifar10_convshort.py")
    assert (cifar.model.depth, cifar.model.residual, cifar.model.norm, cifar.model.init) == (
        50,
        "convshort",
        None,
        "he_fan_out",
    )
    assert (cifar.batch_size, cifar.optim.learning_rate, cifar.optim.momentum, cifar.optim.schedule) == (
        128,
        0.01,
        0.9,
        "cosine_by_epoch",
    )
    assert (cifar.optim.label_smoothing, cifar.optim.weight_decay, cifar.epochs) == (0.0, 0.0, 200)
    _, imagenet = load(FOLDER / "imagenet_convshort.py")
    assert (imagenet.batch_size, imagenet.data.image_size, imagenet.model.stem) == (100, 224, "imagenet")
    assert (imagenet.optim.label_smoothing, imagenet.epochs) == (0.1, 90)


def test_recipes_and_the_bases_of_the_figures_are_the_same():
    """What a config writes out is what `nfjax.reproduce` starts from."""
    paper = {"depth": 50, "residual": "convshort", "norm": None, "init": "he_fan_out"}
    for name, base in {
        "imagenet": configs.imagenet(),
        "cifar10": configs.cifar(),
        "cifar100": configs.cifar100(),
    }.items():
        base.model.update(paper)
        assert load(FOLDER / f"{name}_convshort.py")[1] == base
    for name in ("cifar10", "cifar100"):
        assert load(FOLDER / f"{name}.py")[1] == load(FOLDER / f"{name}_convshort.py")[1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_parameterised_configs(name):
    _, config = load(FOLDER / f"{name}.py", "depth=101,residual=idshort,norm=none,init=brock")
    assert config.model.depth == 101
    assert (config.model.residual, config.model.norm, config.model.init) == ("idshort", None, "brock")
    _, config = load(FOLDER / f"{name}.py", "norm=batch")
    assert (config.model.depth, config.model.norm) == (50, "batch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dept=18", "unknown config argument 'dept=18': expected name=value.*depth=50.*init=he_fan_out"),
        ("18", "unknown config argument '18'"),
        ("depth=deep", "config argument 'depth=deep': expected int, such as depth=50"),
    ],
)
def test_bad_arguments(text, message):
    with pytest.raises(ValueError, match=message):
        load(FOLDER / "cifar10.py", text)


class Recorder:
    """A ConfigDict that notes which leaves are read."""

    def __init__(self, config, prefix="", read=None):
        self._config, self._prefix, self.read = config, prefix, set() if read is None else read

    def __getattr__(self, name):
        value = getattr(self._config, name)
        if isinstance(value, ml_collections.ConfigDict):
            return Recorder(value, f"{self._prefix}{name}.", self.read)
        if name == "to_dict":  # the whole section becomes keyword arguments, which a signature checks
            self.read |= {self._prefix + key for key in self._config}
        elif name in self._config:
            self.read.add(self._prefix + name)
        return value


def leaves(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_leaf_is_read_where_something_is_built(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "check", lambda config: None)  # these two only look
    monkeypatch.setattr(train.report, "header", lambda *args: "")
    for name in ("open_for", "start", "note_start"):  # they read all fields, to compare them and to write them down
        monkeypatch.setattr(train.workdirs, name, lambda *args: tmp_path)
    from test_data import make_folder

    make_folder(tmp_path / "set", per_class=20)
    tiny_config.epochs, tiny_config.batch_size, tiny_config.augment.rand_operations = 1, 16, 1
    tiny_config.log.every_steps = tiny_config.log.signal_every_steps = 1
    tiny_config.data.source, tiny_config.data.dir, tiny_config.data.keep = "folder", str(tmp_path / "set"), "disk"
    tiny_config.augment.resized_crop_scale = (0.5, 1.0)
    recorder = Recorder(tiny_config)
    train.train(recorder, str(tmp_path))
    before_jax_begins = {"train.keep_memory"}  # read by the command
    assert recorder.read == set(leaves(tiny_config)) - before_jax_begins


def test_every_leaf_has_a_source():
    """Behind the field or above it: the paper's section, "not stated by the paper", another paper, or "ours"."""
    lines = pathlib.Path(configs.__file__).read_text().split("def base()")[1].split("return config")[0].splitlines()
    comment = ""
    for line in lines:
        code, _, behind = line.partition("#")
        if not code.strip():
            comment += behind
        elif "config." in code and "ConfigDict()" not in code:
            text = (comment + behind).lower()
            assert any(source in text for source in ("paper", "ours", "he et al", "likewise")), line
            comment = ""


def test_a_field_that_does_not_exist_cannot_be_set():
    with pytest.raises(AttributeError, match="lr"):
        configs.cifar().optim.lr = 0.5
