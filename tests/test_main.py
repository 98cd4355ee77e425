"""The command lines, as a user types them: in processes of their own, with right and with wrong input."""

import pathlib
import signal
import subprocess
import sys

import pytest
from absl import app

from nfjax import cli

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = "--config=configs/digits_convshort.py"
SMALL = ("--config.model.width=4", "--config.model.stage_sizes=(1,1)", "--config.model.block=basic")
SHORT = ("--config.epochs=2", "--config.checkpoint.every_epochs=1")


def command(module, *arguments):
    return [sys.executable, "-m", f"nfjax.{module}", *arguments]


def run(module, *arguments):
    """(exit code, output, errors)."""
    done = subprocess.run(command(module, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_train_evaluate_and_go_on(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    code, out, errors = run("main", DIGITS, workdir, *SHORT, *SMALL)
    assert (code, errors) == (0, "")
    assert "model   ResNet 1-1 convshort without normalization, he_fan_out, width 4" in out
    assert "epoch 2/2  train loss" in out
    assert "curves" in out
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")

    code, out, _ = run("evaluate", workdir)
    assert code == 0
    assert "of 360 images" in out

    code, out, _ = run("main", DIGITS, workdir, *SHORT, *SMALL)
    assert code == 0
    assert "already complete" in out

    code, _, errors = run("main", DIGITS, workdir, *SHORT, *SMALL, "--config.seed=1")
    assert code == 1
    assert "seed: 0 there, 1 now" in errors


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    arguments = (DIGITS, f"--workdir={tmp_path}", "--config.epochs=300", *SMALL)
    process = subprocess.Popen(
        command("main", *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch   2/300"):
            break
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    process = subprocess.Popen(
        command("main", *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    out = "".join(line for line, _ in zip(process.stdout, range(6), strict=False))
    process.kill()
    process.communicate()
    assert f"resumed at step {step:,}" in out
    assert "epoch   1/300" not in out


def test_sigterm_saves_and_asks_to_be_started_again(tmp_path):
    arguments = (DIGITS, f"--workdir={tmp_path}", "--config.epochs=4000", *SMALL)
    process = subprocess.Popen(
        command("main", *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch    1/4000"):
            break
    # A second run in the same workdir is refused while this one is at work.
    code, _, errors = run("main", *arguments)
    assert code == 1
    assert f"another run is at work in the workdir {tmp_path} (process {process.pid} on " in errors
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by SIGTERM: saved at step" in errors
    assert "Traceback" not in errors


def test_sigterm_before_the_first_step(tmp_path):
    """While the network is built and compiled there is nothing to save: it ends at once, in the same way."""
    process = subprocess.Popen(
        command("main", DIGITS, f"--workdir={tmp_path}"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("model ")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors.startswith(("nfjax: stopped by SIGTERM", "SIGTERM: finishing this step"))
    assert "Traceback" not in errors


def test_a_disk_that_takes_no_more(tmp_path):
    """Files of more than 64 kB cannot be written: the first checkpoint fails, and the run ends with a message."""
    limited = [
        "bash",
        "-c",
        'ulimit -f 64; exec "$@"',
        "",
        *command("main", DIGITS, f"--workdir={tmp_path}", *SHORT, "--config.model.width=4"),
    ]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"nfjax: a checkpoint cannot be written to {tmp_path}/checkpoints" in done.stderr
    assert "start the same command again" in done.stderr


def test_divergence_has_an_exit_code(tmp_path):
    code, _, errors = run(
        "main",
        DIGITS,
        f"--workdir={tmp_path}",
        *SHORT,
        *SMALL,
        "--config.optim.learning_rate=1e6",
        "--config.model.residual=identity",
    )
    assert code == 1
    assert "nothing was trained on it" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--config=configs/cifar10.py:depth=19", "--workdir=W"),
            "unknown depth 19: expected one of 10, 18, 34, 50, 101, 152",
        ),
        (("--config=configs/cifar10.py", "--workdir=W"), "no data directory given; set it with --config.data.dir=DIR"),
    ],
)
def test_what_cannot_be_trained_gets_one_message(tmp_path, arguments, message):
    check_one_message(tmp_path, arguments, message, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is missing, such as --config=configs/digits_convshort.py"),
        ((DIGITS,), "--workdir is missing"),
        (("--config=configs/nope.py", "--workdir=W"), "configs/nope.py"),
        (
            (DIGITS, "--workdir=W", "--config.optim.lr=0.1"),
            "unknown config field 'optim.lr': config.optim has adaptive_clip, arguments, ",
        ),
        ((DIGITS, "--workdir=W", "--config.modle.width=3"), "unknown config field 'modle.width': config has "),
        ((DIGITS, "--workdir=W", "--config.optimizer=x"), "unknown config field 'optimizer': config has "),
        ((DIGITS, "--workdir=W", "--config.epochs=many"), "invalid literal for int"),
        (
            ("--config=configs/cifar10.py:depht=18", "--workdir=W"),
            "unknown config argument 'depht=18': expected name=value",
        ),
        ((DIGITS, "--workdir=W", "epochs=3"), "unexpected argument 'epochs=3': settings are flags"),
        (
            (DIGITS, "--workdir=W", "--epochs=3"),
            "unknown argument '--epochs=3': settings are flags such as --config.epochs=3",
        ),
        ((DIGITS, "--workdir=W", "--wrkdir=V"), "unknown argument '--wrkdir=V': did you mean --workdir?"),
        ((DIGITS, "--workdir=W", "--verbosity=loud"), "flag --verbosity=loud: "),
        (("--config=imagenet", "--workdir=W"), "or one of cifar10, cifar100, cifar100_convshort, "),
        (("--config=README.md", "--workdir=W"), "--config=README.md is no config file, which is Python"),
        (("--config=nfjax/config.py", "--workdir=W"), "--config=nfjax/config.py is no config file: it has no function"),
        ((DIGITS, "--workdir=W", "--config.epochs=none"), "--config.epochs=none: expected a value, such as 200"),
        ((DIGITS, "--workdir=W", "--config.epochz=none"), "unknown config field 'epochz': config has "),
    ],
)
def test_wrong_input_gets_one_message(tmp_path, arguments, message):
    check_one_message(tmp_path, arguments, message, 2)


def check_one_message(tmp_path, arguments, message, expected):
    code, _, errors = run("main", *(argument.replace("=W", f"={tmp_path / 'run'}") for argument in arguments))
    assert code == expected
    assert message in errors
    assert errors.startswith("nfjax: ")
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "config.json").exists()  # the next try is not refused


@pytest.mark.parametrize("module", ["main", "evaluate", "reproduce", "data", "spp"])
def test_help(module):
    code, out, errors = run(module, "--help")
    assert "--workdir" in out or "table1" in out or "pack" in out or "--depth" in out
    assert (code, errors) == (0, "")


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "--helpfull", "-helpfull"])
def test_help_tells_the_flags_and_where_settings_are_listed(capsys, flag):
    assert cli.run(["train", "--config=configs/nope.py", flag, "--config.no.such=field"]) == 0
    out = capsys.readouterr().out
    for name in ("config", "workdir", "coordinator", "processes", "process", "traceback"):
        assert f"  --{name} " in out
    assert "Settings are --config.FIELD=VALUE, behind --config=FILE; nfjax/config.py tells" in out
    for field in ("model.depth=18", "optim.learning_rate=0.01", "augment.resized_crop_scale=None", "data.dir="):
        assert field in out
    assert ("--verbosity" in out) == flag.endswith("-helpfull")


def test_home_in_every_path(monkeypatch, tmp_path, capsys):
    """What the commands call their paths is expanded where it is parsed, or where a library function takes it."""
    from nfjax import data
    from nfjax.cli import pack, show, spp
    from nfjax.cli._parser import Parser
    from nfjax.runs import mirror

    def parsed(command, *argv):
        parser = Parser("nfjax", command.__doc__)
        command.add_arguments(parser)
        return parser.read(argv)

    monkeypatch.setenv("HOME", str(tmp_path))
    assert mirror.pull("~/run", "test") == tmp_path / "run"  # --workdir of main and evaluate
    with pytest.raises(FileNotFoundError, match=rf"the data directory {tmp_path}/set does not exist"):
        data.load("folder", "~/set", 32)  # --config.data.dir, --data-dir of evaluate
    packed = parsed(pack, "--source=folder", "--dir=~/set", "--out=~/records")
    assert (packed.dir, packed.out) == (f"{tmp_path}/set", f"{tmp_path}/records")
    assert parsed(show, "--config=~/c.py", "--out=~/sheet.png").out == f"{tmp_path}/sheet.png"
    (tmp_path / "c.py").write_text("raise SystemError('found')")
    assert cli.run(["data", "show", "--config=~/c.py"]) == 2
    assert "found" in capsys.readouterr().err
    measured = parsed(spp, "--depth=18", "--input=~/set", "--out=~/a.png", "--out=~/b.csv")
    assert (measured.input, measured.out) == (f"{tmp_path}/set", [f"{tmp_path}/a.png", f"{tmp_path}/b.csv"])
    assert cli.run(["reproduce", "table1", "--out=~/results"]) == 0
    assert (tmp_path / "results" / "table1.md").exists()


def test_traceback_is_offered_for_errors_only(monkeypatch, capsys):
    from nfjax import distributed, preemption
    from nfjax.distributed import peers
    from nfjax.training import loop

    codes = []
    monkeypatch.setattr(distributed, "leave", codes.append)
    monkeypatch.setattr(distributed, "initialize", lambda *args: None)
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(["nfjax"])))
    for error, code, offered in (
        (preemption.TrainingInterruptedError("interrupted: saved"), 130, False),
        (preemption.TrainingPreemptedError("stopped by SIGTERM: saved"), 75, False),
        (peers.AbsentError("process 1 has not come"), 75, False),
        (loop.TrainingDivergedError("the loss is nan"), 1, True),
        (ValueError("epochs=0"), 1, True),
    ):

        def fail(config, workdir, error=error):
            raise error

        monkeypatch.setattr(loop, "train", fail)
        cli.run(["train", DIGITS, "--workdir=W"])
        assert codes[-1] == code
        errors = capsys.readouterr().err
        assert f"nfjax: {error}" in errors
        assert ("--traceback" in errors) == offered


def test_traceback_on_request(tmp_path):
    code, _, errors = run("main", "--config=configs/cifar10.py:depth=19", f"--workdir={tmp_path}", "--traceback")
    assert code == 1
    assert "Traceback" in errors


def test_evaluate_wrong_input(tmp_path):
    code, _, errors = run("evaluate", f"--workdir={tmp_path}")
    assert code == 1
    assert errors.startswith(f"nfjax: {tmp_path} holds no run")
