"""spp.sweep: exponents that theory knows, steps that are those of a trainer, and what a user may type wrong."""

import csv
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from nfjax import spp
from nfjax.spp import _sweep
from nfjax.spp._sweep_fit import fit
from tests.toys import LinenNetwork, Network

INPUTS, CLASSES, BATCH = 8, 4, 16
WIDTHS = (32, 128, 512)
X = jax.random.normal(jax.random.key(1), (BATCH, INPUTS))


def mean(out):
    """A loss whose gradient at the output is the same for every network: what follows is the network's own."""
    return out.mean()


class Dense(nnx.Module):
    def __init__(self, inputs, outputs, std, rng):
        self.kernel = nnx.Param(jnp.asarray(rng.normal(size=(inputs, outputs)) * std, jnp.float32))

    def __call__(self, x):
        return x @ self.kernel[...]


class MLP(nnx.Module):
    """He's ReLU network: inputs, three layers, a head of this std."""

    def __init__(self, width, seed, head_std):
        rng, sizes = np.random.default_rng(seed), (INPUTS, width, width, width)
        self.layers = nnx.List([Dense(i, o, (2 / i) ** 0.5, rng) for i, o in itertools.pairwise(sizes)])
        self.head = Dense(width, CLASSES, head_std, rng)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x)


def standard(width, seed=0):
    return MLP(width, seed, (2 / width) ** 0.5)


def mup(width, seed):
    return MLP(width, seed, 1 / width)


def check(make, **options):
    return spp.sweep(make, X, widths=WIDTHS, where=Dense, loss=mean, seeds=4, **{"steps": 1, **options})


@pytest.fixture(scope="module")
def standard_sgd():
    return check(standard, learning_rate=1e-3, steps=2)


# ---------------------------------------------------------------- width


def test_the_standard_parameterization_depends_on_width_as_theory_says(standard_sgd):
    """A gradient arrives at a hidden layer with entries ~ n^-1/2, and h.h ~ n: one step of SGD moves the first layer by
    n^-1/2, the others by n^1/2, and the output, their sum over the head's n entries of n^-1/2, by n.
    """
    exponents = standard_sgd.exponents
    assert standard_sgd.places["activation"] == ("layers/0", "layers/1", "layers/2", "head")
    np.testing.assert_allclose(exponents["activation"][0], 0, atol=0.12)
    np.testing.assert_allclose(exponents["activation_change"][1], [-0.5, 0.5, 0.5, 1.0], atol=0.12)
    np.testing.assert_allclose(exponents["output_change"][1:], 1.0, atol=0.12)
    # Of d inputs: the spectral norm goes like sqrt(n) + sqrt(d), and that of the step, |x| |gradient|, is constant.
    first = -np.polyfit(np.log(WIDTHS), np.log(np.sqrt(WIDTHS) + INPUTS**0.5), 1)[0]
    np.testing.assert_allclose(exponents["kernel_change"][1], [first, 0.5, 0.5, 0.5], atol=0.12)
    assert standard_sgd.places["kernel_change"] == (
        "layers/0/kernel", "layers/1/kernel", "layers/2/kernel", "head/kernel"
    )  # fmt: skip
    assert np.isnan(exponents["activation_change"][0]).all()  # nothing has moved
    assert (standard_sgd.sizes["activation_change"][:, :, 0] == 0).all()


def test_the_verdict_says_so(standard_sgd):
    verdict = standard_sgd.diagnose(tolerance=0.25)
    assert not verdict.independent
    by = {(trend.quantity, trend.step): trend for trend in verdict.trends}
    assert by["activation", 0].verdict == "independent"
    assert by["output_change", 2].verdict == "grows"
    assert by["activation_change", 2].place == "head"
    text = str(verdict)
    assert "the output at the start is independent of width" in text
    assert f"the change of the output after 2 steps grows like {by['output_change', 2].law}" in text
    assert "not width-independent" in text
    assert "width 32, 128, 512, 4 seeds: 2 steps of sgd, learning rate 0.001, mean" in repr(standard_sgd)
    assert by["output_change", 2].law in repr(standard_sgd)


def mup_rates(width, path):
    """Yang et al. (2022), table 3, SGD: the rate grows with what a layer returns and shrinks with what it is given."""
    return 1e-3 * {"layers/0/kernel": width, "head/kernel": 1 / width}.get(path, 1.0)


def test_mup_is_independent_of_width():
    sweep = check(mup, learning_rate=mup_rates, steps=2)
    np.testing.assert_allclose(sweep.exponents["activation_change"][1:, :], 0, atol=0.12)
    np.testing.assert_allclose(sweep.exponents["output_change"][1:], 0, atol=0.12)
    # At the start, the sum of n terms of std 1/n: mup's authors begin with a head of zeros for that.
    np.testing.assert_allclose(sweep.exponents["output"][0], -0.5, atol=0.12)
    by = {(trend.quantity, trend.step): trend.verdict for trend in sweep.diagnose(0.25).trends}
    assert (by["activation_change", 2], by["output_change", 2]) == ("independent", "independent")
    assert by["output", 0] == "shrinks"
    assert "learning rate by mup_rates" in sweep.setting


def test_adam_moves_hidden_layers_by_n_and_the_output_by_n_to_the_three_halves():
    """Its first step has entries of one size: h.sign(h) ~ n; at the first layer d inputs, which is constant; and at
    the output the head's n entries of n^-1/2 have the signs of what moved by n.
    """
    sweep = check(standard, optimizer="adam", learning_rate=1e-6)
    np.testing.assert_allclose(sweep.exponents["activation_change"][1], [0, 1, 1, 1.5], atol=0.12)


def test_mup_with_adam():
    def rates(width, path):
        return 1e-5 if path.startswith("layers/0") else 1e-5 / width

    sweep = check(mup, optimizer="adam", learning_rate=rates)
    np.testing.assert_allclose(sweep.exponents["activation_change"][1], 0, atol=0.12)


# ---------------------------------------------------------------- depth


class Block(nnx.Module):
    def __init__(self, width, branch, rng):
        self.dense, self.branch = Dense(width, width, width**-0.5, rng), branch

    def __call__(self, x):
        return x + self.branch(self.dense, x)


class Residual(nnx.Module):
    def __init__(self, depth, seed, branch, width=128):
        rng = np.random.default_rng(seed)
        self.blocks = nnx.List([Block(width, branch, rng) for _ in range(depth)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


DEPTHS = (2, 4, 8, 16)


def deeper(branch):
    def make(depth, seed):
        return Residual(depth, seed, lambda dense, x: branch(dense, x, depth))

    x = np.random.default_rng(0).normal(size=(BATCH, 128)).astype(np.float32)
    return spp.sweep(make, jnp.asarray(x), depths=DEPTHS, loss=mean, seeds=2, steps=0)


def test_an_identity_skip_explodes_exponentially():
    """Var doubles in each block, the size grows by sqrt(2): an exponential of the depth, and no power."""
    sweep = deeper(lambda dense, x, depth: 2**0.5 * dense(jax.nn.relu(x)))
    assert sweep.places["activation"] == ("first", "1/4", "middle", "3/4", "last")
    by = {trend.quantity: trend for trend in sweep.diagnose().trends}
    assert (by["activation"].verdict, by["activation"].place) == ("grows", "last")
    assert by["activation"].factor == pytest.approx(2**0.5, rel=0.03)
    assert f"activations at the start grow exponentially, like {by['activation'].law} (in 'last')" in str(
        sweep.diagnose()
    )
    assert sweep.exponents["activation"][0, 0] == pytest.approx(0, abs=0.05)  # of the first block


def test_a_branch_over_the_root_of_the_depth_does_not():
    """(1 + 1/L)^L, between 2.25 and e."""
    sweep = deeper(lambda dense, x, depth: (2 / depth) ** 0.5 * dense(jax.nn.relu(x)))
    last = [0.5 * depth * math.log1p(1 / depth) for depth in DEPTHS]
    assert sweep.exponents["activation"][0, -1] == pytest.approx(np.polyfit(np.log(DEPTHS), last, 1)[0], abs=0.04)
    assert sweep.trend("activation", 0, tolerance=0.2).verdict == "independent"


def test_normalized_branches_add_up():
    """Each adds variance 1 to the first: sqrt(1 + L)."""

    def branch(dense, x, depth):
        return dense(x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True)))

    sweep = deeper(branch)
    expected = np.polyfit(np.log(DEPTHS), 0.5 * np.log1p(DEPTHS), 1)[0]
    trend = sweep.trend("activation", 0)
    assert trend.exponent == pytest.approx(expected, abs=0.04)
    assert (trend.verdict, trend.place) == ("grows", "last")
    assert math.isnan(trend.factor)


# ---------------------------------------------------------------- the steps are those of a trainer


def test_activations_move_as_in_a_loop_by_hand():
    sweep = spp.sweep(standard, X, widths=(8, 16), where=Dense, seeds=1, steps=2, learning_rate=0.5, loss=mean)
    model = standard(16)
    start, state = model(X), nnx.state(model)
    for step in (1, 2):
        gradients = nnx.grad(lambda model: mean(model(X)))(model)
        state = jax.tree.map(lambda p, g: p - 0.5 * g, nnx.state(model), gradients)
        nnx.update(model, state)
        moved = float(jnp.sqrt(jnp.square(model(X) - start).mean()))
        assert sweep.sizes["output_change"][1, 0, step, 0] == pytest.approx(moved, rel=1e-4)
        assert sweep.losses[1, 0, step] == pytest.approx(float(mean(model(X))), rel=1e-4)
    # A matrix of four columns: power iteration finds its norm.
    moved = np.asarray(model.head.kernel[...] - standard(16).head.kernel[...])
    ratio = np.linalg.norm(moved, 2) / np.linalg.norm(np.asarray(standard(16).head.kernel[...]), 2)
    assert sweep.samples["kernel_change"][1][0, 2, -1] == pytest.approx(ratio, rel=0.02)


def test_adam_is_adam():
    options = {"widths": (8, 16), "where": Dense, "seeds": 2, "steps": 3}
    own = spp.sweep(standard, X, optimizer="adam", learning_rate=0.02, **options)
    with jax.numpy_dtype_promotion("standard"):
        theirs = spp.sweep(standard, X, optimizer=lambda width: optax.adam(0.02), **options)
    np.testing.assert_allclose(own.losses, theirs.losses, rtol=1e-5)
    assert "learning rate 0.02" in own.setting
    assert own.losses[0, 0, 3] < own.losses[0, 0, 0]
    assert own.losses[0, 0, 0] != own.losses[0, 1, 0]


class Scanned(linen.Module):
    depth: int

    @linen.compact
    def __call__(self, x):
        block = linen.remat(LinenBlock)
        blocks = linen.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = blocks()(x, None)
        return linen.Dense(3)(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(INPUTS)(jax.nn.relu(x)), None


def test_linen_a_loop_and_remat():
    sweep = spp.sweep(Scanned, X, depths=(2, 3), steps=1, seeds=(4,))
    profile = spp.propagate(Scanned(3), X, seed=4)
    assert sweep.paths["activation"][1] == profile.paths
    squares = profile.channel_sq_mean + profile.channel_var
    np.testing.assert_allclose(sweep.samples["activation"][1][0, 0], np.sqrt(squares), rtol=1e-5)
    assert (sweep.samples["activation_change"][1][0, 1] > 0).all()
    assert len(sweep.paths["kernel_change"][0]) == 2  # the loop's kernels are one array


def test_the_model_is_left_as_it_was_and_runs_as_it_trains():
    made = []

    def make(width, rngs):
        made.append(network := Network(10, width, rngs=rngs))
        return network

    images = spp.noise((4, 8, 8, 3))
    sweep = spp.sweep(make, images, widths=(4, 8), where=(nnx.Conv, nnx.Linear), seeds=1, steps=1)
    assert str(sweep.mode) == "batch statistics in 1 norm; dropout on in 1"
    assert len(made) == 2
    fresh = Network(10, 8, rngs=nnx.Rngs(0))
    for left, new in zip(jax.tree.leaves(nnx.state(made[1])), jax.tree.leaves(nnx.state(fresh)), strict=True):
        if not jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(left, new)
    other = spp.sweep(
        lambda width: LinenNetwork(10, width),
        images,
        widths=(4, 8),
        where=(linen.Conv, linen.Dense),
        seeds=1,
        steps=0,
        train=True,
    )
    assert "mutable: all but params" in str(other.diagnose())


def test_a_step_is_compiled_once_for_each_value(monkeypatch):
    compiled, prepare = [], _sweep.prepare
    monkeypatch.setattr(_sweep, "prepare", lambda *args: compiled.append(prepare(*args)) or compiled[-1])
    sweep = spp.sweep(standard, X, widths=np.array([16, 8]), where=Dense, seeds=(3, 1, 2), steps=0)
    assert len(compiled) == 2
    assert sweep.values == (8, 16)
    assert sweep.seeds == (3, 1, 2)
    assert len(set(sweep.sizes["output"].ravel().tolist())) == 2 * 3  # other parameters each time
    assert "change" not in repr(sweep)


# ---------------------------------------------------------------- what is special


def test_zeros_and_what_is_not_finite():
    def make(width, seed):
        model = standard(width, seed)
        model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
        return model

    sweep = check(make, steps=2, learning_rate=lambda width: 1e-3 if width < 512 else 1e30)
    assert np.isnan(sweep.exponents["kernel_change"][:, -1]).all()
    text = str(sweep.diagnose())
    assert "the output at the start: 0 at every width" in text
    assert "the change of the output after 2 steps: not finite at width 512" in text
    assert "the change of the output after 1 step: like width^" in text  # the last step at which all were finite
    assert not sweep.diagnose().independent


def test_half_precision_is_trained_in_its_own_type():
    def make(width, seed):
        model = standard(width, seed)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
        return model

    sweep = spp.sweep(make, X.astype(jnp.bfloat16), widths=(16, 32), where=Dense, seeds=1, steps=1)
    assert (sweep.sizes["output_change"][:, :, 1] > 0).all()


# ---------------------------------------------------------------- fits


def test_a_power_is_found_exactly():
    values = (2, 4, 16)
    found = fit(values, 3.0 * np.array(values)[:, None] ** -1.5 * np.ones(2))
    assert found.exponent == pytest.approx(-1.5)
    assert found.error == pytest.approx(0, abs=1e-12)
    assert math.isnan(found.factor)
    assert math.isnan(fit((2, 4), np.array([[1.0], [2.0]])).error)  # two points
    assert math.isnan(fit(values, np.array([[1.0], [0.0], [2.0]])).exponent)


def test_an_exponential_is_told_from_a_power():
    values = np.array((2, 4, 8, 16))
    assert fit(values, 1.1 ** values[:, None]).factor == pytest.approx(1.1)
    assert math.isnan(fit(values, (1.0 + values[:, None]) ** 0.5).factor)


def test_the_error_is_the_spread_of_the_exponent():
    """Over many draws, the exponent is off by less than two of its errors about 19 times of 20."""
    rng, values, hits = np.random.default_rng(0), (32, 64, 128, 256), []
    for _ in range(400):
        found = fit(values, np.sqrt(values)[:, None] * np.exp(0.2 * rng.normal(size=(4, 5))))
        hits.append(abs(found.exponent - 0.5) < 2 * found.error)
    assert 0.93 < np.mean(hits) <= 1.0


# ---------------------------------------------------------------- files and pictures


def test_files(standard_sgd, tmp_path):
    standard_sgd.to_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert len(rows) == 3 * 4 * 3 * (1 + 4 + 4 + 1 + 1 + 4)  # values, seeds, steps; loss, blocks twice, output, kernels
    (row,) = [
        r for r in rows if (r["width"], r["seed"], r["step"], r["quantity"]) == ("128", "2", "1", "output_change")
    ]
    assert float(row["size"]) == pytest.approx(standard_sgd.sizes["output_change"][1, 2, 1, 0], rel=1e-6)
    content = json.loads(standard_sgd.to_json(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text()) == content
    assert content["exponents"]["output_change"][0] == [None]
    assert content["exponents"]["output_change"][1][0] == pytest.approx(standard_sgd.exponents["output_change"][1, 0])


def test_a_picture_has_a_panel_for_each_quantity_and_the_laws_in_it(standard_sgd, tmp_path):
    figure = spp.plot_sweep(standard_sgd, tolerance=0.25)
    panels = {axes.get_title().partition(":")[0]: axes for axes in figure.axes if axes.get_visible()}
    assert set(panels) == {
        "activations", "change of activations", "output", "change of the output", "relative change of kernels", "loss",
    }  # fmt: skip
    assert panels["output"].get_title() == "output: independent of width"
    assert panels["change of the output"].get_title() == "change of the output: depends on width"
    labels = [text.get_text() for text in panels["change of the output"].get_legend().get_texts()]
    assert labels == [f"step {step}: {standard_sgd.trend('output_change', step).law}" for step in (1, 2)]
    (drawn,) = [line for line in panels["output"].get_lines() if line.get_label().startswith("step 0")]
    np.testing.assert_allclose(drawn.get_ydata(), np.median(standard_sgd.sizes["output"][:, :, 0, 0], axis=1))
    figure.savefig(tmp_path / "a.png")


# ---------------------------------------------------------------- bad input


def numbered(width, seed):
    return Residual(2 + seed, seed, lambda dense, x: dense(x), width=width)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (standard, {"widths": None}, "to be swept: nothing; expected one of widths="),
        (standard, {"depths": (1, 2)}, "to be swept: width and depth; expected one of"),
        (standard, {"widths": None, "values": [1, 2]}, "values=[1, 2]: expected numbers by their name"),
        (standard, {"widths": 8}, "width 8: expected two or more different numbers, such as"),
        (standard, {"steps": 1.5}, "steps=1.5: expected an integer, 0 or more"),
        (standard, {"seeds": 2.5}, "seeds=2.5: expected a number of seeds"),
        (standard, {"widths": (8,)}, "width 8: expected two or more different numbers"),
        (standard, {"widths": (8, 8)}, "width 8, 8: expected two or more"),
        (standard, {"widths": (8, "16")}, "width '16': expected positive numbers"),
        (standard, {"widths": (8, 0)}, "width 0: expected positive numbers"),
        (standard, {"steps": -1}, "steps=-1: expected an integer, 0 or more"),
        (standard, {"optimizer": "sdg"}, "unknown optimizer 'sdg': expected a callable or one of sgd, adam"),
        (standard, {"optimizer": 3}, "optimizer=3: expected 'sgd', 'adam', an optimizer with init and update"),
        (standard, {"optimizer": optax.sgd(1.0), "learning_rate": 0.1}, "learning_rate=0.1 goes with optimizer='sgd'"),
        (standard, {"learning_rate": math.nan}, "learning_rate=nan: expected a finite number, 0 or more"),
        (standard, {"learning_rate": "fast"}, "learning_rate='fast': expected a number"),
        (standard, {"learning_rate": lambda width: None}, "learning_rate=None: expected a number"),
        (standard, {"loss": "mse"}, "unknown loss 'mse'"),
        (standard, {"loss": lambda out: out}, "loss= must return a floating-point scalar"),
        (standard, {"where": "Dens"}, 'did you mean where="Dense"'),
        (standard, {"seeds": ()}, "seeds is empty"),
        (lambda width: standard(width), {"seeds": 2}, "make takes no seed, so that 2 seeds would measure"),
        (numbered, {"where": None, "seeds": 2}, "make(8, 1) returned another network than make(8, 0)"),
    ],
)
def test_wrong_input_gets_a_clear_error(make, options, message):
    x = X[:2] if make is not numbered else spp.noise((2, 8))
    widths = (8, 16) if make is not numbered else (8, 9)
    with pytest.raises(ValueError, match=re.escape(message)):
        spp.sweep(make, x, **{"widths": widths, "where": Dense, "seeds": 1, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (standard(8), "make is of type MLP: expected a function of the value that returns a model"),
        (lambda width: width, "int is no Flax model"),
        (lambda width: (standard(width), {}), "variables= belongs to Linen modules"),
    ],
)
def test_what_is_no_model(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        spp.sweep(make, X, widths=(8, 16))


def test_an_error_says_at_which_value():
    with pytest.raises(ValueError, match="cannot tell what the blocks") as caught:
        spp.sweep(
            lambda depth, seed: Residual(depth, seed, lambda dense, x: dense(x)), spp.noise((2, 128)), depths=(1, 2)
        )
    assert "(raised for depth 1 in the sweep of nfjax.spp)" in caught.value.__notes__


def test_one_seed_where_make_takes_none():
    sweep = spp.sweep(lambda width: standard(width), X, widths=(8, 16), where=Dense, steps=0)
    assert sweep.seeds == (0,)
    assert "two values and one seed give an exponent without an error" in str(sweep.diagnose())
    assert spp.plot_sweep(sweep).axes[0].get_title().startswith("activations")
