"""A machine that is lent for some minutes: what does not end is not started, and the same command goes on."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from nfjax import cli, preemption, reproduce
from nfjax.reproduce import _campaign, _grids, _pace, _records, _runs, _training
from nfjax.reproduce._campaign import Job
from nfjax.reproduce._grids import BASELINE, BROCK, CONVSHORT, Cell, Grid
from tests.conftest import TINY
from tests.test_reproduce_training import TINY_FLAGS, made, write
from tests.test_reproduce_training import run as reproduce_command

GPU = {"kind": "H100", "platform": "gpu", "count": 1}
CPU = {"kind": "cpu", "platform": "cpu", "count": 1}
IMAGES = (1000, 100)


def config(depth=18, curve=CONVSHORT, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    request = _runs.Request(out=None, changes={"batch_size": 100, "epochs": 4, **changes})
    return _runs.make_config("CIFAR-10", Cell(depth, curve, ""), 0, request)


# ---------------------------------------------------------------- how long a run takes


def test_the_time_of_a_run_is_that_of_its_steps_and_of_a_third_for_what_is_evaluated():
    pace = _pace.Pace(start=7.0, step=0.3)
    assert pace.seconds(config(), IMAGES) == pytest.approx(7 + 0.3 * 4 * 10 + 0.1 * 4)
    assert pace.seconds(config(), IMAGES, epochs=3) == pytest.approx(7 + 0.3 * 10 + 0.1)


@pytest.fixture
def measured(monkeypatch):
    """The networks whose step was measured; it takes no time, and 10 ms for each layer."""
    found = []

    def measure(config):
        found.append((config.model.depth, config.model.norm))
        return _pace.Pace(1.0, 0.01 * config.model.depth)

    monkeypatch.setattr(_pace, "measure", measure)
    return found


def of(forecast, *arguments, **changes):
    return forecast.of(config(*arguments, **changes), pathlib.Path("nowhere"))


def test_what_does_not_end_is_not_started_and_nothing_deeper_is_measured(measured, tmp_path):
    forecast = _pace.Forecast(time.monotonic() + 20, tmp_path, IMAGES)
    starts, told = of(forecast)
    assert starts
    assert told == ": about 8 s at 180 ms a step, 20 s are left"
    assert of(forecast, seed=1, model__init="brock")[0]  # the same step
    starts, told = of(forecast, 50)
    assert not starts
    assert told == ": not started, about 22 s at 500 ms a step, 20 s are left, room for --epochs=3"
    assert of(forecast, 50, epochs=3)[0]
    assert of(forecast, 101) == (False, ": not started, deeper than one that does not end in time")
    assert of(forecast, 50, BASELINE)[0] is False  # no deeper: it may be faster
    assert measured == [(18, None), (50, None), (50, "batch")]
    assert forecast.left_out == 3
    assert "3 runs do not end" in forecast.summary()
    assert "--minutes=1 is enough for the shortest" in forecast.summary()


def test_paces_are_kept_for_each_device_and_measured_again_where_they_are_damaged(measured, tmp_path, monkeypatch):
    folder = tmp_path / "runs"  # which nobody has made

    def again():
        assert of(_pace.Forecast(time.monotonic() + 20, folder, IMAGES))[0]

    again()
    again()
    assert len(measured) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 999)
    again()
    assert len(measured) == 2
    (folder / _pace.FILE).write_text('{"x": {"start": -1, "step": 1}}')
    again()
    assert len(measured) == 3


def test_a_run_that_was_stopped_takes_the_epochs_that_are_missing(measured, tmp_path):
    def told(*epochs):
        scores = dict.fromkeys(("train_loss", "train_accuracy", "test_loss", "test_accuracy"), 0.5)
        lines = [json.dumps({"kind": "epoch", "step": 10 * epoch, "epoch": epoch} | scores) for epoch in epochs]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return _pace.Forecast(time.monotonic() + 20, tmp_path, IMAGES).of(config(50), tmp_path)

    assert told()[1] == ": not started, about 22 s at 500 ms a step, 20 s are left, room for --epochs=3"
    assert told(1, 2) == (True, ": about 11 s at 500 ms a step, 20 s are left")
    assert told(1, 2, 3, 4) == (True, ": about 1 s at 500 ms a step, 20 s are left")
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n")
    assert _pace.Forecast(time.monotonic() + 20, tmp_path, IMAGES).of(config(50), tmp_path)[0] is False


def test_no_end_measures_and_tells_nothing(measured, tmp_path):
    assert of(_pace.Forecast(float("inf"), tmp_path, IMAGES)) == (True, "")
    assert measured == []


def test_a_network_is_not_measured_where_that_takes_the_time_that_is_left(measured, tmp_path):
    forecast = _pace.Forecast(time.monotonic() + 20, tmp_path, IMAGES)
    forecast._longest = 30.0
    assert of(forecast) == (False, ": not started, measuring a step takes the 20 s that are left")


# ---------------------------------------------------------------- training for some minutes


@pytest.fixture
def tiny_grid(monkeypatch):
    cells = tuple(Cell(TINY, curve, curve) for curve in (CONVSHORT, BROCK[0]))
    grid = Grid("Tiny", "CIFAR-10", cells)
    for name in ("figure7", "figure3", "depth"):
        monkeypatch.setitem(reproduce.TRAINED, name, lambda request: grid)
    return grid


def test_a_run_that_takes_longer_than_measured_is_saved_and_goes_on(tiny_grid, monkeypatch, tmp_path, capsys):
    flags = ["figure7", f"--out={tmp_path}", f"--runs={tmp_path / 'runs'}", *TINY_FLAGS, "--config.log.every_steps=1"]
    flags += ["--seeds=1", "--network=ConvShort, He"]
    with monkeypatch.context() as patch:
        patch.setattr(_pace.Forecast, "of", lambda *_: (True, ""))
        reproduce_command(monkeypatch, *flags, "--minutes=0.001")  # over at the first report
    assert "the time is over: saved, and the same command goes on" in capsys.readouterr().out
    assert _records.read(tmp_path) == []
    reproduce_command(monkeypatch, *flags, "--minutes=5")
    printed = capsys.readouterr().out
    assert "resumed at step 1" in printed
    assert "ms a step, 5 min are left" in printed  # measured for once in earnest
    assert [record.curve for record in _records.read(tmp_path)] == [CONVSHORT]
    (pace,) = json.loads((tmp_path / "runs" / _pace.FILE).read_text()).values()
    assert 0 < pace["step"] < pace["start"]


# ---------------------------------------------------------------- the campaign


def request(**changes):
    return _runs.Request(pathlib.Path("out"), data="DIR", data_name="Images", changes=changes)


def commands(*arguments, **changes):
    return {" ".join(job.command[1:3]): job for job in _campaign.jobs(request(**changes), *arguments)}


def test_the_most_telling_comes_first():
    jobs = _campaign.jobs(request(), GPU, "PYTHON", "PHOTOS")
    assert [job.command[2] for job in jobs] == [
        "speed", "figure7", "figure3", "depth", "augmentation", "epoch", "input_pipeline", "speed",
    ]  # fmt: skip
    assert not any(job.obstacle for job in jobs)
    assert jobs[0].share < 1
    labels = [cell.label for cell in _grids.GRIDS["figure3"].cells]
    for network in _campaign.FIGURE_3:
        assert sum(label.startswith(network) for label in labels) == 1


def test_every_command_can_be_read():
    """The options of the benchmarks and of the trainings are those that there are."""
    import importlib

    from benchmarks import runner

    for device in (GPU, CPU):
        for job in _campaign.jobs(request(epochs=3), device, "PYTHON", "PHOTOS"):
            _, module, *words = [*job.command, "--minutes=3"]
            if module == "benchmarks":
                name, *flags = words
                arguments = runner.parse(name, importlib.import_module(f"benchmarks.cases.{name}"), flags)
                assert arguments.missing
                assert "nfjax" in arguments.sides
            else:
                parser = cli.Parser("nfjax reproduce", "")
                importlib.import_module("nfjax.cli.reproduce").add_arguments(parser)
                assert parser.read(words, settings=True).minutes == 3


def test_what_shrinks_the_trainings_shrinks_the_measurements():
    found = commands(CPU, "PYTHON", **{"model.width": 8, "epochs": 3, "data.resize": None})
    assert "--width=8" in found["benchmarks speed"].command
    assert "--width=8" in found["benchmarks epoch"].command
    assert {"--config.model.width=8", "--config.epochs=3", "--config.data.resize=none"} <= set(
        found["nfjax.reproduce figure7"].command
    )


def test_what_cannot_be_done_here_is_left_out_with_its_reason(monkeypatch, tmp_path):
    found = commands(GPU)
    assert "nfjax alone" in found["benchmarks speed"].about
    assert "--sides=nfjax" in found["benchmarks speed"].command
    assert "--images=DIR" in found["benchmarks input_pipeline"].obstacle
    monkeypatch.setattr(_campaign, "ROOT", tmp_path)  # an installed package has no benchmarks beside it
    found = commands(GPU, "PYTHON", "PHOTOS")
    assert {job.obstacle != "" for name, job in found.items() if name.startswith("benchmarks")} == {True}
    assert not found["nfjax.reproduce figure7"].obstacle


@pytest.fixture
def clock(monkeypatch):
    """Jobs that take the seconds that are their command; the minutes that each was given."""
    now, given = [0.0], []

    def finished(command, environment):
        *_, seconds, minutes = command
        given.append(float(minutes.removeprefix("--minutes=")))
        now[0] += float(seconds)
        return int(seconds == "7")

    monkeypatch.setattr(_campaign, "_finished", finished)
    monkeypatch.setattr(_campaign.time, "monotonic", lambda: now[0])
    return given


def test_each_job_is_given_what_is_left(clock, tmp_path, capsys):
    planned = [Job("a", ["60"], share=0.25), Job("b", ["300"], obstacle="no b"), Job("c", ["420"]), Job("d", ["100"])]
    _campaign.run([*planned, Job("e", ["1"])], tmp_path, minutes=10)
    assert clock == [2.5, 9, 2]
    told = capsys.readouterr().out
    assert "left out: no b" in told
    assert "(5/5) e\nleft out for now: 20 s are left, less than it takes to begin" in told


def test_a_job_that_fails_does_not_end_the_others(clock, tmp_path):
    with pytest.raises(_campaign.CampaignError, match="failed: a; what each"):
        _campaign.run([Job("a", ["7"]), Job("b", ["8"])], tmp_path, minutes=10)
    assert len(clock) == 2


SAVES = """
import signal, sys, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
print("ready", flush=True)
while not heard: time.sleep(0.01)
time.sleep(0.1)
open(sys.argv[1], "w").write(str(len(heard)))
"""


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, preemption.TrainingInterruptedError), (signal.SIGTERM, preemption.TrainingPreemptedError)],
)
def test_a_job_hears_once_of_a_signal_and_saves(tmp_path, number, error, capfd):
    def send():
        while "ready" not in "".join(told := [*told_before, capfd.readouterr().out]):
            told_before[:] = told
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    told_before, before = [], signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(error, match="the same command goes on"):
        _campaign._finished([sys.executable, "-c", SAVES, str(tmp_path / "saved")], os.environ)
    thread.join()
    assert (tmp_path / "saved").read_text() == "1"
    assert signal.getsignal(number) is before


def test_what_is_compiled_travels_with_the_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    found = _campaign._environment(tmp_path)
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(_campaign.ROOT)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert _campaign._environment(tmp_path)["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


@pytest.fixture
def in_process(monkeypatch):
    """Trainings run here, which saves starting a process for each; benchmarks, which have tests of their own, do not.
    Both are listed.
    """
    begun = []

    def finished(command, environment):
        module, *words = command[command.index("-m") + 1 :]
        begun.append(words[0])
        return cli.run(["reproduce", *words]) if module == "nfjax.reproduce" else 0

    monkeypatch.setattr(_campaign, "_finished", finished)
    monkeypatch.setattr(_campaign, "find_device", lambda: CPU)
    monkeypatch.setattr(_campaign, "FIGURE_3", (CONVSHORT,))
    return begun


def test_a_campaign_from_end_to_end(tiny_grid, in_process, tmp_path, capsys):
    flags = ["campaign", f"--out={tmp_path}", f"--runs={tmp_path / 'runs'}", *TINY_FLAGS, "--seeds=1", "--minutes=5"]
    reproduce_command(None, *flags)
    assert in_process == ["speed", "figure7", "figure3", "depth", "augmentation", "epoch", "speed"]
    told = capsys.readouterr().out
    assert told.startswith("device  no accelerator: 1 x cpu\ntime    5 min\n")
    assert "measuring a step of ResNet-10 convshort\n\n1/2    ConvShort, He fan-out, seed 0: about " in told
    assert told.count("measuring a step") == 1  # the other initialization takes the same time
    assert [record.curve for record in _records.read(tmp_path)] == [CONVSHORT, BROCK[0]]
    names = {path.suffix: path.name for path in tmp_path.glob("figure7_*")}
    assert names.keys() == {".md", ".png", ".csv"}
    assert (tmp_path / "claims.md").exists()
    before = (tmp_path / _records.FILE).read_bytes()
    reproduce_command(None, *flags)
    assert (tmp_path / _records.FILE).read_bytes() == before
    assert "2 of 2 runs are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["campaign"], "campaign needs --data=DIR, the images to train on, and --minutes=25"),
        (["campaign", "--data=x"], "campaign needs --data=DIR, .* and --minutes=25"),
        (["campaign", "--data=/nowhere", "--minutes=3"], "the data directory /nowhere does not exist"),
        (["campaign", "--data=x", "--minutes=0"], "--minutes=0 must be positive"),
        (["campaign", "--data=x", "--minutes=-2"], "--minutes=-2 must be positive"),
        (["campaign", "--data=x", "--minutes=0.2"], "--minutes=0.2 is too short for anything: expected at least 0.5"),
        (["campaign", "--data=x", "--minutes=inf"], "--minutes=inf must be a number of minutes"),
        (["campaign", "figure7", "--data=x", "--minutes=3"], "campaign chooses what is measured: leave out figure7"),
        (["campaign", "--data=x", "--minutes=3", "--torch-python=/no"], "--torch-python=/no: there is no such file"),
        (["campaign", "--data=x", "--minutes=3", "--minuts=3"], "did you mean --minutes"),
        (["campaign", "--data=x", "--minutes=3", "--epochs=0"], "epochs=0 must be positive"),
        (["figure7", "--minutes=3"], "--minutes is for training, and without --data=DIR nothing is trained"),
        (["figure7", "--images=x"], "--images: only for campaign"),
        (["figure7", "--data=x", "--network=ResNet-50"], "--network=ResNet-50: expected the beginning of one of"),
    ],
)
def test_wrong_arguments_are_explained(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        reproduce_command(monkeypatch, *arguments, f"--out={tmp_path}")


# ---------------------------------------------------------------- accuracy by depth


def test_depth_is_drawn_from_the_runs_of_the_figures(tmp_path):
    write(
        tmp_path,
        made(CONVSHORT, [0.4, 0.5]),
        made(CONVSHORT, [0.4, 0.7], seed=1),
        made(CONVSHORT, [0.4, 0.8], depth=50),
        made(BROCK[0], [], depth=50, diverged="at step 3", epochs=2),
    )
    drawn = _runs.Request(out=tmp_path, seeds=1, changes={"epochs": 2})
    (figure,) = _training.training_figures(_grids.DEPTH, drawn)
    assert figure.missing["ResNet-152 ConvShort, He fan-out"] == [0]
    _, test = figure.plot().axes
    (bars,) = test.containers
    line = bars.lines[0]
    assert line.get_xdata() == pytest.approx([18, 50], rel=0.05)
    assert line.get_ydata() == pytest.approx([60, 80])
    cross = test.lines[-1]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (pytest.approx(50, rel=0.05), 10)
    assert [path.suffix for path in figure.write(tmp_path / "depth")] == [".md", ".png", ".csv"]
