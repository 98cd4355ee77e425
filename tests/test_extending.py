"""A network, an optimizer, a tracker and a callback of one's own: each trains like one of ours."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import odd_networks
import optax
import pytest
import toys
from flax import nnx
from test_train import assert_resumes_exactly, records

from nfjax import evaluate, spp
from nfjax.runs import metrics
from nfjax.training import checks, keywords, loop, networks, optimizers, preprocessing, rng, schedules
from tests.conftest import TINY


@pytest.fixture
def config(tiny_config):
    tiny_config.augment.flip, tiny_config.augment.crop_padding = False, 0
    tiny_config.batch_size, tiny_config.optim.learning_rate = 32, 0.1
    return tiny_config


def of_four_blocks(config):
    """The smallest network that has a depth by name, for what depends on the number of blocks."""
    config.model.update({"depth": TINY, "stage_sizes": None, "block": None})


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
    assert_resumes_exactly(config, tmp_path, monkeypatch, step=21)


@pytest.mark.parametrize("kind", NETWORKS)
def test_noise_follows_from_the_key_and_is_off_in_evaluation(config, kind):
    config.model.name = NETWORKS[kind]
    functions, params, batch_stats = networks.as_functions(networks.build(config, 10, rng.of_seed(0, "init")))
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    outcomes = [functions.train(params, batch_stats, images, jax.random.key(seed))[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(outcomes[0], outcomes[1])
    assert (outcomes[0] != outcomes[2]).any()
    # A model that drew noise would give something else the second time.
    model = networks.build(config, 10, rng.of_seed(0, "init"))
    model.eval()
    for _ in range(2):
        np.testing.assert_allclose(functions.predict(params, batch_stats, images), model(images), rtol=1e-5, atol=1e-6)


def test_whatever_flax_lets_a_network_hold_is_trained_saved_and_loaded(config, tmp_path, monkeypatch):
    config.model.name, config.optim.name, config.optim.learning_rate = "odd_networks:Odd", "adamw", 0.01
    config.optim.ema_decay, config.train.accumulate_steps = 0.9, 2
    config.log.signal_every_steps, config.log.signal_where = 20, "Conv,Linear,"
    summary = loop.train(config, str(tmp_path / "whole"))
    assert_resumes_exactly(config, tmp_path, monkeypatch, step=21)
    model = evaluate.load_model(str(tmp_path / "whole"), step=64)
    assert int(model.calls[...]) == 2 * 64
    assert bool(model.bright[...])
    np.testing.assert_array_equal(model.shift, np.full((1, 8), 0.5))
    score = evaluate.evaluate(str(tmp_path / "whole"), step=64)
    assert (score["accuracy"], score["ema_accuracy"]) == (summary["test_accuracy"], summary["test_ema_accuracy"])


def test_layers_that_are_one_array_get_noise_of_their_own(config):
    config.model.name = "odd_networks:Odd"
    functions, _, _ = networks.as_functions(networks.build(config, 10, rng.of_seed(0, "init")))
    keys = [
        jax.random.key_data(leaf)
        for leaf in jax.tree.leaves(networks.restarted(functions.random, jax.random.key(1)))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert any(key.shape[:-1] == (3,) for key in keys)
    each = np.concatenate([np.asarray(key).reshape(-1, key.shape[-1]) for key in keys])
    assert len(np.unique(each, axis=0)) == len(each)


def test_several_devices_keep_the_same_of_it(tmp_path):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, odd_networks.__file__, str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "devices 2" in result.stdout


def test_scores_are_summed_in_float32(config, tmp_path):
    config.model.name, config.epochs = "odd_networks:Bfloat16", 1
    loop.train(config, str(tmp_path))
    score = evaluate.evaluate(str(tmp_path))
    total = score["loss"] * score["images"]  # in bfloat16 it would have eight bits
    assert total != float(jnp.asarray(total, jnp.bfloat16))


def test_rules_initializers_and_schedules_of_ones_own_by_name(config):
    of_four_blocks(config)
    config.model.residual, config.model.init = "toys:depth_scaled", "jax.nn.initializers:ones"
    config.model.arguments, config.optim.schedule = "activation='jax.nn:silu'", "toys:square_root"
    checks.check(config)
    model = networks.build(config, 10, jax.random.key(0))
    assert {block.residual.rule.b for block in model.blocks} == {0.5}
    assert float(model.stem.conv.kernel[...].min()) == 1
    rates = schedules.build(config, [25, 100])
    assert [float(rates(step)) for step in (0, 75)] == pytest.approx([0.1, 0.05])


def test_a_norm_among_the_arguments_is_known(config):
    config.model.residual = "identity"
    assert "without normalization" in networks.describe(config)
    config.model.arguments = "norm=batch"
    assert "with batch norm" in networks.describe(config)


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
        ("preact_resnet", "conv=silly", r"model.name=preact_resnet, model.arguments='conv=silly': it cannot be built"),
        ("preact_resnet", "dtype=bfloat16", "has 'dtype', which is set by --config.model.dtype"),
        ("toys:network", "num_classes=3", "has 'num_classes', which is the number of classes of the images"),
        ("../toys:network", "", "expected package.module:function"),
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
        ("optax:novograd", {"weight_decay": 0.1}, "takes a weight decay and no mask: .*weight_decay_mask=all agrees"),
        ("adamw", {"settings": "mask=kernels"}, "has 'mask', which is set by --config.optim.weight_decay_mask"),
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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.name", "optax:polyak_sgd", "optim.name=optax:polyak_sgd: it fails where .* 'value'"),
        ("optim.name", "optax:clip", "optim.name=optax:clip: it fails where it is called as optimizer"),
        ("optim.arguments", "momentum=(1, 2)", r"optim.name=sgd, optim.arguments='momentum=\(1, 2\)': it fails where"),
        ("optim.schedule", "silly", "unknown optim.schedule 'silly': .*or package.module:function"),
        ("optim.schedule", "toys:depth_scaled", "optim.schedule=toys:depth_scaled: expected a function of the peak"),
        ("optim.schedule", "toys:no_schedule", "gives None for a step: expected one floating-point number"),
        ("optim.weight_decay_mask", "json:dumps", "optim.weight_decay_mask=json:dumps: expected a pytree of booleans"),
        ("optim.weight_decay_mask", "builtins:len", r"builtins:len: expected a pytree of booleans, .*\(it gives 3\)"),
        ("optim.weight_decay_mask", "builtins:list", "expected a pytree of booleans, like that of the parameters"),
        ("log.trackers", "toys:square_root", r"toys:square_root is called with \(folder, step, settings\): too many"),
        ("log.trackers", "toys:NoTracker", "toys:NoTracker has no method write: expected write and close"),
        ("log.signal_where", "Silly", "where='Silly' selects no module .*where= is --config.log.signal_where"),
        ("log.signal_where", ",", r"where=\(\) selects no module"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(config, tmp_path, field, value, message):
    config.log.signal_every_steps = 20
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_mask_sees_the_parameters_of_the_network(config):
    config.optim.weight_decay, config.optim.weight_decay_mask = 0.1, "toys:stem_only"
    checks.check(config)


def test_an_optimizer_that_begins_with_the_parameters_trains(config, tmp_path):
    config.optim.name, config.epochs = "optax.contrib:prodigy", 1
    assert loop.train(config, str(tmp_path))["steps"] == 32


@pytest.mark.parametrize(
    "text",
    ["b1=1)(b2=2", "b1=1)#", "b1=1).b(c=2", "b1=1) or f(b2=2", "*x", "**x", "1", "b1=2*4", "b1", "b1=(", "b1=x.y",
     "b1=[i for i in x]", "b1=lambda: 0", "b1=f(2)", "b1=" + "(" * 300 + ")" * 300, "b1=\x00", "=1", "b1==1", "b1=a:b"],
)  # fmt: skip
def test_arguments_that_are_no_arguments(text):
    with pytest.raises(ValueError, match=r"optim.arguments=.*: expected name=value, separated by commas"):
        keywords.parse("optim.arguments", text)


def test_arguments_as_text():
    text = "a=1, b=-2.5, c=silu, d='x, y', e=(1, (none, True)), f=[], g=FALSE,\n h=1e-6,"
    assert keywords.parse("f", text) == {
        "a": 1, "b": -2.5, "c": "silu", "d": "x, y", "e": (1, (None, True)), "f": (), "g": False, "h": 1e-6
    }  # fmt: skip
    assert keywords.parse("f", "") == keywords.parse("f", " ") == {}
    with pytest.raises(ValueError, match=r"f='a=1, a=2' has 'a' twice: expected each name once"):
        keywords.parse("f", "a=1, a=2")


def choose(config, name):
    config.epochs, config.optim.name, config.optim.learning_rate = 1, name, 0.01
    config.optim.weight_decay, config.optim.ema_decay = 1e-3, 0.9


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "optax:lion", "toys:sign_descent"])
def test_every_optimizer_trains(config, tmp_path, name):
    of_four_blocks(config)
    choose(config, name)
    loop.train(config, str(tmp_path))
    logged = [record for record in records(tmp_path) if record["kind"] == "train"]
    assert logged[-1]["loss"] < logged[0]["loss"]


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_their_state_and_the_average_of_the_weights_resume_exactly(config, tmp_path, monkeypatch, name):
    choose(config, name)
    loop.train(config, str(tmp_path / "whole"))
    assert_resumes_exactly(config, tmp_path, monkeypatch, step=10)


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
