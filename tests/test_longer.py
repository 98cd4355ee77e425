"""A run that is finished, or stopped, goes on for more epochs."""

import json

import pytest
from test_train import assert_equal, final_state, interrupt_at, records

from nfjax import preemption
from nfjax.runs import files
from nfjax.training import loop as train


@pytest.fixture
def short(tiny_config):
    """One epoch of 16 steps, of one block."""
    tiny_config.model.update({"stage_sizes": (1,), "block": "basic"})
    tiny_config.epochs = 1
    return tiny_config


def test_a_finished_run_goes_on_as_if_it_had_been_meant_to(short, tmp_path, monkeypatch, capsys):
    short.optim.schedule = "constant"
    train.train(short, str(tmp_path / "longer"))
    short.epochs = 3
    train.train(short, str(tmp_path / "whole"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 25)
        with pytest.raises(preemption.TrainingInterruptedError):
            train.train(short, str(tmp_path / "longer"))
    out = capsys.readouterr().out
    assert "epochs  1 before, 3 now: from here on with the schedule of 3 epochs" in out
    assert "resumed at step 16, epoch 1.00" in out
    summary = train.train(short, str(tmp_path / "longer"))
    assert "before, 3 now" not in capsys.readouterr().out
    assert records(tmp_path / "longer") == records(tmp_path / "whole")
    assert_equal(final_state(short, tmp_path / "longer"), final_state(short, tmp_path / "whole"))
    assert summary["steps"] == 48
    assert files.read_config(tmp_path / "longer").epochs == 3
    starts = json.loads((tmp_path / "longer" / "versions.json").read_text())
    assert [start["epochs"] for start in starts] == [1, 3, 3]
    assert [start["step"] for start in starts[:2]] == [0, 16]
    short.epochs = 2
    with pytest.raises(ValueError, match="epochs: 3 there, 2 now"):
        train.train(short, str(tmp_path / "longer"))
    short.epochs, short.optim.learning_rate = 4, 0.5
    with pytest.raises(ValueError, match=r"These fields differ:\n  optim.learning_rate: 0.01 there, 0.5 now\n"):
        train.train(short, str(tmp_path / "longer"))


def test_the_learning_rate_is_that_of_the_longer_schedule(short, tmp_path):
    train.train(short, str(tmp_path))
    short.epochs = 2
    train.train(short, str(tmp_path))
    rates = {record["step"]: record["learning_rate"] for record in records(tmp_path) if record["kind"] == "train"}
    assert rates[16] == pytest.approx(0.01)
    assert rates[20] == rates[32] == pytest.approx(0.005)  # half way along the cosine of two epochs
