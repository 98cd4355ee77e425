"""`nfjax COMMAND`: which command, what it may be given, how it ends. What each of them does is tested elsewhere."""

import argparse
import importlib
import pathlib
import signal
import subprocess
import sys
import tomllib

import pytest

import nfjax
from nfjax import cli, preemption
from nfjax import config as configs
from nfjax.cli import settings
from nfjax.cli._outcome import EXTRAS, FailedError, UsageError, explain
from nfjax.cli._parser import Parser, Setting, optional, separate
from tests.conftest import TINY

ROOT = pathlib.Path(__file__).parent.parent


def leaves(table=cli.COMMANDS, above=""):
    """("data pack", Command) of every command."""
    for name, command in table.items():
        if isinstance(command, cli.Command):
            yield above + name, command
        else:
            yield from leaves(command, f"{above}{name} ")


@pytest.mark.parametrize(("name", "command"), list(leaves()))
def test_every_command_tells_what_it_takes(name, command, capsys):
    assert cli.run([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: nfjax {name} ")
    assert "--traceback" in out
    assert importlib.import_module(command.module).__doc__.strip().splitlines()[-1] in out


def test_help_and_version(capsys):
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("train", "evaluate", "data", "spp", "cost", "reproduce"))
    assert "75 stopped by SIGTERM" in out
    assert cli.run(["data", "-h"]) == 0
    assert "pack a data set" in capsys.readouterr().out
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"nfjax {nfjax.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "a command is missing: nfjax COMMAND …, with one of train, evaluate, data, spp, cost, reproduce, predict, "
            "export, import",
        ),
        (["--config=configs/cifar10.py"], "a command is missing: nfjax COMMAND"),
        (["data"], "a command is missing: nfjax data COMMAND …, with one of pack, show"),
        (["trian"], "unknown command 'trian': did you mean train? Expected one of train, evaluate, "),
        (["data", "pak"], "unknown command 'data pak': did you mean pack? Expected one of pack, show"),
        (["serve"], "unknown command 'serve': Expected one of train, "),
        (["evaluate"], "--workdir; nfjax evaluate --help tells more"),
        (["evaluate", "--workdir=W", "--stpe=3"], "unknown argument '--stpe=3': did you mean --step?"),
        (["evaluate", "--workdir=W", "--work=V"], "unknown argument '--work=V': "),  # nothing is abbreviated
        (["evaluate", "--workdir=W", "--step=three"], "invalid int value: 'three'"),
        (["evaluate", "--workdir=W", "now"], "unknown argument 'now': nfjax evaluate --help lists those"),
        (["evaluate", "--workdir=W", "--config.epochs=3"], "unknown argument '--config.epochs=3'"),
        (["cost"], "--depth is missing, such as --depth=50; or --module="),
        (["cost", f"--depth={TINY}", "--config.epochs=3"], "--config.epochs=3 goes with --config"),
        (["cost", f"--depth={TINY}", "--config=digits_convshort"], "it goes neither with --depth nor with --module"),
        (["cost", "--module=a:b", "--num-classes=3"], "--num-classes describes one of the paper's networks"),
        (["cost", f"--depth={TINY}", "--make=width=3"], "--make, --arg and --input-shape go with --module"),
        (["cost", "--config=digits_convshort", "--width=3"], "--width describes one of the paper's networks"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_message(argv, message, capsys):
    assert cli.run(argv) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("nfjax: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_help_imports_nothing_that_takes_long():
    heavy = {"jax", "flax", "numpy", "ml_collections"}
    code = f"import sys; from nfjax import cli; cli.run(['--help']); print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("\nset()\n"), done.stderr


@pytest.mark.parametrize("module", ["nfjax", "nfjax.main", "nfjax.data", "nfjax.spp", "nfjax.evaluate"])
def test_modules_are_the_same_commands(module):
    """A wrong argument is told by the parser of the command, before anything that takes long is imported."""
    argv = {"nfjax": ["spp"], "nfjax.data": ["pack"]}.get(module, [])
    done = subprocess.run([sys.executable, "-m", module, *argv, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    command = {"nfjax": "spp", "nfjax.main": "train", "nfjax.data": "data pack"}.get(module, module[6:])
    assert done.stdout.startswith(f"usage: nfjax {command} ")


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UsageError("--x is wrong"), 2, "nfjax: --x is wrong\n"),
        (FailedError("no such thing"), 1, "nfjax: no such thing\n(--traceback shows where this was raised)\n"),
        (ValueError("epochs=0"), 1, "nfjax: epochs=0\n(--traceback shows where this was raised)\n"),
        (preemption.TrainingInterruptedError("interrupted: saved"), 130, "nfjax: interrupted: saved\n"),
        (preemption.TrainingPreemptedError("stopped: saved"), 75, "nfjax: stopped: saved\n"),
        (preemption.PeerLostError("another one has ended"), 75, "nfjax: another one has ended\n"),
        (KeyboardInterrupt(), 130, "nfjax: interrupted\n"),
        (KeyboardInterrupt("the same command goes on"), 130, "nfjax: interrupted; the same command goes on\n"),
        (ImportError("libx.so.1: no such file"), 1, "nfjax: libx.so.1: no such file\n(--traceback shows"),
    ],
)
def test_one_message_and_a_code(error, code, told, capsys):
    assert explain(error) == code
    assert capsys.readouterr().err.startswith(told)


def test_a_mistake_in_the_program_shows_where(capsys):
    assert explain(ZeroDivisionError("division by zero")) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert explain(ValueError("epochs=0"), with_traceback=True) == 1
    assert "ValueError: epochs=0" in capsys.readouterr().err


def test_a_missing_extra_is_told_with_the_way_out(capsys):
    assert explain(ModuleNotFoundError("No module named 'cv2'", name="cv2")) == 1
    assert 'nfjax: cv2 is not installed, which this needs: pip install "nfjax[train]"\n' in capsys.readouterr().err
    assert explain(ModuleNotFoundError("No module named 'array_record.python'", name="array_record.python")) == 1
    assert 'pip install "nfjax[train]"' in capsys.readouterr().err
    assert explain(ModuleNotFoundError("No module named 'mine'", name="mine")) == 1
    assert "nfjax: No module named 'mine'\n" in capsys.readouterr().err


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


def test_a_pack_that_is_interrupted_tells_that_it_goes_on(monkeypatch, capsys, tmp_path):
    def interrupt(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("nfjax.data.packing.pack.pack", interrupt)
    before = signal.signal(signal.SIGINT, preemption.end)  # as `cli.main` leaves it
    try:
        assert cli.run(["data", "pack", "--source=digits", f"--out={tmp_path}"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "nfjax: interrupted; the same command goes on from here\n"


# ---------------------------------------------------------------- settings, as they may be typed


def test_settings_as_they_may_be_typed():
    argv = [
        "--config.epochs=3", "a", "--config.model.width", "8", "-config.seed=1", "--config.augment.flip", "b",
        "--noconfig.model.remat", "--config=c.py", "--config.data.dir=/x=y", "--config.data.mean=(1, 2)",
    ]  # fmt: skip
    found, rest = separate(argv)
    assert rest == ["a", "b", "--config=c.py"]
    assert [(setting.field, setting.text) for setting in found] == [
        ("epochs", "3"), ("model.width", "8"), ("seed", "1"), ("augment.flip", "true"), ("model.remat", "false"),
        ("data.dir", "/x=y"), ("data.mean", "(1, 2)"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"--config\.epochs has no value: expected --config.epochs=VALUE"):
        separate(["--config.epochs"])


@pytest.mark.parametrize(
    ("field", "texts", "value"),
    [
        ("epochs", ["3", "4"], 4),
        ("optim.learning_rate", ["1"], 1.0),
        ("optim.learning_rate", ["1e-3"], 0.001),
        ("augment.flip", ["0"], False),
        ("augment.flip", ["True"], True),
        ("data.dir", ["3"], "3"),
        ("data.resize", ["256"], 256),
        ("data.resize", ["NONE"], None),
        ("data.mean", ["0.1,0.2,0.3"], (0.1, 0.2, 0.3)),
        ("data.mean", ["[0.1, 0.2, 0.3]"], (0.1, 0.2, 0.3)),
        ("data.mean", ["0.1", "0.2", "0.3"], (0.1, 0.2, 0.3)),
        ("model.norm", ["batch"], "batch"),
        ("model.stage_sizes", ["(1, 2)"], (1, 2)),
    ],
)
def test_a_text_becomes_what_its_field_holds(field, texts, value):
    config = configs.base()
    config.update_from_flattened_dict(settings.values(config, [Setting(field, text) for text in texts]))
    for name in field.split("."):
        config = config[name]
    assert config == value
    assert type(config) is type(value)


def test_none_is_the_same_everywhere():
    """Of settings, of the arguments of a network, and of the arguments behind a config."""
    for text in ("none", "None", "NONE"):
        assert optional(str)(text) is None
        assert settings.values(configs.base(), [Setting("model.norm", text)]) == {"model.norm": None}
        assert configs.parse_arguments(f"norm={text}", configs.NETWORK)["norm"] is None
        parser = Parser("nfjax spp", "")
        module = importlib.import_module("nfjax.cli.spp")
        module.add_arguments(parser)
        assert parser.read(["--depth=18", f"--norm={text}"]).norm is None


@pytest.mark.parametrize("name", sorted(settings.shipped()))
def test_a_config_by_its_name(name, monkeypatch, tmp_path):
    by_path = settings.load(f"configs/{name}.py")
    monkeypatch.chdir(tmp_path)  # from anywhere, and whatever folder has the same name
    (tmp_path / name).mkdir()
    assert settings.load(name) == by_path


def test_a_config_by_its_name_with_arguments(tmp_path, monkeypatch):
    assert settings.load("cifar10:depth=101,residual=idshort").model.depth == 101
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").write_text("from nfjax import config\n\ndef get_config():\n    return config.imagenet()\n")
    assert settings.load("cifar10").data.image_size == 224  # a file comes first
    known = r"cifar10, .*, imagenet_convshort, nf_resnet14_cifar10, nf_resnet18_cifar10, nf_resnet50_imagenet$"
    with pytest.raises(FileNotFoundError, match=rf"no file imagenet .*, or one of {known}"):
        settings.load("imagenet")


# ---------------------------------------------------------------- cost

OWN = """
import jax
from flax import nnx

def make(rngs, width=8):
    return nnx.Sequential(nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs))
"""


def test_the_cost_of_a_network(capsys, monkeypatch, tmp_path):
    assert cli.run(["cost", "--depth=50", "--residual=convshort"]) == 0
    first = capsys.readouterr().out
    for number in ("38,016,714", "2,103,136,256", "4,206,272,512"):  # table 1 of the paper: 38.02 M, 4.2 G
        assert f" {number}\n" in first
    assert cli.run(["cost", "--config=cifar10_convshort"]) == 0
    assert capsys.readouterr().out.split("\n\n")[1] == first.split("\n\n")[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_cost.py").write_text(OWN)
    assert cli.run(["cost", "--module=own_cost:make", "--make=width=16", "--input-shape=1,4"]) == 0
    out = capsys.readouterr().out
    assert f" {4 * 16 + 16 + 16 * 2 + 2:,}\n" in out
    assert f" {4 * 16 + 16 * 2:,}\n" in out


@pytest.mark.parametrize("kept", [True, False])
def test_training_keeps_its_memory_unless_told_otherwise(kept, tiny_config, monkeypatch):
    done = []
    monkeypatch.setattr("nfjax._cpu.keep_memory", lambda: done.append("kept"))
    monkeypatch.setattr("nfjax.training.loop.train", lambda config, workdir: done.append("trained"))
    tiny_config.train.keep_memory = kept
    importlib.import_module("nfjax.cli.train")._train(
        tiny_config, argparse.Namespace(coordinator=None, processes=None, process=None, workdir="run", traceback=False)
    )
    assert done == ["kept"] * kept + ["trained"]
