"""Rescaled kernels: the factors are those of the theory, nothing else changes, and what cannot be reached is named."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from nfjax import initializers, rescale, resnet, spp
from nfjax.rescale import _balance
from nfjax.rescale._passes import Signal

LECUN, HE = jax.nn.initializers.lecun_normal(), initializers.he_normal("fan_in")


class Plain(nnx.Module):
    """ReLU networks of dense layers, whose gain the kernels do not have."""

    def __init__(self, widths, init=LECUN, bias=True, dtype=jnp.float32, *, rngs):
        settings = {"kernel_init": init, "use_bias": bias, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.layers = nnx.List([nnx.Linear(a, b, **settings) for a, b in itertools.pairwise(widths)])

    def __call__(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(nnx.relu(x) if number else x)
        return x


def batch(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def leaves(model):
    return {path: np.asarray(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def reported(method, *args, **kwargs):
    found = []
    model = method(*args, report=found.append, **kwargs)
    return model, found[0]


# ---------------------------------------------------------------- lsuv


def test_every_layer_has_variance_one_and_nothing_but_kernels_has_changed():
    model = Plain([64, 32, 128, 16, 10], rngs=nnx.Rngs(0))
    for layer in model.layers:
        layer.bias[...] = batch(*layer.bias.shape, seed=5)
    x, before = batch(256, 64), leaves(model)
    found, report = reported(rescale.lsuv, model, x, init=None)
    assert type(found) is Plain
    assert all(np.array_equal(before[path], value) for path, value in leaves(model).items())  # it is left as it was
    z = np.asarray(x)
    for number, layer in enumerate(found.layers):
        product = (np.maximum(z, 0) if number else z) @ np.asarray(layer.kernel[...])
        assert np.var(product) == pytest.approx(1, rel=0.02)
        z = product + np.asarray(layer.bias[...])
        factor = np.asarray(layer.kernel[...]) / before["layers", number, "kernel"]
        assert np.ptp(factor) < 1e-5  # one positive number
        assert factor.mean() == pytest.approx(report.rows[number].factor, rel=1e-5)
        assert np.array_equal(before["layers", number, "bias"], layer.bias[...])


def test_the_factor_is_that_of_the_theory():
    # Behind a ReLU an input of variance 1 has the second moment 1/2: with He's variance 2 / n_in the output has 1, with
    # LeCun's 1 / n_in it is 1/2, and the factor sqrt(2).
    x = batch(2048, 512)
    for init, expected in ((LECUN, 2**0.5), (HE, 1.0), (lambda *a: 3 * HE(*a), 1 / 3)):
        _, report = reported(rescale.lsuv, Plain([512] * 6, init, bias=False, rngs=nnx.Rngs(0)), x, init=None)
        assert [row.factor for row in report.rows[1:]] == pytest.approx([expected] * 4, rel=0.06)


def test_the_networks_kernels_get_the_factors_of_the_closed_form():
    # The first convolutions read ReLU(x) of an x with variance 1, some of whose taps fall on padding.
    shape = {"stage_sizes": (1,), "block": "basic", "width": 64, "image_size": 16}
    model = resnet.PreActResNet(residual="identity", init="he_fan_in", **shape, rngs=nnx.Rngs(0))
    _, report = reported(rescale.lsuv, model, batch(32, 16, 16, 3), init=None)
    factors = {row.path: row.factor for row in report.rows}
    read = ((3 * 16 - 2) / (3 * 16)) ** 2  # the share of the taps that lie inside
    # The mean that ReLU leaves is a third of the second moment, and 64 channels sample it to 6 % of the variance.
    for number in range(2):
        assert factors[f"blocks/0/branch/convolutions/{number}/kernel"] == pytest.approx(read**-0.5, rel=0.08)


def test_kernels_are_drawn_orthogonal_as_the_authors_do():
    model = rescale.lsuv(Plain([64] * 3, rngs=nnx.Rngs(0)), batch(512, 64))
    for layer in model.layers:
        gram = np.asarray(layer.kernel[...]).T @ np.asarray(layer.kernel[...])
        assert gram / gram[0, 0] == pytest.approx(np.eye(64), abs=1e-3)
    again = rescale.lsuv(Plain([64] * 3, rngs=nnx.Rngs(7)), batch(512, 64))
    for layer, other in zip(model.layers, again.layers, strict=True):
        np.testing.assert_allclose(layer.kernel[...], other.kernel[...], rtol=1e-4, atol=1e-5)  # of the seed alone


class Tied(nn.Module):
    """Embeds tokens, and reads them out with the same table."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(50, 32, embedding_init=LECUN)
        x = table(tokens)
        x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return table.attend(x)


def test_a_linen_module_gives_variables_and_a_tied_kernel_has_one_factor():
    model, tokens = Tied(), jax.random.randint(jax.random.key(0), (8, 16), 0, 50)
    variables = model.init(jax.random.key(0), tokens)
    found, report = reported(rescale.lsuv, model, tokens, variables=variables, init=None)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    assert [row.path for row in report.rows].count("Embed_0/embedding") == 1
    ratio = found["params"]["Embed_0"]["embedding"] / variables["params"]["Embed_0"]["embedding"]
    assert np.ptp(ratio) < 1e-4
    unchanged = [found["params"]["LayerNorm_0"]["scale"], found["params"]["Dense_0"]["bias"]]
    assert all(np.array_equal(a, b) for a, b in zip(unchanged, [np.ones(32), np.zeros(32)], strict=True))
    model.apply(found, tokens)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.LayerNorm()(nn.Dense(16)(nn.relu(nn.Dense(32)(x)))), None


class Looped(nn.Module):
    """Four rounds, each with kernels, a bias and a norm of its own."""

    reverse: bool = False

    @nn.compact
    def __call__(self, x):
        loop = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=4, reverse=self.reverse)
        return loop()(x, None)[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_each_round_of_a_loop_has_a_factor_of_its_own(reverse):
    model, x = Looped(reverse), batch(64, 16)
    found, report = reported(rescale.lsuv, model, x, init=None)
    rounds = list(reversed(range(4))) if reverse else list(range(4))
    expected = [f"ScanStep_0/Dense_{layer}/kernel[{i}]" for i in rounds for layer in (1, 0)]
    assert [row.path for row in report.rows] == expected
    params = jax.tree.map(np.asarray, found["params"]["ScanStep_0"])
    z = np.asarray(x)
    for i in rounds:
        hidden = z @ params["Dense_1"]["kernel"][i]
        out = np.maximum(hidden, 0) @ params["Dense_0"]["kernel"][i]
        assert [np.var(hidden), np.var(out)] == pytest.approx([1, 1], rel=0.02)
        z = z + (out - out.mean(-1, keepdims=True)) / out.std(-1, keepdims=True)
    assert report.others == ()
    assert np.array_equal(params["LayerNorm_0"]["scale"], np.ones((4, 16)))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_a_recurrent_kernel_is_rescaled_though_its_state_begins_with_zeros(cell):
    # A kernel of the state changes what those before it read in the next step: all of them are gone through again.
    model, x = nn.RNN(cell(32)), batch(64, 10, 16)
    variables = model.init(jax.random.key(0), x)
    found, report = reported(rescale.lsuv, model, x, variables=variables, init=None)
    assert [row.note for row in report.rows] == [""] * len(report.rows)
    assert [row.after for row in report.rows] == pytest.approx([1] * len(report.rows), rel=0.011)
    hidden = [row for row in report.rows if "/h" in row.path]
    assert all(row.factor > 1.2 for row in hidden)  # orthogonal, they return the variance of a state, below 1
    out = model.apply(found, x)
    kernel = found["params"]["cell"]["hf" if cell is nn.LSTMCell else "hr"]["kernel"]
    # The geometric mean over the steps of what the kernel makes of the state, which is the step before's output.
    variances = np.var(np.asarray(out[:, :-1] @ kernel), axis=(0, 2))
    assert np.exp(np.log(variances).mean()) == pytest.approx(1, rel=0.02)


def test_what_does_not_follow_its_factor_is_left_and_named():
    model = resnet.PreActResNet(10, "nf", width=4, image_size=8, rngs=nnx.Rngs(0))
    found, report = reported(rescale.lsuv, model, batch(8, 8, 8, 3), init=None)
    *convolutions, classifier = report.rows
    assert {row.factor for row in convolutions} == {1.0}
    assert all("standardized" in row.note for row in convolutions)
    assert (classifier.note, classifier.after) == ("", pytest.approx(1, rel=0.02))
    kernels = [block.branch.convolutions[0].kernel[...] for block in (model.blocks[1], found.blocks[1])]
    assert np.array_equal(*kernels)


def test_a_kernel_of_zeros_is_left_and_named():
    model = resnet.PreActResNet(10, "fixup", width=4, image_size=8, rngs=nnx.Rngs(0))
    _, report = reported(rescale.lsuv, model, batch(8, 8, 8, 3), init=None)
    zeros = {row.path for row in report.rows if "does not vary" in row.note}
    assert zeros == {*(f"blocks/{i}/branch/convolutions/1/kernel" for i in range(4)), "classifier/kernel"}


# ---------------------------------------------------------------- balance


def flat(values):
    return float(np.max(values) / np.min(values))


def chain(*widths):
    """Blocks that `spp` measures: one dense layer each, behind a ReLU."""

    class Block(nnx.Module):
        def __init__(self, a, b, rngs):
            self.dense = nnx.Linear(a, b, kernel_init=LECUN, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.dense(nnx.relu(x))

    class Chain(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(a, b, rngs) for a, b in itertools.pairwise(widths)])

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    return Chain(nnx.Rngs(0))


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_plain_chain_gets_hes_gain(direction):
    _, report = reported(rescale.balance, chain(*[1024] * 6), batch(256, 1024), direction=direction)
    for name in ("forward", "backward") if direction == "both" else (direction,):
        before, after = report.signal[name]
        assert flat(before) > 8  # halved in every layer
        assert flat(after) < 1.2
    # All widths are equal, and so are both directions. The first one moves all blocks alike.
    assert [row.factor for row in report.rows[1:]] == pytest.approx([2**0.5] * 4, rel=0.08)


def test_both_directions_split_the_difference_where_widths_change():
    x, widths = batch(1024, 128), [128, 512, 128, 512, 128, 512]
    factors = {}
    for direction in rescale.DIRECTIONS:
        _, report = reported(rescale.balance, chain(*widths), x, direction=direction)
        factors[direction] = np.array([row.factor for row in report.rows[1:]])
    # Kernels of variance 1 / n_in: forward needs 2 / n_in, backward 2 / n_out, from 128 to 512 a quarter of it.
    wider = np.array([n > m for m, n in itertools.pairwise(widths[1:])])
    assert factors["forward"] == pytest.approx(np.full(4, 2**0.5), rel=0.08)
    assert factors["backward"] == pytest.approx(np.where(wider, 0.5, 2.0) * 2**0.5, rel=0.08)
    # As Glorot's initialization: between both.
    low, high = np.minimum(factors["forward"], factors["backward"]), np.maximum(factors["forward"], factors["backward"])
    assert (factors["both"] > low).all()
    assert (factors["both"] < high).all()


def test_the_classical_network_is_flat_afterwards_as_spp_measures_it():
    x = batch(16, 16, 16, 3)
    model = resnet.PreActResNet(10, "identity", init="he_fan_in", width=8, image_size=16, rngs=nnx.Rngs(0))
    for direction in ("forward", "backward"):
        found = rescale.balance(model, x, direction=direction)
        profiles = [spp.propagate(network, x) for network in (model, found)]
        before, after = (flat(getattr(profile, f"{direction}_var")) for profile in profiles)
        assert before > 2
        assert after < 1.1
    assert nnx.graphdef(found) == nnx.graphdef(model)


@pytest.mark.parametrize(("rule", "norm"), [("nf", None), ("identity", "batch"), ("identity", "group")])
def test_kernels_without_hold_of_the_signal_keep_their_scale_and_are_named(rule, norm):
    shape = {"stage_sizes": (1, 1), "block": "basic", "width": 32, "image_size": 16}
    model = resnet.PreActResNet(None, rule, norm, **shape, rngs=nnx.Rngs(0))
    found, report = reported(rescale.balance, model, batch(8, 16, 16, 3))
    held = {row.path for row in report.rows if row.note}
    # A norm behind the first convolution of a branch undoes its scale; standardized kernels have none.
    expected = {f"blocks/{i}/branch/convolutions/0/kernel" for i in range(2)} | {"classifier/kernel"}
    assert held >= expected
    assert {row.factor for row in report.rows if row.note} == {1.0}
    before, after = leaves(model), leaves(found)
    assert np.array_equal(before["classifier", "kernel"], after["classifier", "kernel"])


def test_only_the_kernels_that_may_be_are_changed():
    model = chain(*[64] * 5)
    frozen = "blocks/2/dense/kernel"
    found, report = reported(rescale.balance, model, batch(128, 64), kernels=lambda path: path != frozen)
    assert [row.note for row in report.rows if row.path == frozen] == ["left out"]
    before, after = leaves(model), leaves(found)
    same = [path for path in before if np.array_equal(before[path], after[path])]
    assert ("blocks", 2, "dense", "kernel") in same
    assert len(same) < len(before)


class PreNorm(nnx.Module):
    """A transformer's MLP blocks, x + Dense(gelu(Dense(LayerNorm(x)))), behind a stem."""

    def __init__(self, depth=6, width=64, *, rngs):
        settings = {"kernel_init": LECUN, "use_bias": False, "rngs": rngs}
        self.stem = nnx.Linear(width, width, **settings)
        self.blocks = nnx.List([PreNormBlock(width, rngs) for _ in range(depth)])

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class PreNormBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, kernel_init=LECUN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, kernel_init=LECUN, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def test_what_a_shortcut_adds_up_is_flat_only_without_branches_and_the_report_says_so():
    model, x = PreNorm(rngs=nnx.Rngs(0)), batch(64, 64)
    _, report = reported(rescale.balance, model, x)
    before, after = report.shares
    assert (before > 0.05).all()
    assert (after < 1e-3).all()  # flat to 1e-4, by branches that add nothing
    assert flat(report.signal["forward"][1]) < 1.01
    told = [line for line in str(report).splitlines() if "hold_shares=True" in line]
    assert len(told) == 1
    assert told[0].startswith("6 of 6 blocks now add less than 10% of what they added to their shortcut")


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_with_its_shares_held_a_shortcut_adds_up_what_it_did(direction):
    model, x = PreNorm(rngs=nnx.Rngs(0)), batch(64, 64)
    found, report = reported(rescale.balance, model, x, direction=direction, hold_shares=True)
    before, after = report.shares
    assert after == pytest.approx(before, rel=0.05)
    # x + f(x), f of the share s: Var[x_l] = Var[x_{l-1}] / (1 - s) where f is independent of x. The shares decide it.
    forward = report.signal["forward"][1]
    assert forward[1:] / forward[:-1] == pytest.approx(1 / (1 - before[1:]), rel=0.2)
    assert "hold_shares" not in str(report)
    profile = spp.propagate(found, x)
    assert profile.branch_share == pytest.approx(after, rel=1e-3)


def test_where_nothing_is_residual_nothing_is_held():
    model, x = chain(*[256] * 5), batch(128, 256)
    for held in (False, True):
        _, report = reported(rescale.balance, model, x, hold_shares=held)
        assert [row.factor for row in report.rows[1:]] == pytest.approx([2**0.5] * 3, rel=0.15)


def test_a_block_that_begins_as_the_identity_is_not_held():
    model, x = PreNorm(rngs=nnx.Rngs(0)), batch(64, 64)
    for block in model.blocks:
        block.down.kernel[...] *= 1e-4
    reports = [reported(rescale.balance, model, x, hold_shares=held)[1] for held in (False, True)]
    assert [row.factor for row in reports[0].rows] == [row.factor for row in reports[1].rows]
    assert "hold_shares" not in str(reports[0])


def test_a_branch_of_zeros_is_not_held():
    model = resnet.PreActResNet(10, "fixup", width=4, image_size=8, rngs=nnx.Rngs(0))
    _, report = reported(rescale.balance, model, batch(8, 8, 8, 3), hold_shares=True)
    before, after = report.shares
    assert np.nanmin(before) == 0
    assert np.nanmin(after) == 0


def test_bfloat16_stays_what_it_is():
    model = Plain([32] * 4, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    found = rescale.lsuv(model, batch(256, 32).astype(jnp.bfloat16), init=None, tolerance=0.05)
    assert {layer.kernel[...].dtype for layer in found.layers} == {jnp.dtype(jnp.bfloat16)}


def test_a_report_for_a_person():
    _, report = reported(rescale.balance, chain(*[64] * 4), batch(128, 64))
    first, forward, backward, head, *rows = str(report).splitlines()
    assert re.fullmatch(r"balance, both: [23] of 3 kernels changed, \d+ passes, \d+\.\d s", first)
    assert forward.startswith("forward: largest over smallest variance of all blocks ")
    assert backward.startswith("backward: ")
    assert head.split() == ["kernel", "factor", "variance", "now"]
    assert [row.split()[0] for row in rows] == [row.path for row in report.rows]


# ---------------------------------------------------------------- what cannot be


class Constant(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x * self.scale[...][None]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (rescale.lsuv, "what blocks/0/dense/kernel returns has the variance nan"),
        (rescale.balance, "the variance of the activations at blocks/0 is nan"),
    ],
)
def test_a_batch_that_is_not_finite_is_named(method, message):
    with pytest.raises(ValueError, match=message):
        method(chain(8, 8, 8), jnp.full((4, 8), jnp.nan))


def test_a_model_without_kernels_is_named():
    with pytest.raises(ValueError, match="Constant has no kernel that could be rescaled"):
        rescale.lsuv(Constant(nnx.Rngs(0)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="cannot tell what the blocks of this model are"):
        rescale.balance(Constant(nnx.Rngs(0)), jnp.ones((4, 3)))


@pytest.mark.parametrize("method", [rescale.lsuv, rescale.balance])
def test_what_is_no_model_is_refused(method):
    with pytest.raises(TypeError, match="str is no Flax model"):
        method("a network", jnp.ones((4, 3)))


def test_writing_to_what_comes_back_leaves_the_model_as_it_was():
    model = Plain([8, 8, 8], rngs=nnx.Rngs(0))
    before = leaves(model)
    found = rescale.lsuv(model, batch(32, 8))
    for layer in found.layers:
        layer.bias[...] += 1.0
    assert all(np.array_equal(before[path], value) for path, value in leaves(model).items())


def test_wrong_arguments_are_explained():
    model, x = chain(8, 8, 8), batch(4, 8)
    with pytest.raises(ValueError, match="unknown direction='sideways': expected one of forward, backward, both"):
        rescale.balance(model, x, direction="sideways")
    with pytest.raises(
        ValueError, match=r"kernels= leaves no kernel to be changed; there are\n  blocks/0/dense/kernel"
    ):
        rescale.balance(model, x, kernels=lambda path: False)
    with pytest.raises(ValueError, match="tolerance=0 must be positive"):
        rescale.lsuv(model, x, tolerance=0)
    with pytest.raises(ValueError, match="'nonsense'"):
        rescale.lsuv(model, x, init="nonsense")
    with pytest.raises(ValueError, match=r"the variance of the activations at blocks/0 is 0.0: the batch is constant"):
        rescale.balance(model, jnp.zeros((4, 8)))


def test_where_a_nudge_misleads_the_other_side_is_asked():
    """A bump where the effect of the factor is measured: by it alone the factor would have to shrink, which helps at no
    length; by both sides it has to grow.
    """

    def measure(logs):
        y = max(0.0, 1 - 0.8 * logs[0]) + 0.06 * np.exp(-(((logs[0] - _balance.STEP) / 0.02) ** 2))
        return Signal(np.exp([y, -y]), np.ones(2), np.full(2, np.nan))

    def deviations(found):
        return np.log(found.forward) - np.log(found.forward).mean()

    start = measure(np.zeros(1))
    logs, now, _ = _balance._flatten(start, measure, deviations, lambda found: np.zeros(0), np.array([0]), 1)
    assert np.abs(deviations(start)).max() > 0.99
    assert np.abs(deviations(now)).max() < 1e-3
    assert logs[0] > 1
