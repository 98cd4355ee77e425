"""The loop learns, resumes bit for bit, never trains on NaN, and gives the same numbers however it is dispatched."""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfjax import data, evaluate, preemption, spp
from nfjax.preemption import Interrupts
from nfjax.runs import checkpoint, metrics, workdirs
from nfjax.runs.progress import Bar
from nfjax.training import checks, networks, preprocessing, rng
from nfjax.training import loop as train
from nfjax.training import step as steps
from nfjax.training.progress import Progress
from nfjax.training.state import Batch, TrainState

TIMING = {"images_per_second", "data_wait"}


def records(folder):
    return [{k: v for k, v in record.items() if k not in TIMING} for record in metrics.read(folder)]


def learn(config):
    """Settings with which the tiny network learns the made-up images."""
    config.epochs, config.batch_size, config.optim.learning_rate = 6, 32, 0.1
    config.augment.flip, config.augment.crop_padding = False, 0


def final_state(config, folder):
    """The arrays of the newest checkpoint."""
    reader = checkpoint.Checkpoints(folder, read_only=True)
    tree = reader.manager.restore(reader.steps()[-1])
    reader.close()
    return jax.tree.leaves(tree)


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def interrupt_at(monkeypatch, step):
    """Presses Ctrl-C once when the run reaches `step`."""
    add = Progress.add

    def pressing(self, sums):
        add(self, sums)
        if self.step >= step and not pressing.done:
            pressing.done = True
            signal.raise_signal(signal.SIGINT)

    pressing.done = False
    monkeypatch.setattr(Progress, "add", pressing)


def assert_resumes_exactly(config, tmp_path, monkeypatch, step):
    """A run that is stopped at `step` and goes on ends as the one in `tmp_path / "whole"`, bit for bit."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(preemption.TrainingInterruptedError, match="the same command goes on from there"):
            train.train(config, str(stopped))
    assert len(records(stopped)) < len(records(whole))
    train.train(config, str(stopped))
    assert records(stopped) == records(whole)
    assert_equal(final_state(config, stopped), final_state(config, whole))


@pytest.fixture
def whole(tiny_config, tmp_path):
    """A run that is never stopped: its config, folder, records."""
    folder = tmp_path / "whole"
    summary = train.train(tiny_config, str(folder))
    return tiny_config, folder, summary


def test_a_run_learns_and_leaves_everything_in_its_workdir(tiny_config, tmp_path, capsys):
    learn(tiny_config)
    summary = train.train(tiny_config, str(tmp_path))
    assert summary["test_accuracy"] > 0.9
    assert summary["steps"] == 6 * 1024 // 32
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.json",
        "versions.json",
        "parameters.txt",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "curves.png",
    }
    epochs = [record for record in metrics.read(tmp_path) if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["test_accuracy"] == summary["test_accuracy"]
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions[0]["packages"]["jax"] == jax.__version__
    assert versions[0]["device"]["platform"] == "cpu"
    assert json.loads((tmp_path / "data.json").read_text())["class_names"][3] == "pattern 3"
    assert "classifier/kernel" in (tmp_path / "parameters.txt").read_text()
    printed = capsys.readouterr().out
    assert "epoch 6/6  train loss" in printed
    assert "test    " in printed
    score = evaluate.evaluate(tmp_path)
    assert score["images"] == 250
    best = max(epochs, key=lambda record: record["test_accuracy"])
    assert score["accuracy"] == best["test_accuracy"]


@pytest.mark.parametrize("step", [3, 16, 21], ids=["in epoch 1", "at the boundary", "in epoch 2"])
def test_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch, step):
    config, _, _ = whole
    assert_resumes_exactly(config, tmp_path, monkeypatch, step)
    assert len(json.loads((tmp_path / "stopped" / "versions.json").read_text())) == 2


def test_the_rules_of_others_resume_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    """With all kinds of parameters that they have: gains and biases of channels, single numbers."""
    tiny_config.model.residual, tiny_config.model.norm = "nf", "derf"
    tiny_config.optim.update({"name": "nesterov", "adaptive_clip": 0.01, "scalar_rate": 0.1})
    train.train(tiny_config, str(tmp_path / "whole"))
    assert_resumes_exactly(tiny_config, tmp_path, monkeypatch, step=21)


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tmp_path, monkeypatch):
    """What was logged after that checkpoint is dropped, and logged again: each step stands in the metrics once."""
    config, folder, _ = whole
    take = Progress.take

    def dying(self, part):
        if self.step > 25:
            raise KilledError
        return take(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "take", dying)
        with pytest.raises(KilledError):
            train.train(config, str(tmp_path / "killed"))
    assert records(tmp_path / "killed")[-1]["step"] > 16
    train.train(config, str(tmp_path / "killed"))
    assert records(tmp_path / "killed") == records(folder)
    assert_equal(final_state(config, tmp_path / "killed"), final_state(config, folder))


def test_scoring_some_epochs_leaves_out_the_others_and_nothing_else(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.epochs = 3
    train.train(tiny_config, str(tmp_path / "each"))
    capsys.readouterr()
    tiny_config.log.evaluate_every_epochs = 2
    summary = train.train(tiny_config, str(tmp_path / "whole"))
    each = records(tmp_path / "each")
    assert records(tmp_path / "whole") == [line for line in each if line["kind"] != "epoch" or line["epoch"] in (2, 3)]
    scores = {line["epoch"]: line["test_accuracy"] for line in each if line["kind"] == "epoch" and line["epoch"] > 1}
    assert summary["best_epoch"] == max(scores, key=scores.get)
    assert evaluate.evaluate(str(tmp_path / "whole"))["accuracy"] == max(scores.values())
    printed = capsys.readouterr().out
    assert "epoch 1/3" not in printed
    assert "epoch 3/3" in printed
    assert_resumes_exactly(tiny_config, tmp_path, monkeypatch, step=8)  # in the epoch that is not scored


def test_a_finished_run_is_not_trained_again(whole, capsys):
    config, folder, summary = whole
    before = (folder / "metrics.jsonl").read_text()
    assert train.train(config, str(folder)) == summary
    assert (folder / "metrics.jsonl").read_text() == before
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"steps_per_dispatch": 3}, {"keep": "host"}], ids=["loop", "host"])
def test_other_ways_of_dispatch_give_the_same_run(whole, tmp_path, settings):
    config, folder, _ = whole
    config.steps_per_dispatch = settings.get("steps_per_dispatch")
    config.data.keep = settings.get("keep", "device")
    train.train(config, str(tmp_path / "other"))
    for ours, other in zip(records(folder), records(tmp_path / "other"), strict=True):
        assert ours.keys() == other.keys()
        for name, value in ours.items() - {("kind", ours["kind"])}:
            # Correct predictions are counts of a few hundred examples: rounding may move one of them.
            tolerance = 0.01 if name.endswith("accuracy") else 0
            assert other[name] == pytest.approx(value, rel=2e-3, abs=tolerance), name


def test_resume_with_the_loop_is_exact_too(tiny_config, tmp_path, monkeypatch):
    tiny_config.steps_per_dispatch = 3
    train.train(tiny_config, str(tmp_path / "whole"))
    assert_resumes_exactly(tiny_config, tmp_path, monkeypatch, step=12)


def test_signal_propagation_is_watched_and_changes_nothing(whole, tmp_path):
    config, folder, _ = whole
    config.log.signal_every_steps = 10
    train.train(config, str(tmp_path / "watched"))
    watched = [record for record in metrics.read(tmp_path / "watched") if record["kind"] == "signal"]
    assert [record["step"] for record in watched] == [0, 10, 20, 30]
    dataset = data.load("synthetic", "", 8)
    images = preprocessing.make_normalize(config)(jnp.asarray(dataset.train.images[:64]))
    model = networks.build(config, len(dataset.class_names), rng.of_seed(config.seed, "init"))
    at_start = spp.scalars(spp.propagate(model, images, seed=config.seed))
    assert len(at_start) == 2 * 2
    assert {name: watched[0][name] for name in at_start} == pytest.approx(at_start, rel=1e-4)
    assert watched[-1]["forward_var/blocks/0"] != watched[0]["forward_var/blocks/0"]
    config.log.signal_every_steps = None
    assert_equal(final_state(config, tmp_path / "watched"), final_state(config, folder))


def test_signal_is_measured_at_log_steps_only(tiny_config, tmp_path):
    tiny_config.log.signal_every_steps = 7
    with pytest.raises(ValueError, match=r"signal_every_steps=7 must be a positive multiple of log\.every_steps=5"):
        train.train(tiny_config, str(tmp_path))


class KilledError(BaseException):
    """Stands for SIGKILL: nothing is saved."""


@pytest.mark.parametrize("ending", ["killed at step 5", "killed at step 0", "stopped at step 0"])
def test_what_is_measured_before_the_first_checkpoint_is_logged_once(tiny_config, tmp_path, monkeypatch, ending):
    tiny_config.epochs, tiny_config.log.signal_every_steps = 1, 5

    def end(*args):
        if ending.startswith("killed"):
            raise KilledError
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        if ending == "killed at step 5":
            patch.setattr(Bar, "show", end)
        else:
            patch.setattr(Bar, "__enter__", lambda self, enter=Bar.__enter__: end() or enter(self))
        # Before the first step there is nothing to save, and Ctrl-C ends the run at once.
        with pytest.raises((KilledError, KeyboardInterrupt)):
            train.train(tiny_config, str(tmp_path / "run"))
    assert {"kind": "signal", "step": 0}.items() <= records(tmp_path / "run")[0].items()
    train.train(tiny_config, str(tmp_path / "run"))
    logged = [(record["kind"], record["step"]) for record in records(tmp_path / "run")]
    assert [step for kind, step in logged if kind == "signal"] == [0, 5, 10, 15]
    assert len(set(logged)) == len(logged)


@pytest.mark.parametrize("what", ["deleted", "moved"])
def test_a_workdir_that_disappears_ends_the_run_within_a_log_interval(tiny_config, tmp_path, monkeypatch, what):
    folder, reached = tmp_path / "run", []

    def vanish(self, values, show=Bar.show):
        reached.append(values["epoch"])
        shutil.rmtree(folder) if what == "deleted" else folder.rename(tmp_path / "elsewhere")
        show(self, values)

    monkeypatch.setattr(Bar, "show", vanish)
    with pytest.raises(OSError, match=rf"the workdir {folder} has been deleted, moved or replaced while the run was"):
        train.train(tiny_config, str(folder))
    assert len(reached) == 1
    assert not folder.exists()
    if what == "moved":
        monkeypatch.setattr(Bar, "show", lambda self, values: None)
        assert train.train(tiny_config, str(tmp_path / "elsewhere"))["steps"] == 32


@pytest.mark.parametrize("per_dispatch", [None, 4])
def test_divergence_stops_the_run_before_it_is_trained_on(tiny_config, tmp_path, per_dispatch):
    tiny_config.optim.learning_rate = 1e4
    tiny_config.model.residual = "identity"
    tiny_config.steps_per_dispatch = per_dispatch
    tiny_config.log.every_steps = 8
    with pytest.raises(
        train.TrainingDivergedError, match=r"at step \d+ the loss is .*no checkpoint was saved yet.*_rate"
    ) as caught:
        train.train(tiny_config, str(tmp_path))
    assert "1e+04" in str(caught.value) or "10000" in str(caught.value)
    assert not any("nan" in line.lower() for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_divergence_names_the_last_good_checkpoint(tiny_config, tmp_path, monkeypatch):
    tiny_config.epochs = 1
    train.train(tiny_config, str(tmp_path))
    tiny_config.epochs = 2
    monkeypatch.setattr(workdirs, "MAY_CHANGE", (*workdirs.MAY_CHANGE, "epochs", "optim."))
    tiny_config.optim.learning_rate = 3e38
    with pytest.raises(train.TrainingDivergedError, match="the last good checkpoint is at step 16"):
        train.train(tiny_config, str(tmp_path))


def test_an_update_that_is_not_finite_is_not_taken(tiny_config, tmp_path):
    """Loss and gradient of the last step are fine, and the parameters after it would not be."""
    tiny_config.batch_size, tiny_config.epochs, tiny_config.optim.learning_rate = 1024, 1, 3e38
    with pytest.raises(train.TrainingDivergedError, match=r"at step 0 the loss is 2\."):
        train.train(tiny_config, str(tmp_path))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_test_loss_that_is_not_finite_is_not_saved(tiny_config, tmp_path):
    tiny_config.batch_size, tiny_config.epochs, tiny_config.optim.learning_rate = 1024, 1, 1e15
    with pytest.raises(train.TrainingDivergedError, match="after epoch 1 the test loss is not finite; no checkpoint"):
        train.train(tiny_config, str(tmp_path))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_other_images_in_the_same_workdir_are_refused(whole, monkeypatch):
    config, folder, _ = whole
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    before = (folder / "data.json").read_text()
    other = data.load("synthetic", "", 8)
    renamed = dataclasses.replace(other, class_names=tuple("abcdefghij"))
    fewer = dataclasses.replace(other, train=data.Images(other.train.images[:512], other.train.labels[:512]))
    for changed, message in (
        (renamed, "Its class_names: pattern 0.*now: a, b"),
        (fewer, "Its train_images: 1,024; now: 512"),
    ):
        monkeypatch.setitem(data.DATASETS, "synthetic", lambda directory, size, changed=changed: changed)
        with pytest.raises(ValueError, match=message):
            train.train(config, str(folder))
    monkeypatch.setitem(data.DATASETS, "synthetic", lambda directory, size: renamed)
    with pytest.raises(ValueError, match="Its class_names"):
        evaluate.evaluate(str(folder))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == saved
    assert (folder / "data.json").read_text() == before


def test_a_first_try_that_failed_does_not_stand_in_the_way(tiny_config, tmp_path):
    tiny_config.data.source = "folder"
    tiny_config.data.dir = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        train.train(tiny_config, str(tmp_path / "run"))
    tiny_config.data.source, tiny_config.epochs = "synthetic", 1
    train.train(tiny_config, str(tmp_path / "run"))


def test_load_model_gives_the_trained_network(whole):
    config, folder, _ = whole
    model = evaluate.load_model(str(folder))
    images = data.load("synthetic", "", 8).test
    logits = model(preprocessing.make_normalize(config)(jnp.asarray(images.images)))
    accuracy = float((jnp.argmax(logits, axis=-1) == images.labels).mean())
    assert accuracy == pytest.approx(evaluate.evaluate(str(folder))["accuracy"])
    first, last = (evaluate.load_model(str(folder), step=step).stem.conv.kernel[...] for step in (16, 32))
    assert (first != last).any()


def quadratic_step():
    """A train step over one parameter, without a network: loss = (w - image mean)^2 per example."""

    class Line:
        random = ()

        def train(self, params, batch_stats, images, noise, axes):
            return params["w"] * images.mean((1, 2)), batch_stats

    task = steps.Task(Line(), optax.sgd(0.1), lambda key, images: images.astype(jnp.float32))
    return jax.jit(lambda state, batch: steps.train_step.__wrapped__(state, batch, jax.random.key(0), task=task))


def quadratic_batch(image):
    return Batch(jnp.asarray(image, jnp.uint8).reshape(1, 2, 4, 3), jnp.zeros((1,), jnp.int32), jnp.ones(1))


def test_a_step_behind_one_that_was_not_finite_changes_nothing():
    step = quadratic_step()
    state = TrainState.start({"w": jnp.ones((3,))[None]}, {}, optax.sgd(0.1))
    batch = quadratic_batch(jnp.arange(24))
    skipped, _ = step(state.replace(diverged=jnp.array(True)), batch)
    assert bool(skipped.diverged)
    assert_equal(jax.tree.leaves(skipped.to_saved()), jax.tree.leaves(state.to_saved()))
    moved, sums = step(state, batch)
    assert int(moved.step) == 1
    assert not bool(moved.diverged)
    assert float(jnp.abs(moved.params["w"] - 1).max()) > 0
    assert float(sums["count"]) == 1


def test_gradient_norm_and_loss_are_finite_or_the_state_stays():
    step = quadratic_step()
    state = TrainState.start({"w": jnp.full((1, 3), jnp.inf)}, {}, optax.sgd(0.1))
    after, sums = step(state, quadratic_batch(jnp.ones(24)))
    assert not np.isfinite(float(sums["loss"]))
    assert bool(after.diverged)
    assert_equal(jax.tree.leaves(after.to_saved()), jax.tree.leaves(state.to_saved()))


def test_batch_norm_trains_and_keeps_running_statistics(tiny_config, tmp_path):
    tiny_config.model.residual, tiny_config.model.norm = "identity", "batch"
    learn(tiny_config)
    summary = train.train(tiny_config, str(tmp_path))
    assert summary["test_accuracy"] > 0.9
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    stats = reader.manager.restore(reader.steps()[-1])["state"]["batch_stats"]
    reader.close()
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(stats))


def test_all_of_the_optimizer_and_loss_settings(tiny_config, tmp_path):
    tiny_config.epochs = 1
    tiny_config.optim.update({"schedule": "cosine", "weight_decay": 1e-3, "label_smoothing": 0.1})
    tiny_config.optim.clip_norm, tiny_config.optim.adaptive_clip = 1.0, 0.01
    tiny_config.model.dtype = "bfloat16"
    tiny_config.augment.flip, tiny_config.augment.crop_padding = False, 0
    summary = train.train(tiny_config, str(tmp_path))
    assert 0 <= summary["test_accuracy"] <= 1
    rates = [record["learning_rate"] for record in metrics.read(tmp_path) if record["kind"] == "train"]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)


def test_another_config_in_the_workdir_is_refused(whole):
    config, folder, _ = whole
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    config.model.width, config.optim.learning_rate = 8, 0.5
    with pytest.raises(
        ValueError,
        match=r"(?s)another config.*model.width: 4 there, 8 now.*optim.learning_rate: 0.01 there",
    ) as caught:
        train.train(config, str(folder))
    assert "batch_size" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_how_often_it_reports_may_change(whole):
    config, folder, summary = whole
    config.log.every_steps = 7
    assert train.train(config, str(folder)) == summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.residual": "convshot"}, "unknown residual 'convshot'.*convshort"),
        ({"model.init": "he"}, "unknown init 'he'.*he_fan_out"),
        ({"model.depth": 19, "model.stage_sizes": None, "model.block": None}, "unknown depth 19.*18, 34"),
        ({"model.norm": "layer"}, "unknown norm 'layer'.*batch, group"),
        ({"model.dtype": "float16"}, "unknown model.dtype 'float16': expected one of float32, bfloat16"),
        ({"data.mean": (0.5,)}, "expected three numbers"),
        ({"seed": -1}, "seed=-1 must be from 0 to"),
        ({"data.std": (0.0, 1.0, 1.0)}, "expected three positive numbers"),
        ({"optim.learning_rate": float("nan")}, "optim.learning_rate=nan must be positive"),
        ({"optim.momentum": 2.0}, "optim.momentum=2.0 must be at least 0 and less than 1"),
        ({"optim.clip_norm": 0.0}, "optim.clip_norm=0.0 must be positive"),
        ({"augment.crop_padding": -1}, "augment.crop_padding=-1 must be 0 or more"),
        ({"optim.label_smoothing": 1.0}, "optim.label_smoothing=1.0 must be at least 0 and less than 1"),
        ({"steps_per_dispatch": 2, "data.keep": "host"}, "and 1 unless data.keep=device"),
        ({"data.keep": "cloud"}, "unknown data.keep 'cloud': expected one of device, host, disk"),
        (
            {"data.keep": "disk"},
            "data.keep=disk: synthetic has no image files to decode; set --config.data.keep=device",
        ),
        ({"data.workers": 0}, "data.workers=0 must be at least 1"),
        ({"data.max_skipped": 2.0}, "data.max_skipped=2.0 must be a share"),
        ({"augment.resized_crop_scale": (0.1, 1.0)}, "needs the original images: set --config.data.keep=disk"),
        ({"augment.resized_crop_scale": (0.0, 1.0), "data.keep": "disk"}, "expected 0 < low <= high <= 1"),
        ({"data.resize": 4}, "a square of 8 pixels cannot be cut out of an image whose short side has 4"),
        ({"data.source": "cifar"}, "unknown data source 'cifar': expected one of digits, synthetic, folder"),
        (
            {"optim.schedule": "never"},
            "unknown optim.schedule 'never': expected one of cosine, cosine_by_",
        ),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"batch_size": 2000}, "batch_size=2000 is more than the 1024 training images"),
        ({"epochs": 0}, "epochs=0 must be positive"),
        ({"checkpoint.keep": 0}, "checkpoint.keep=0 must be positive"),
        ({"log.evaluate_every_epochs": 0}, "log.evaluate_every_epochs=0 must be positive"),
        ({"steps_per_dispatch": -1}, "steps_per_dispatch=-1 must be positive"),
    ],
)
def test_bad_settings(tiny_config, tmp_path, change, message):
    tiny_config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        train.train(tiny_config, str(tmp_path / "run"))


def test_batch_that_the_devices_do_not_divide(tiny_config, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    tiny_config.batch_size = 100
    with pytest.raises(
        ValueError,
        match=r"batch_size=100 cannot be divided over 8 devices; choose a multiple, such as --config.batch_size=96",
    ):
        checks.check(tiny_config)


def test_workdir_that_cannot_be_written(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the workdir .* cannot be written .*choose another with --workdir"):
        train.train(tiny_config, str(tmp_path / "file" / "run"))


def test_truncated_checkpoint_falls_back(whole, caplog):
    config, folder, _ = whole
    expected = records(folder), final_state(config, folder)
    for path in (folder / checkpoint.FOLDER / "32" / "default").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train.train(config, str(folder))  # trains the second epoch again
    assert "checkpoint 32 is damaged" in caplog.text
    assert records(folder) == expected[0]
    assert_equal(final_state(config, folder), expected[1])


def test_evaluate_a_chosen_checkpoint(whole):
    _, folder, _ = whole
    epochs = [record for record in metrics.read(folder) if record["kind"] == "epoch"]
    for record in epochs:
        score = evaluate.evaluate(str(folder), step=record["step"])
        assert (score["accuracy"], score["loss"]) == (record["test_accuracy"], record["test_loss"])
    with pytest.raises(FileNotFoundError, match="has no checkpoint at step 5: expected one of 16, 32"):
        evaluate.evaluate(str(folder), step=5)


def test_evaluate_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        evaluate.evaluate(str(tmp_path))


def test_second_interrupt_is_not_caught():
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.pending
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_in_a_thread_whose_picture_cannot_be_drawn(tiny_config, tmp_path, monkeypatch, caplog, capsys):
    """Signals are the main thread's, and what is only reported never fails a run."""

    def fail(*arguments):
        raise ValueError("no such backend")

    tiny_config.epochs = 1
    with concurrent.futures.ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(metrics, "plot_curves", fail)
        summary = pool.submit(train.train, tiny_config, str(tmp_path)).result()
    assert summary["steps"] == 16
    assert "the curves cannot be drawn (ValueError: no such backend); the run is complete" in caplog.text
    assert "done    1 epochs, 16 steps" in (out := capsys.readouterr().out)
    assert "curves" not in out
    assert not (tmp_path / "curves.png").exists()
    assert train.train(tiny_config, str(tmp_path)) == summary
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_workdir_whose_name_is_not_utf8_is_refused(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"w\\udce9 has a name that is not UTF-8"):
        train.train(tiny_config, os.fsdecode(os.fsencode(tmp_path) + b"/w\xe9"))
    assert list(tmp_path.iterdir()) == []
