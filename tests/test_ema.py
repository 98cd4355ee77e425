"""The average of the weights: by hand, in a run, and after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import TIMING

from nfjax import evaluate
from nfjax.runs import metrics
from nfjax.training import loop, step
from nfjax.training.state import Batch, TrainState


def test_the_average_by_hand():
    class Line:
        random = ()

        def train(self, params, batch_stats, images, noise, axes):
            return params["w"] * images.mean((1, 2)), {"seen": batch_stats["seen"] + 1}

    task = step.Task(Line(), optax.sgd(0.1), lambda key, images: images.astype(jnp.float32), ema_decay=0.5)
    state = TrainState.start({"w": jnp.ones((1, 3))}, {"seen": jnp.zeros(())}, task.optimizer, ema=True)
    batch = Batch(jnp.arange(24, dtype=jnp.uint8).reshape(1, 2, 4, 3), jnp.zeros((1,), jnp.int32), jnp.ones(1))
    expected, seen = np.ones((1, 3)), 0.0
    for number in range(12):
        state, _ = step.train_step(state, batch, jax.random.key(0), task=task)
        keep = min(0.5, (1 + number) / (10 + number))
        expected = keep * expected + (1 - keep) * np.asarray(state.params["w"])
        seen = keep * seen + (1 - keep) * (number + 1)
    np.testing.assert_allclose(state.ema["params"]["w"], expected, rtol=1e-5)
    assert float(state.ema["batch_stats"]["seen"]) == pytest.approx(seen, rel=1e-5)


def test_the_average_of_bfloat16_does_not_stand_still(tiny_config, tmp_path):
    tiny_config.model.name, tiny_config.optim.ema_decay = "odd_networks:Bfloat16", 0.9999
    tiny_config.epochs, tiny_config.optim.learning_rate = 1, 0.1
    params = {"w": jnp.ones((1, 3), jnp.bfloat16)}
    before = TrainState.start(params, {}, optax.sgd(0.1), ema=True).replace(step=jnp.int32(10**6))
    moved = step._averaged(before, before.replace(params={"w": jnp.full((1, 3), 2, jnp.bfloat16)}), 0.9999)
    np.testing.assert_allclose(moved["params"]["w"], 1.0001, rtol=1e-6)
    summary = loop.train(tiny_config, str(tmp_path))
    assert evaluate.evaluate(str(tmp_path))["ema_accuracy"] == summary["test_ema_accuracy"]
    assert evaluate.load_model(str(tmp_path), ema=True).classifier.kernel.dtype == jnp.bfloat16


def test_an_average_that_is_not_finite_is_told_of_like_the_weights(tiny_config, tmp_path):
    def spoil(run):
        run.state = run.state.replace(ema=jax.tree.map(lambda x: x * jnp.nan, run.state.ema))

    tiny_config.optim.ema_decay, tiny_config.checkpoint.every_steps = 0.9, 1
    with pytest.raises(loop.TrainingDivergedError, match=r"after epoch 1 the test loss of the average .* not finite"):
        loop.train(tiny_config, str(tmp_path), more=[spoil])
    assert all(record["kind"] == "train" for record in metrics.read(tmp_path))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_it_is_scored_beside_the_weights_and_changes_nothing(tiny_config, tmp_path, norm, capsys):
    tiny_config.model.norm, tiny_config.model.residual = norm, "identity"
    tiny_config.optim.learning_rate = 0.1
    loop.train(tiny_config, str(tmp_path / "without"))
    tiny_config.optim.ema_decay = 0.95
    summary = loop.train(tiny_config, str(tmp_path / "with"))
    with_average, without = (metrics.read(tmp_path / name) for name in ("with", "without"))
    for ours, plain in zip(with_average, without, strict=True):
        average = {name: ours.pop(name) for name in list(ours) if "ema" in name}
        assert bool(average) == (ours["kind"] == "epoch")
        for name in ours.keys() - TIMING - {"kind"}:
            assert ours[name] == pytest.approx(plain[name], rel=2e-3, abs=0.01), name
    assert average["test_ema_accuracy"] == summary["test_ema_accuracy"]
    score = evaluate.evaluate(str(tmp_path / "with"), step=32)
    assert (score["ema_loss"], score["ema_accuracy"]) == (average["test_ema_loss"], average["test_ema_accuracy"])
    printed = capsys.readouterr().out
    assert f"(average {average['test_ema_accuracy']:.2%})" in printed
    assert f"{average['test_ema_accuracy']:.2%} by the average of the weights" in printed
    plain, averaged = (evaluate.load_model(str(tmp_path / "with"), ema=ema) for ema in (False, True))
    assert (plain.classifier.kernel[...] != averaged.classifier.kernel[...]).any()
    with pytest.raises(ValueError, match=r"has no average of the weights: it was trained without --config.optim.ema_"):
        evaluate.load_model(str(tmp_path / "without"), ema=True)
