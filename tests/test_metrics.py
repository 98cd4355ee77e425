import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from nfjax import storage
from nfjax.runs import metrics
from nfjax.runs.trackers import Trackers
from nfjax.training import losses


def test_cross_entropy_with_smoothing():
    logits, labels = jax.random.normal(jax.random.key(0), (6, 5)), jnp.array([0, 1, 2, 3, 4, 0])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    plain = -log_p[np.arange(6), labels]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), plain, rtol=1e-5)
    smoothed = 0.9 * plain + 0.1 * -log_p.mean(axis=1)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, 0.1), smoothed, rtol=1e-5)


def test_masked_examples_do_not_count():
    logits = jnp.array([[2.0, 1.0], [1.0, 2.0], [jnp.nan, jnp.nan]])
    labels, each = jnp.array([0, 0, 0]), jnp.array([1.0, 2.0, jnp.nan])
    sums = losses.sums(each, logits, labels, jnp.array([1.0, 1.0, 0.0]))
    assert {name: float(value) for name, value in sums.items()} == {"loss": 3.0, "correct": 1.0, "count": 2.0}
    assert losses.means(sums) == {"loss": 1.5, "accuracy": 0.5}


def test_writer_drops_what_came_after_the_step_it_goes_on_from(tmp_path):
    writer = Trackers(tmp_path, 0, "tensorboard")
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": 0.1 * step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')  # cut short by a crash
    writer = Trackers(tmp_path, 2)
    writer.write("train", 3, {"loss": 7.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.1), (2, 0.2), (3, 7.0)]
    assert metrics.read(tmp_path) == lines
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_plot_shows_both_splits():
    record = {"kind": "epoch", "train_loss": 1.0, "test_loss": 1.1, "train_accuracy": 0.5}
    records = [record | {"epoch": epoch, "test_accuracy": 0.4 + 0.1 * epoch} for epoch in (1, 2, 3)]
    figure = metrics.plot_curves([*records, {"kind": "train"}], "a run")
    loss, accuracy = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[1.0] * 3, [1.1] * 3]
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [50, 60, 70])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()][1] == "test, 70.00 % at the end"


def test_plot_of_one_epoch_shows_a_point_at_it():
    record = {"kind": "epoch", "epoch": 1, "train_loss": 1.0, "test_loss": 1.1, "train_accuracy": 0.5}
    figure = metrics.plot_curves([record | {"test_accuracy": 0.4}], "a run")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
        assert all(line.get_marker() == "o" for line in axes.lines)


def test_the_signal_of_every_block_is_drawn_over_the_steps():
    names = [f"{what}/blocks/{i}" for what in ("forward_var", "backward_var", "update_ratio") for i in (0, 1)]
    first = {"kind": "signal", "step": 0, "forward_var/blocks/0": 2.0, "forward_var/blocks/1": 0.0}
    second = {"kind": "signal", "step": 4, **dict.fromkeys(names, 1.0), "update_ratio/stem": 0.1}
    figure = metrics.plot_signal([first, second, {"kind": "train"}], "a run")
    forward, backward, updates, norms = figure.axes[:4]
    drawn = {line.get_label()[1:]: line.get_xydata().tolist() for line in forward.lines}
    assert drawn == {"forward_var/blocks/0": [[0, 2.0], [4, 1.0]], "forward_var/blocks/1": [[4, 1.0]]}  # no log of 0
    assert [len(axes.lines) for axes in (backward, updates, norms)] == [2, 3, 0]
    assert all(axes.get_yscale() == "log" for axes in (forward, backward, updates, norms))
    dark, light = (line.get_color() for line in forward.lines)
    assert sum(dark[:3]) < sum(light[:3])
    assert [line.get_color() for line in updates.lines] == [dark, light, "0.3"]
    assert [text.get_text() for text in updates.get_legend().get_texts()] == ["stem"]
    assert metrics.plot_signal([{"kind": "train", "step": 0}], "a run") is None


def test_reading_a_workdir_without_metrics(tmp_path):
    assert metrics.read(tmp_path) == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_keeps_its_dtype(smoothing):
    assert losses.cross_entropy(jnp.ones((2, 3)), jnp.array([0, 1]), smoothing).dtype == jnp.float32


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    writer = Trackers(tmp_path, 0, "jsonl, tensorboard")
    writer.write("train", 1, {"loss": 0.5})

    def full(event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", lambda self, event: full(event))
    with pytest.raises(OSError, match=r"metrics of step 2 cannot be written.*No space left on device.*is whole"):
        writer.write("train", 2, {"loss": 0.4})
    writer.close()


LINE = '{"kind": "train", "step": 5, "loss": 2.0}'
EPOCH = '{"kind": "epoch", "step": 5, "epoch": 1, "train_loss": 2, "train_accuracy": 0.1, "test_loss": 2, '
EPOCH += '"test_accuracy": 0.1}'
DAMAGED = {
    "binary": (b"\x00\xff\xfe", "byte 1 is no UTF-8 text"),
    "cut": (b'{"kind": "train", "st', "is damaged at line 1, column 19"),
    "blank": (b"", "is empty"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "a number": (b"5", "Expected `object`, got `int`"),
    "no step": (b'{"kind": "train", "loss": 2.0}', "missing required field `step`"),
    "no kind": (b'{"step": 5, "loss": 2.0}', "missing required field `kind`"),
    "a step that is text": (b'{"kind": "train", "step": "5"}', r"Expected `int`, got `str` - at `\$.step`"),
    "a step below zero": (b'{"kind": "train", "step": -5}', "Expected `int` >= 0"),
    "a loss that is text": (b'{"kind": "train", "step": 5, "loss": "2"}', "loss is no number"),
    "a list of losses": (b'{"kind": "train", "step": 5, "loss": [2]}', "loss is no number"),
    "no test loss": (EPOCH.replace('"test_loss": 2, ', "").encode(), "missing required field `test_loss`"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_named(tmp_path, kind):
    line, message = DAMAGED[kind]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([LINE.encode(), EPOCH.encode(), line, LINE.encode()]) + b"\n")
    where = f"^{tmp_path / 'metrics.jsonl'}, line 3, .*{message}"
    with pytest.raises(storage.DamagedFileError, match=rf"{where}.*; the training command of this run, started again"):
        metrics.read(tmp_path)


@pytest.mark.parametrize(
    "end", [b"", b'{"kind": "epo', b"\x00" * 4096, b"5"], ids=["nothing", "cut", "zeros", "a number"]
)
def test_what_a_crash_left_of_the_last_line_is_left_out(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_bytes(f"{LINE}\n{EPOCH}\n".encode() + end)
    assert metrics.read(tmp_path) == [json.loads(LINE), json.loads(EPOCH)]


def test_a_last_line_without_its_end_is_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{LINE}\n{EPOCH}")
    assert len(metrics.read(tmp_path)) == 2


def test_a_run_goes_on_without_damaged_lines_and_keeps_them_aside(tmp_path, caplog):
    damaged = b"\n".join([LINE.encode(), b"[]", EPOCH.encode(), b"\xff"]) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    Trackers(tmp_path, 5).close()
    assert metrics.read(tmp_path) == [json.loads(LINE), json.loads(EPOCH)]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert f"{tmp_path / 'metrics.jsonl'}, line 2, does not hold what it should" in caplog.text
    assert "and 1 more of its lines; it is set aside as metrics.jsonl.damaged" in caplog.text


def test_a_run_that_begins_anew_logs_everything_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "signal", "step": 0, "a": 1.0}\n' + LINE + "\n")
    Trackers(tmp_path, 0).close()
    assert metrics.read(tmp_path) == []


def test_a_full_disk_when_the_metrics_are_taken_over_leaves_them_as_they_were(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(LINE + "\n")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"metrics of step 3 cannot be written .*No space left on device.* is whole"):
            Trackers(tmp_path, 3)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert metrics.read(tmp_path) == [json.loads(LINE)]


@pytest.mark.parametrize("what", ["deleted", "moved", "moved and made anew", "its file deleted", "its file replaced"])
def test_metrics_that_would_be_lost_are_told(tmp_path, what):
    folder = tmp_path / "run"
    folder.mkdir()
    writer = Trackers(folder, 0)
    writer.write("train", 1, {"loss": 0.5})
    if what.startswith("moved"):
        folder.rename(tmp_path / "elsewhere")
    elif what == "deleted":
        shutil.rmtree(folder)
    else:
        (folder / "metrics.jsonl").unlink()
    if what.endswith("anew"):
        folder.mkdir()
    if what.endswith("replaced"):
        (folder / "metrics.jsonl").write_text(LINE + "\n")
    named = f"the workdir {folder}" if what in ("deleted", "moved") else str(folder / "metrics.jsonl")
    with pytest.raises(OSError, match=f"^{named} has been deleted, moved or replaced while .*start the same command"):
        writer.write("train", 2, {"loss": 0.5})
    writer.close()
