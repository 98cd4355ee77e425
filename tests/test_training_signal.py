"""What a run says of its signal: where it stopped being finite, how much its weights move, and what it began with."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train import assert_equal, assert_resumes_exactly, final_state, records

from nfjax import data, rescale, spp
from nfjax.training import divergence, loader, movement, networks, preprocessing, rng, setup
from nfjax.training import loop as train
from nfjax.training import step as steps

# ---------------------------------------------------------------- divergence


class Chain(nnx.Module):
    """Dense layers whose kernels are multiplied by `gains`, which may be so far apart that one way overflows."""

    def __init__(self, gains, num_classes, image_size, rngs, dtype=jnp.float32, rate=0.0):
        widths = [3 * image_size**2, *[8] * (len(gains) - 1), num_classes]
        self.layers = nnx.List([
            nnx.Linear(a, b, rngs=rngs, dtype=dtype) for a, b in itertools.pairwise(widths)
        ])  # fmt: skip
        for layer, gain in zip(self.layers, gains, strict=True):
            layer.kernel[...] = layer.kernel[...] * gain
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = layer(self.dropout(x))
        return x


GAINS = {
    "forward": (1e15, 1e15, 1e15, 1.0),  # 1e45 behind the third layer
    "backward": (1e-18, 1e-18, 1e18, 1e18, 1e6),  # the gradient is 1e22 behind the third layer, 1e40 before it
    "parameter": (1e18, 1e-30, 1e18, 1e6),  # 1e18 comes to the second layer, and a gradient of 1e22 comes back to it
    "norm": (1e-18, 1e18, 1e6),  # the gradient of the first kernel is 1e22, its square 1e44
}


def make_forward(num_classes, image_size, dtype, rngs):
    return Chain(GAINS["forward"], num_classes, image_size, rngs, dtype)


def make_backward(num_classes, image_size, dtype, rngs):
    return Chain(GAINS["backward"], num_classes, image_size, rngs, dtype)


def make_backward_with_dropout(num_classes, image_size, dtype, rngs):
    return Chain(GAINS["backward"], num_classes, image_size, rngs, dtype, rate=0.5)


def make_parameter(num_classes, image_size, dtype, rngs):
    return Chain(GAINS["parameter"], num_classes, image_size, rngs, dtype)


def make_norm(num_classes, image_size, dtype, rngs):
    return Chain(GAINS["norm"], num_classes, image_size, rngs, dtype)


def message(config, folder):
    with pytest.raises(train.TrainingDivergedError) as caught:
        train.train(config, str(folder))
    return str(caught.value)


def of_chain(config, make):
    config.model.name = f"tests.test_training_signal:{make.__name__}"
    config.batch_size, config.optim.learning_rate = 64, 1e-3
    return config


def test_activations_that_overflow_are_named(tiny_config, tmp_path):
    found = message(of_chain(tiny_config, make_forward), tmp_path)
    assert "at step 0 the loss is nan" in found
    assert "the output of layers/2 is the first that is not finite; before it, at layers/1, the standard dev" in found
    assert "nothing was trained on it" in found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [make_backward, make_backward_with_dropout])
def test_a_gradient_that_overflows_behind_finite_activations_is_named(tiny_config, tmp_path, dtype, make):
    tiny_config.model.dtype = dtype
    found = message(of_chain(tiny_config, make), tmp_path)
    assert "the gradient of layers/1 is the first on the way back that is not finite; activations are" in found
    assert "behind it, at layers/2, the standard deviation was" in found


def test_the_gradient_of_a_parameter_that_overflows_alone_is_named(tiny_config, tmp_path):
    found = message(of_chain(tiny_config, make_parameter), tmp_path)
    assert "activations and their gradients are finite, the gradient of the parameter layers/1/kernel is not" in found


def test_a_norm_that_overflows_alone_is_told(tiny_config, tmp_path):
    found = message(of_chain(tiny_config, make_norm), tmp_path)
    assert "every gradient is finite, but not the square of its norm: that of layers/0/kernel has entries of" in found


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_a_learning_rate_that_is_too_large(tiny_config, tmp_path, per_dispatch):
    tiny_config.optim.learning_rate, tiny_config.model.residual = 1e12, "identity"
    tiny_config.steps_per_dispatch, tiny_config.log.every_steps = per_dispatch, 8
    found = message(tiny_config, tmp_path)
    assert "is the first that is not finite" in found


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_what_is_named_is_what_a_measurement_of_that_step_finds(tiny_config, tmp_path, monkeypatch, per_dispatch):
    """Behind some good steps, with augmentation and mixing, in parts: the images and the weights are those of the step
    that was not finite.
    """
    tiny_config.optim.learning_rate, tiny_config.model.residual = 1e12, "identity"
    tiny_config.augment.mixup_alpha, tiny_config.train.accumulate_steps = 0.2, 2
    tiny_config.steps_per_dispatch, tiny_config.log.every_steps = per_dispatch, 8
    seen = {}

    def find(place, loss_is_finite, find=divergence.find):
        seen.update(number=place.number, run=place)
        return find(place, loss_is_finite)

    monkeypatch.setattr(divergence, "find", find)
    found = message(tiny_config, tmp_path)
    run, number = seen["run"], seen["number"]
    assert number == int(run.state.step) > 0
    assert f"at step {number} the loss is" in found
    batch = next(run.loader.train(number, number + 1))
    examples = steps.make_examples(batch, rng.of_step(run.key, number), run.task)
    model = run.task.network.model(run.state.params, run.state.batch_stats)
    profile = spp.propagate(model, examples["image"][::2], where=divergence.holds_parameters)
    assert f"the output of {spp.find_breakdown(profile).path} is the first that is not finite" in found


def test_a_kernel_that_is_not_finite_is_named(tiny_config, tmp_path, monkeypatch):
    as_functions = networks.as_functions

    def spoiled(model, *args):
        kernel = model.blocks[1].branch.convolutions[1].kernel
        if isinstance(kernel.get_value(), jax.Array):  # and no shape, of which the settings are checked
            kernel[...] = jnp.full_like(kernel[...], jnp.inf)
        return as_functions(model, *args)

    monkeypatch.setattr(networks, "as_functions", spoiled)
    monkeypatch.setattr(setup.workdirs, "note_parameters", lambda *args: None)  # clu's numbers of it warn
    found = message(tiny_config, tmp_path)
    assert "before this step the parameter blocks/1/branch/convolutions/1/kernel was no longer finite" in found


def test_an_update_alone_is_told_without_a_measurement(tiny_config, tmp_path, capsys):
    tiny_config.batch_size, tiny_config.epochs, tiny_config.optim.learning_rate = 1024, 1, 3e38
    found = message(tiny_config, tmp_path)
    assert "loss and gradient are finite, the update that the optimizer makes of them is not" in found
    assert "looking for where it began" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [MemoryError("no more of it"), KeyboardInterrupt()], ids=type)
def test_what_cannot_be_measured_hides_nothing(tiny_config, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(divergence, "_measurement", fail)
    found = message(of_chain(tiny_config, make_forward), tmp_path)
    assert "at step 0 the loss is nan" in found
    assert ("; where it began could not be measured (no more of it); nothing was trained" in found) == (
        isinstance(error, MemoryError)
    )


class Looped(nnx.Module):
    """A layer inside of a while loop, from where no statistics come."""

    def __init__(self, num_classes, image_size, rngs):
        self.first, self.layer, self.head = nnx.Linear(192, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs), None
        self.last = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.first(x.reshape(x.shape[0], -1)) * 1e30
        x = jax.lax.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: self.layer(x) * 2, x)
        return self.last(x) * 1e30


def test_a_network_whose_layers_cannot_be_measured(tiny_config, tmp_path):
    tiny_config.model.name = "tests.test_training_signal:Looped"
    found = message(tiny_config, tmp_path)
    assert "at step 0 the loss is nan" in found
    assert "; where it began could not be measured (" in found


def test_parts_are_those_of_a_step(tiny_config):
    """Each example once, and each device's n-th one in the n-th part."""

    class Grid:
        parts, network, mesh = 2, type("", (), {"random": ()}), type("", (), {"shape": {"data": 3, "shard": 2}})

    parts = [rows for rows, _ in divergence._parts(Grid, 24, jax.random.key(0))]
    assert [rows.tolist() for rows in parts[:4]] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))


def test_breakdown_in_words():
    model = Chain(GAINS["backward"], 4, 8, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    found = spp.find_breakdown(spp.propagate(model, x, where=nnx.Linear, loss=lambda out: out.mean()))
    assert (found.path, found.kind, found.before) == ("layers/1", "gradient", "layers/2")
    assert 1e20 < found.std < 1e23
    assert str(found) == (
        "the gradient of layers/1 is the first on the way back that is not finite; activations are; behind it, at "
        f"layers/2, the standard deviation was {found.std:.3g}"
    )
    first = spp.find_breakdown(spp.propagate(model, x * jnp.inf, where=nnx.Linear))
    assert (first.path, first.kind, first.before) == ("layers/0", "output", None)
    assert str(first) == "the output of layers/0 is the first that is not finite"
    assert spp.find_breakdown(spp.propagate(Chain((1.0,) * 4, 4, 8, nnx.Rngs(0)), x, where=nnx.Linear)) is None


# ---------------------------------------------------------------- updates, gradients and their noise


def test_groups():
    paths = [
        "stem/conv/kernel", "blocks/3/branch/convolutions/1/kernel", "stages/0/blocks/1/bias", "Dense_0/kernel",
        "encoder/norm/scale", "alpha",
    ]  # fmt: skip
    expected = {
        "block": ["stem", "blocks/3", "stages/0", "Dense_0", "encoder", "alpha"],
        "module": [
            "stem/conv", "blocks/3/branch/convolutions/1", "stages/0/blocks/1", "Dense_0", "encoder/norm", "alpha",
        ],
        "parameter": paths,
    }  # fmt: skip
    assert {name: [group(path) for path in paths] for name, group in spp.GROUPS.items()} == expected


def test_update_ratios_and_gradient_norms_are_what_they_say():
    """Of weights in proportion w and an update u: |u| / |w|, however large or small, and jitted."""
    rng_ = np.random.default_rng(0)
    weights = {"a": {"kernel": rng_.normal(size=(30, 40)), "bias": rng_.normal(size=40)}, "b": {"kernel": np.zeros(3)}}
    before = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
    after = {"a": jax.tree.map(lambda x: x * 1.25, before["a"]), "b": {"kernel": jnp.ones(3)}}
    for scale in (1e-25, 1.0, 1e25):
        scaled = jax.tree.map(lambda x, scale=scale: x * jnp.float32(scale), (before, after))
        ratios = jax.jit(spp.update_ratios)(*scaled)
        assert float(ratios["a"]) == pytest.approx(0.25, rel=1e-5)
        assert np.isposinf(ratios["b"])
        norms = spp.gradient_norms(scaled[0], groups="parameter")
        assert list(norms) == ["a/bias", "a/kernel", "b/kernel"]
        expected = scale * np.linalg.norm(weights["a"]["kernel"])
        assert float(norms["a/kernel"]) == pytest.approx(expected, rel=1e-5)
    assert np.isnan(spp.update_ratios(before, before)["b"])
    whole = spp.gradient_norms(before, groups=lambda path: "all")["all"]
    assert float(whole) == pytest.approx(np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(weights))), rel=1e-5)


def test_models_of_both_kinds_have_groups():
    from flax import linen

    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    model.kernel[...] = model.kernel[...] * 3
    ratios = spp.update_ratios(before, model)
    assert {name: float(value) for name, value in ratios.items() if name == "kernel"} == {"kernel": pytest.approx(2)}
    dense = linen.Sequential([linen.Dense(4), linen.Dense(2)])
    variables = dense.init(jax.random.key(0), jnp.ones((1, 3)))
    assert (
        list(spp.gradient_norms(variables)) == list(spp.gradient_norms(variables["params"])) == ["layers_0", "layers_1"]
    )


def test_what_is_no_pair_of_parameters_is_refused():
    weights = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"a is float32\[3\] before and float32\[2\] after"):
        spp.update_ratios(weights, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"b is missing before and float32\[2\] after"):
        spp.update_ratios(weights, weights | {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="unknown groups 'blocks': expected a callable or one of block, module, param"):
        spp.gradient_norms(weights, groups="blocks")
    with pytest.raises(ValueError, match="no floating-point parameters"):
        spp.gradient_norms({"a": jnp.ones(3, jnp.int32)})
    with pytest.raises(TypeError, match="a is of type str: expected a model's parameters"):
        spp.gradient_norms({"a": "kernel"})
    for parts in (1, 3):
        with pytest.raises(ValueError, match=f"parts={parts}: expected two or more equal parts of a batch"):
            spp.gradient_noise(1.0, 1.0, parts, 8)


def test_noise_scale_of_gradients_with_known_covariance():
    """Gradients of examples ~ N(g, s^2) in d dimensions: the variance is d s^2, the square |g|^2, both without bias."""
    generator, d, spread, batch, parts = np.random.default_rng(0), 50, 2.0, 32, 4
    true = generator.normal(size=d)
    each = true + spread * generator.normal(size=(4000, batch, d))
    whole = (each.mean(1) ** 2).sum(-1)
    part = (each.reshape(4000, parts, -1, d).mean(2) ** 2).sum(-1).mean(-1)
    found = jax.vmap(lambda part, whole: spp.gradient_noise(part, whole, parts, batch))(
        jnp.asarray(part, jnp.float32), jnp.asarray(whole, jnp.float32)
    )
    assert float(found.variance.mean()) == pytest.approx(d * spread**2, rel=0.02)
    assert float(found.square.mean()) == pytest.approx((true**2).sum(), rel=0.02)
    assert np.isnan(spp.gradient_noise(1.0, 2.0, 2, 8).scale)


@pytest.mark.parametrize("per_dispatch", [1, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_a_run_tells_is_what_its_steps_did(tiny_config, tmp_path, parts, per_dispatch):
    """Beside the variances: from the states of two runs that end one step apart, and the gradient of the step."""
    tiny_config.epochs, tiny_config.train.accumulate_steps = 1, parts
    tiny_config.log.every_steps = tiny_config.log.signal_every_steps = 4
    tiny_config.steps_per_dispatch, tiny_config.checkpoint.every_steps = per_dispatch, 1
    tiny_config.checkpoint.keep = 9
    train.train(tiny_config, str(tmp_path / "watched"))
    watched = [record for record in records(tmp_path / "watched") if record["kind"] == "signal"]
    assert [record["step"] for record in watched] == [0, 4, 8, 12, 16]
    assert (tmp_path / "watched" / "signal.png").read_bytes().startswith(b"\x89PNG")
    assert not any(name.startswith(("update", "gradient")) for name in watched[0])
    groups = ["stem", *(f"blocks/{i}" for i in range(2)), "classifier"]
    for record in watched[1:]:
        assert sorted(name for name in record if name.startswith("update_ratio/")) == sorted(
            f"update_ratio/{group}" for group in groups
        )
        assert all(1e-7 < record[f"update_ratio/{group}"] < 1 for group in groups)
        noise = {name for name in record if name.startswith("gradient_noise/")}
        assert noise >= {"gradient_noise/variance", "gradient_noise/square_norm"} if parts > 1 else noise == set()
    run, before, grads = step_of(tiny_config, tmp_path / "again", 12)
    expected = jax.jit(spp.gradient_norms)(grads)
    ratios = jax.jit(spp.update_ratios)(before, run.state.params)
    for group in groups:
        assert watched[3][f"gradient_norm/{group}"] == pytest.approx(float(expected[group]), rel=1e-3)
        assert watched[3][f"update_ratio/{group}"] == pytest.approx(float(ratios[group]), rel=1e-3)
    tiny_config.log.signal_every_steps = None
    train.train(tiny_config, str(tmp_path / "alone"))
    assert not (tmp_path / "alone" / "signal.png").exists()
    assert_equal(final_state(tiny_config, tmp_path / "watched"), final_state(tiny_config, tmp_path / "alone"))


def step_of(config, folder, number):
    """A run that has taken `number` steps, the parameters before the last of them, and its gradient."""
    run = setup.build(config, folder_of(folder, config))
    with setup.closing(run):
        for batch in itertools.islice(run.loader.train(0, number), number):
            before = jax.tree.map(jnp.copy, run.state)
            key = rng.of_step(run.key, before.step)
            run.state, _ = steps.train_step(run.state, batch, run.key, task=run.task)
        _, grads, _ = differentiated(run, before, batch, key)
    return run, before.params, grads


def differentiated(run, state, batch, key):
    """The examples of a step, their gradient and their sums, in one program."""

    @jax.jit
    def of(state, batch, key):
        examples = steps.make_examples(batch, key, run.task)
        grads, _, sums, _ = steps.differentiate(state, examples, key, run.task)
        return examples, grads, sums

    return of(state, batch, key)


def folder_of(folder, config):
    return setup.workdirs.open_for(config, str(folder))


def test_noise_of_a_step_is_that_of_its_parts(tiny_config, tmp_path):
    tiny_config.train.accumulate_steps, tiny_config.log.signal_every_steps = 2, 5
    run = setup.build(tiny_config, folder_of(tmp_path, tiny_config))
    with setup.closing(run):
        batch, key = next(run.loader.train(0, 1)), rng.of_step(run.key, 0)
        examples, _, sums = differentiated(run, run.state, batch, key)

        @jax.jit
        @jax.grad
        def gradient(params, images, labels):
            logits, _ = run.network.train(params, run.state.batch_stats, images)
            return -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), labels].mean()

        halves = [(examples["image"][first::2], examples["label"][first::2]) for first in (0, 1)]
        own = [gradient(run.state.params, *half) for half in halves]
        whole = jax.tree.map(lambda a, b: (a + b) / 2, *own)
        squares = [float(movement.square(tree)) for tree in (*own, whole)]
        assert float(sums["part_square"]) == pytest.approx(squares[0] + squares[1], rel=1e-4)
        state, after = run.state.params, jax.tree.map(lambda x: x * 1.5, run.state.params)
        parts = movement.Parts(sums["part_square"] / 2, 2, 64)
        told = movement.measure(jnp.bool_(True), state, after, whole, parts)
        by_name = dict(zip(movement.names(state, has_parts=True), told.tolist(), strict=True))
        assert by_name["gradient_noise/variance"] == pytest.approx((sum(squares[:2]) / 2 - squares[2]) * 64, rel=1e-3)
        assert by_name["gradient_noise/square_norm"] == pytest.approx(2 * squares[2] - sum(squares[:2]) / 2, rel=1e-3)
        assert by_name["update_ratio/blocks/1"] == pytest.approx(0.5, rel=1e-5)
        assert not movement.measure(jnp.bool_(False), state, after, whole, parts).any()


def test_a_watched_run_resumes_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    tiny_config.log.signal_every_steps, tiny_config.train.accumulate_steps = 5, 2
    train.train(tiny_config, str(tmp_path / "whole"))
    assert_resumes_exactly(tiny_config, tmp_path, monkeypatch, step=13)


# ---------------------------------------------------------------- what a run begins with


@pytest.mark.parametrize("name", ["lsuv", "balance", "balance_forward", "balance_backward"])
def test_a_run_begins_with_the_kernels_of_rescale(tiny_config, tmp_path, capsys, name):
    tiny_config.model.residual, tiny_config.model.init, tiny_config.model.rescale = "identity", "he_fan_in", name
    run = setup.build(tiny_config, folder_of(tmp_path, tiny_config))
    with setup.closing(run):
        dataset = data.load("synthetic", "", 8)
        (order,) = data.train_orders(tiny_config.seed, 1024, 64, 0, 1)
        images = preprocessing.make_normalize(tiny_config)(jnp.asarray(dataset.train.images[order.indices]))
        model = networks.build(tiny_config, 10, rng.of_seed(tiny_config.seed, "init"))
        method, _, direction = name.partition("_")
        options = {"direction": direction or "both"} if method == "balance" else {}
        reports = []
        expected = getattr(rescale, method)(model, images, seed=tiny_config.seed, report=reports.append, **options)
        assert_equal(jax.tree.leaves(run.state.params), jax.tree.leaves(nnx.state(expected, nnx.Param)))
    changed = sum(abs(np.log(row.factor)) > 0.01 for row in reports[0].rows)
    assert f"{changed} of {len(reports[0].rows)} kernels changed" in (out := capsys.readouterr().out)
    assert "on 64 images in" in out
    if name != "lsuv":
        before, after = reports[0].signal["forward"]
        assert f"forward {before.max() / before.min():.3g}, now {after.max() / after.min():.3g}" in out


def test_a_rescaled_run_resumes_bit_for_bit_and_is_rescaled_once(tiny_config, tmp_path, monkeypatch, capsys):
    tiny_config.model.rescale, tiny_config.optim.ema_decay = "balance_backward", 0.9
    train.train(tiny_config, str(tmp_path / "whole"))
    assert capsys.readouterr().out.count("\nrescale balance, backward: ") == 1
    assert_resumes_exactly(tiny_config, tmp_path, monkeypatch, step=13)
    assert capsys.readouterr().out.count("\nrescale balance, backward: ") == 1  # before it was stopped


def test_rescale_by_another_name_is_refused(tiny_config, tmp_path):
    tiny_config.model.rescale = "balanced"
    expected = (
        "unknown model.rescale 'balanced': expected one of none, lsuv, balance, balance_forward, balance_backward"
    )
    with pytest.raises(ValueError, match=expected):
        train.train(tiny_config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_network_without_blocks_is_refused_before_anything_is_written(tiny_config, tmp_path):
    tiny_config.model.name, tiny_config.model.rescale = "tests.test_training_signal:make_norm", "balance"
    with pytest.raises(
        ValueError, match=r"cannot tell what the blocks .*\(of balance, where= is --config.log.signal_whe"
    ):
        train.train(tiny_config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    tiny_config.log.signal_where = "Linear"
    of_chain(tiny_config, make_norm)
    with pytest.raises(train.TrainingDivergedError):  # balance has no hold of a gradient behind the last block
        train.train(tiny_config, str(tmp_path / "run"))


def test_images_of_the_first_step_are_those_that_are_trained_on(tiny_config):
    split = data.load("synthetic", "", 8).train
    images = loader.images_of_first_step(tiny_config, split, 48)
    (order,) = data.train_orders(tiny_config.seed, len(split), 64, 0, 1)
    np.testing.assert_array_equal(images, split.images[order.indices[:48]])
