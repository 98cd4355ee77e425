"""A workdir in a bucket: a run there goes on from another machine, and is the run that it would be on a disk."""

import pathlib
import shutil

import pytest
from etils import epath
from fake_bucket import bucket  # noqa: F401
from test_train import assert_equal, final_state, interrupt_at, records

from nfjax import checkpoint, evaluate, mirror, train
from nfjax.data import remote

RUN = "gs://bucket/run"


@pytest.fixture
def stand_in(bucket, monkeypatch):  # noqa: F811
    """A directory for the bucket, also for what writes to gs:// by itself: orbax's arrays."""

    def path(directory):
        return epath.Path(directory.replace("gs://bucket", str(bucket), 1))

    monkeypatch.setattr(remote, "path", path)
    return bucket


def test_a_run_in_a_bucket_goes_on_from_another_machine(tiny_config, tmp_path, stand_in, monkeypatch, capsys):
    whole = train.train(tiny_config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(train.TrainingInterruptedError, match=f"in {RUN}; the same command"):
            train.train(tiny_config, RUN)
    assert not pathlib.Path("gs:").exists()
    shutil.rmtree(tmp_path / "cache")  # another machine
    assert train.train(tiny_config, RUN) == whole
    assert f"--workdir={RUN}" in capsys.readouterr().out
    assert records(stand_in / "run") == records(tmp_path / "whole")
    assert_equal(final_state(tiny_config, stand_in / "run"), final_state(tiny_config, tmp_path / "whole"))
    for name in ("config.json", "data.json", "versions.json", "parameters.txt", "curves.png"):
        assert (stand_in / "run" / name).exists()
    assert evaluate.evaluate(RUN)["accuracy"] == whole["best_test_accuracy"]
    tiny_config.seed += 1
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        train.train(tiny_config, RUN)


def test_the_newest_start_goes_on_and_an_older_one_ends(stand_in):
    first = mirror.pull(RUN, "one machine")
    mirror.own(first)
    (first / "metrics.jsonl").write_text("of the first")
    mirror.push(first)
    second = mirror.pull(RUN, "another")
    assert (second / "metrics.jsonl").read_text() == "of the first"
    mirror.push(first)  # the second has only looked so far
    mirror.own(second)
    with pytest.raises(ValueError, match=r"another run has been started in gs://bucket/run \(process \d+ on "):
        mirror.push(first)
    mirror.push(second)


def test_a_local_workdir_is_left_as_it_is(tmp_path):
    assert mirror.pull(str(tmp_path), "") == mirror.location(tmp_path) == tmp_path
    mirror.own(tmp_path)
    mirror.push(tmp_path)
    mirror.fetch(tmp_path, "metrics.jsonl")
    assert list(tmp_path.iterdir()) == []
    assert str(checkpoint.Checkpoints(tmp_path, read_only=True).directory) == f"{tmp_path}/checkpoints"


def test_a_bucket_without_its_package(monkeypatch):
    monkeypatch.setitem(remote.PACKAGES, "gs", "no_such_package")
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gs:// needs a package more: pip install"):
        mirror.pull(RUN, "")
