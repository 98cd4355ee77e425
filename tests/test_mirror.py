"""A workdir in a bucket: a run there goes on from another machine, and is the run that it would be on a disk."""

import json
import pathlib
import shutil

import pytest
from etils import epath
from fake_bucket import bucket  # noqa: F401
from test_train import assert_equal, final_state, interrupt_at, records

from nfjax import evaluate, preemption
from nfjax.data import remote
from nfjax.runs import checkpoint, mirror
from nfjax.training import loop as train

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
        with pytest.raises(preemption.TrainingInterruptedError, match=f"in {RUN}; the same command"):
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


# ---------------------------------------------------------------- buckets that lie


def test_names_that_a_bucket_lists_stay_in_their_folder(stand_in, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(mirror.logging, "warning", lambda text, *args: warnings.append(text % args))
    (stand_in / "run").mkdir()
    for name in ("config.json", "a\\x.json", "\x1b[2J.json", "x\n.txt", "notes.md"):
        (stand_in / "run" / name).write_text(name)
    (stand_in / "run" / "folder.json").mkdir()
    folder = mirror.pull(RUN, "one")
    assert {path.name for path in folder.iterdir()} == {mirror.MARK, mirror.LOCK, "config.json"}
    assert len(warnings) == 3
    assert all("expected a plain name" in warning and warning.isprintable() for warning in warnings)
    for name in ("../x", "/etc/passwd", ".."):
        with pytest.raises(ValueError, match="expected a plain name"):
            mirror.fetch(folder, name)


def test_what_a_bucket_has_no_more_goes_from_the_folder(stand_in):
    (stand_in / "run").mkdir()
    (stand_in / "run" / "config.json").write_text("1")
    folder = mirror.pull(RUN, "one")
    (folder / "skipped.jsonl").write_text("of a start that was lost")
    (stand_in / "run" / "config.json").write_text("2")
    assert mirror.pull(RUN, "one") == folder
    assert (folder / "config.json").read_text() == "2"
    assert not (folder / "skipped.jsonl").exists()


def test_a_bucket_with_more_than_the_disk_is_not_copied(stand_in, monkeypatch):
    (stand_in / "run").mkdir()
    with open(stand_in / "run" / "metrics.jsonl", "wb") as file:
        file.truncate(10 * 2**40)  # of zeros: it takes no room
    with pytest.raises(OSError, match=r"in gs://bucket/run have 10240\.0 GiB, more than the .* GiB of free disk in "):
        mirror.pull(RUN, "one")


def test_a_mark_in_a_folder_of_ones_own_says_nothing(stand_in, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    workdir = tmp_path / "downloaded"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    for bucket in (str(victim), RUN):  # noqa: F402
        (workdir / mirror.MARK).write_text(json.dumps({"bucket": bucket, "start": "x"}))
        assert mirror.location(workdir) == workdir
        assert mirror.shown(workdir) == str(workdir)
        mirror.own(workdir)
        mirror.push(workdir)
        mirror.fetch(workdir, "config.json")
    assert list(victim.iterdir()) == list(stand_in.iterdir()) == []


DAMAGED = {
    "empty": (b"", "is empty: expected a JSON object"),
    "binary": (b"\x00\xff", "byte 1 is no UTF-8 text"),
    "cut": (b'{"bucket": "gs://b', "is damaged at line 1, column 12: expected JSON"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "nothing": (b"{}", "missing required field"),
    "a number": (b"5", "Expected `object`, got `int`"),
    "another type": (b'{"bucket": 5, "start": 5, "process": 1, "host": ""}', "Expected `str`, got `int`"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_marks_and_owners_are_named_with_the_way_out(stand_in, kind):
    data, message = DAMAGED[kind]
    folder = mirror.pull(RUN, "one")
    mirror.own(folder)
    (stand_in / "run" / mirror.OWNER).write_bytes(data)
    with pytest.raises(ValueError, match=rf"run/owner\.json .*{message}.*; the same command writes it anew, and"):
        mirror.push(folder)
    mirror.own(folder)
    mirror.push(folder)
    (folder / mirror.MARK).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{folder}/\.mirror .*{message}.*; remove {folder}, and start the same"):
        mirror.push(folder)
    assert mirror.pull(RUN, "one") == folder  # writes it anew
    assert mirror.shown(folder) == RUN


def test_a_mark_that_names_no_bucket_is_refused(stand_in, tmp_path):
    folder = mirror.pull(RUN, "one")
    (folder / mirror.MARK).write_text(json.dumps({"bucket": str(tmp_path), "start": "x"}))
    with pytest.raises(ValueError, match=rf"\.mirror names '{tmp_path}': expected a directory in a bucket; remove "):
        mirror.own(folder)


def test_a_run_that_was_removed_from_its_bucket_ends(stand_in):
    folder = mirror.pull(RUN, "one")
    mirror.own(folder)
    shutil.rmtree(stand_in / "run")
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/run holds no owner\.json any more: was the workdir rem"):
        mirror.push(folder)


def test_the_name_of_a_host_cannot_speak_to_the_terminal(stand_in):
    folder = mirror.pull(RUN, "one")
    mirror.own(folder)
    (stand_in / "run" / mirror.OWNER).write_text('{"start": "another", "process": 1, "host": "\\u001b[2J"}')
    with pytest.raises(ValueError, match=r"process 1 on '\\x1b\[2J'\): this one ends") as raised:
        mirror.push(folder)
    assert str(raised.value).isprintable()
