"""A network, an optimizer, a tracker and a callback of one's own: each trains like one of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import nnx
from test_train import assert_equal, final_state, interrupt_at, records

from nfjax import evaluate, preemption, spp
from nfjax.runs import metrics
from nfjax.training import checks, loop, networks, optimizers, preprocessing, rng


@pytest.fixture
def config(tiny_config):
    tiny_config.augment.flip, tiny_config.augment.crop_padding = False, 0
    tiny_config.batch_size, tiny_config.optim.learning_rate = 32, 0.1
    return tiny_config


NETWORKS = {"NNX": "toys:network", "Linen": "toys:LinenNetwork"}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_ones_own_is_trained_scored_and_watched(config, tmp_path, kind, capsys):
    config.model.name, config.model.arguments = NETWORKS[kind], "width=12"
    config.epochs, config.log.signal_every_steps = 4, 20
    config.log.signal_where = "Conv, Linear" if kind == "NNX" else "Conv, Dense"
    summary = loop.train(config, str(tmp_path))
    assert summary["test_accuracy"] > 0.5  # of ten classes
    assert f"model   {NETWORKS[kind]}, width=12: " in capsys.readouterr().out
    assert "12" in (tmp_path / "parameters.txt").read_text()
    best = evaluate.evaluate(str(tmp_path))
    assert best["accuracy"] == summary["best_test_accuracy"]
    model = evaluate.load_model(str(tmp_path))
    images = preprocessing.make_normalize(config)(jnp.zeros((2, 8, 8, 3), jnp.uint8))
    np.testing.assert_array_equal(model(images), model(images))  # no dropout
    signal = [record for record in metrics.read(tmp_path) if record["kind"] == "signal"]
    assert len(signal[0]) > 2
    assert all(np.isfinite(value) for record in signal for name, value in record.items() if name != "kind")


def test_blocks_that_cannot_be_found_are_asked_for(config, tmp_path):
    config.model.name, config.log.signal_every_steps = NETWORKS["NNX"], 20
    with pytest.raises(ValueError, match=r"cannot tell what the blocks .*where= is --config\.log\.signal_where\)"):
        loop.train(config, str(tmp_path))


@pytest.mark.parametrize("kind", NETWORKS)
def test_its_dropout_and_statistics_resume_bit_for_bit(config, tmp_path, monkeypatch, kind):
    config.model.name = NETWORKS[kind]
    loop.train(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 21)
        with pytest.raises(preemption.TrainingInterruptedError):
            loop.train(config, str(tmp_path / "stopped"))
    loop.train(config, str(tmp_path / "stopped"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert_equal(final_state(config, tmp_path / "stopped"), final_state(config, tmp_path / "whole"))


@pytest.mark.parametrize("kind", NETWORKS)
def test_noise_follows_from_the_key_and_is_off_in_evaluation(config, kind):
    config.model.name = NETWORKS[kind]
    functions, params, batch_stats = networks.as_functions(networks.build(config, 10, rng.of_seed(0, "init")))
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    outcomes = [functions.train(params, batch_stats, images, jax.random.key(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(outcomes[0], outcomes[1])
    assert (outcomes[0] != outcomes[2]).any()
    np.testing.assert_array_equal(
        functions.predict(params, batch_stats, images), functions.predict(params, batch_stats, images)
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet19", "", "unknown model 'resnet19': expected .*resnet18.*or package.module:function"),
        ("toys:networks", "", "toys has no function 'networks'; it has Network, network, LinenNetwork, "),
        ("toy:network", "", "there is no module 'toy' here or among those installed"),
        ("toys:network", "widht=8", "argument of the model toys:network: 'widht': expected one of width"),
        ("toys:network", "8", "model.arguments='8': expected name=value, separated by commas"),
        ("toys:network", "width=2*4", "expected name=value, separated by commas"),
        ("toys:sign_descent", "", "num_classes"),
        ("preact_resnet", "activation=silly", "unknown activation 'silly'"),
    ],
)
def test_networks_that_cannot_be(config, name, arguments, message):
    config.model.name, config.model.arguments = name, arguments
    with pytest.raises(ValueError, match=message):
        checks.check(config)


def test_arguments_win_over_the_fields(config):
    config.model.arguments = "residual=idshort, activation=silu, stage_sizes=(1, 2), block=basic, depth=none"
    model = networks.build(config, 10, jax.random.key(0))
    assert len(model.blocks) == 3
    assert not any(hasattr(block.residual, "alpha") for block in model.blocks)
    config.model.name, config.model.arguments = "resnet10", "residual=learnscalar"
    model = networks.build(config, 10, jax.random.key(0))
    # Not where the shape changes.
    assert [hasattr(block.residual, "alpha") for block in model.blocks] == [True, False, False, False]
    assert model.blocks[0].branch.convolutions[0].kernel.shape[-1] == config.model.width == 4


# ---------------------------------------------------------------- optimizers

PARAMS = {"conv": {"kernel": jnp.full((3, 3, 2, 4), 2.0), "bias": jnp.full((4,), 5.0)}}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)


def update(name, **settings):
    optimizer = optimizers.make(name, lambda step: 0.1, **settings)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return {leaf: float(values.ravel()[0]) for leaf, values in updates["conv"].items()}


def test_optimizers_by_name_by_hand():
    assert update("sgd", momentum=0.9) == pytest.approx({"kernel": -0.05, "bias": -0.05})
    assert update("nesterov", momentum=0.9) == pytest.approx({"kernel": -0.05 * 1.9, "bias": -0.05 * 1.9})
    # Adam's first step is that of the sign; decay is decoupled: 0.1 * 0.5 * 2, and spares the bias.
    assert update("adamw", weight_decay=0.5) == pytest.approx({"kernel": -0.2, "bias": -0.1}, rel=1e-4)
    both = update("adamw", weight_decay=0.5, mask="all")
    assert both == pytest.approx({"kernel": -0.2, "bias": -0.1 - 0.1 * 0.5 * 5}, rel=1e-4)
    # LARS scales the kernel by trust |w| / |g + decay w| * 0.001, and not the bias.
    trust = 0.001 * 2 / (0.5 + 0.25 * 2)
    assert update("lars", weight_decay=0.25) == pytest.approx({"kernel": -0.1 * trust * 1.0, "bias": -0.05}, rel=1e-4)
    # LAMB: the update has the norm of the weights.
    lamb = update("lamb", weight_decay=0.5)
    assert lamb == pytest.approx({"kernel": -0.1 * 2.0, "bias": -0.1 * 5.0}, rel=1e-4)


def test_decay_is_coupled_where_the_optimizer_has_none():
    assert update("sgd", weight_decay=0.25)["kernel"] == pytest.approx(-0.1 * (0.5 + 0.25 * 2))
    assert update("sgd", weight_decay=0.25)["bias"] == pytest.approx(-0.05)
    assert update("optax:rmsprop", weight_decay=0.0)["kernel"] < 0


def test_settings_of_an_optimizer():
    assert update("adamw", settings="eps=1.5")["bias"] == pytest.approx(-0.1 * 0.5 / (0.5 + 1.5), rel=1e-4)
    assert update("sgd", momentum=0.9, settings="nesterov=true") == update("nesterov", momentum=0.9)
    assert update("optax:lion", settings="b1=0.5")["kernel"] == pytest.approx(-0.1 - 0.1 * 0.001 * 2 * 0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adam", {}, "unknown optim.name 'adam': expected .*sgd, nesterov, adamw, lars, lamb"),
        ("optax:adamx", {}, "optax has no function 'adamx'"),
        ("inspect:getdoc", {}, "optim.name='inspect:getdoc' gives NoneType: expected an optax.GradientTransf"),
        ("json:dumps", {}, "dumps cannot be called: Object of type function is not JSON"),
        ("adamw", {"settings": "beta=1"}, "optim.arguments has 'beta', which adamw does not take: expected b1, b2"),
        ("adamw", {"settings": "b1"}, "optim.arguments='b1': expected name=value"),
        ("sgd", {"mask": "biases"}, "unknown optim.weight_decay_mask 'biases': expected .*kernels, all"),
    ],
)
def test_optimizers_that_cannot_be(name, settings, message):
    with pytest.raises(ValueError, match=message):
        update(name, **settings)


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "optax:lion", "toys:sign_descent"])
def test_every_optimizer_trains_and_resumes_exactly(config, tmp_path, monkeypatch, name):
    config.epochs, config.optim.name, config.optim.learning_rate = 1, name, 0.01
    config.optim.weight_decay, config.optim.ema_decay = 1e-3, 0.9
    loop.train(config, str(tmp_path / "whole"))
    logged = [record for record in records(tmp_path / "whole") if record["kind"] == "train"]
    assert logged[-1]["loss"] < logged[0]["loss"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        with pytest.raises(preemption.TrainingInterruptedError):
            loop.train(config, str(tmp_path / "stopped"))
    loop.train(config, str(tmp_path / "stopped"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert_equal(final_state(config, tmp_path / "stopped"), final_state(config, tmp_path / "whole"))


# ---------------------------------------------------------------- trackers and callbacks


def test_a_tracker_of_ones_own(config, tmp_path):
    config.log.trackers = "toys:Csv, tensorboard"
    loop.train(config, str(tmp_path))
    first, *lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert first == '# "sgd"'
    epochs = [record for record in metrics.read(tmp_path) if record["kind"] == "epoch"]
    assert [tuple(map(float, line.split(","))) for line in lines] == [(r["step"], r["test_loss"]) for r in epochs]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_callback_of_ones_own_sees_the_run(config, tmp_path):
    seen = []

    def norms(run):
        seen.append((run.progress.step, float(optax.tree.norm(run.state.params)), run.tested))

    loop.train(config, str(tmp_path), more=[norms])
    logged = [record["step"] for record in metrics.read(tmp_path) if record["kind"] == "train"]
    assert [step for step, _, _ in seen] == logged
    assert len({norm for _, norm, _ in seen}) == len(seen)
    assert [step for step, _, tested in seen if tested] == [32, 64]


def test_toys_are_measured_by_spp_as_they_are(config):
    model = toys.network(10, rngs=nnx.Rngs(0))
    profile = spp.propagate(model, jax.random.normal(jax.random.key(0), (4, 8, 8, 3)), where="Conv")
    assert np.isfinite(profile.forward_var).all()
