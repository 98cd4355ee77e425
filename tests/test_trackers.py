"""Where numbers go: several places at once, W&B among them, and what happens when one of them fails."""

import json
import sys
import types

import pytest

from nfjax.runs import metrics, trackers
from nfjax.runs.trackers import Trackers


class FakeWandb(types.ModuleType):
    """Keeps what the client of W&B is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, name, step_metric):
        self.metric = (name, step_metric)

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_goes_on_with_the_same_run_and_begins_anew_with_another(tmp_path, wandb):
    for step in (0, 2, 0):
        writer = Trackers(tmp_path, step, "wandb, tensorboard", {"seed": 3})
        writer.write("train", step + 1, {"loss": 0.5})
        writer.close()
    first, second, third = wandb.started
    assert first["project"] == "nfjax"
    assert first["name"] == tmp_path.name
    assert first["config"] == {"seed": 3}
    assert first["id"] == second["id"] != third["id"]
    assert wandb.metric == ("*", "step")
    assert wandb.logged == [{"train/loss": 0.5, "step": step} for step in (1, 3, 1)]
    assert wandb.finished == 3
    assert [record["step"] for record in metrics.read(tmp_path)] == [1]
    (tmp_path / "wandb.json").write_text("{")
    Trackers(tmp_path, 2, "wandb").close()
    assert wandb.started[-1]["id"] != third["id"]


@pytest.mark.parametrize("error", [RuntimeError("the service is gone"), ConnectionError("no route to host")])
def test_a_tracker_that_fails_is_left_out_and_told_of_once(tmp_path, wandb, caplog, error):
    """A connection that fails, which is an OSError, is no full disk."""

    def fail(values):
        raise error

    wandb.log = fail
    writer = Trackers(tmp_path, 0, "wandb, tensorboard")
    for step in (1, 2):
        writer.write("train", step, {"loss": 0.5})
    writer.close()
    told = f"the tracker wandb fails with {type(error).__name__}: {error}; the run goes on"
    assert caplog.text.count(told) == 1
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2]


def test_one_that_cannot_be_opened_ends_a_run_that_begins_and_no_other(tmp_path, wandb, caplog):
    def fail(**settings):
        raise RuntimeError("no key")

    wandb.init = fail
    with pytest.raises(
        ValueError, match=r"the tracker wandb cannot be opened: RuntimeError: no key; mend it, or leave"
    ):
        Trackers(tmp_path, 0, "wandb")
    writer = Trackers(tmp_path, 2, "wandb")
    writer.write("train", 3, {"loss": 0.5})
    writer.close()
    assert "the tracker wandb fails with RuntimeError: no key; the run goes on without it" in caplog.text
    assert [record["step"] for record in metrics.read(tmp_path)] == [3]


def test_names_of_trackers(tiny_config, monkeypatch):
    assert list(trackers.named("tensorboard,  jsonl,")) == ["tensorboard", "jsonl"]
    assert trackers.named("") == {}
    with pytest.raises(ValueError, match=r"unknown log.trackers 'mlflow': expected .*jsonl, tensorboard, wandb"):
        trackers.named("tensorboard, mlflow")
    tiny_config.log.trackers = "wandb"
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'wandb is not installed; pip install "nfjax\[wandb\]"'):
        trackers.check(tiny_config)


def test_json_lines_are_always_written(tmp_path):
    writer = Trackers(tmp_path, 0, "")
    writer.write("train", 1, {"loss": 0.5})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "train", "step": 1, "loss": 0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]
