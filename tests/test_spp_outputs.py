"""Signal propagation: which of the arrays that a block returns is measured, and why none can be."""

import csv
import json
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, struct

from nfjax import spp


def images(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def var(x):
    return np.asarray(x, np.float64).var()


# ---------------------------------------------------------------- blocks that return several arrays


class Returning(nnx.Module):
    """A residual block that returns its activation with something else, in the order of `how`."""

    def __init__(self, how, seed):
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(seed))
        self.how = how

    def __call__(self, x):
        y = x + jnp.tanh(self.layer(x))
        return HOW[self.how](y)


@struct.dataclass
class Result:
    cache: jax.Array
    hidden: jax.Array


class Named(typing.NamedTuple):
    weights: jax.Array
    hidden: jax.Array


# What a block returns, how the model takes the activation out of it, and how JAX writes its place.
HOW = {
    "cache first": lambda y: (jnp.concatenate([y, y], axis=0), y),
    "auxiliary loss first": lambda y: (jnp.square(y).mean(), y),
    "None and an integer first": lambda y: (None, jnp.int32(3), y),
    "bfloat16 first": lambda y: (y.astype(jnp.bfloat16), y),
    "stopped first": lambda y: (jax.lax.stop_gradient(y) * 2, y),
    "dict": lambda y: {"a": jnp.abs(y), "b": {"x": y}},
    "dataclass": lambda y: Result(cache=y[:4], hidden=y),
    "named tuple": lambda y: Named(weights=jnp.square(y), hidden=y),
    "a name beside it": lambda y: ("block", y),
    "a constant first": lambda y: (np.ones(3, np.float32), y),
}
PLACES = {
    "cache first": "[1]",
    "auxiliary loss first": "[1]",
    "None and an integer first": "[2]",
    "bfloat16 first": "[1]",
    "stopped first": "[1]",
    "dict": "['b']['x']",
    "dataclass": ".hidden",
    "named tuple": ".hidden",
    "a name beside it": "[1]",
    "a constant first": "[1]",
}


def activation(returned):
    if isinstance(returned, tuple) and not isinstance(returned, Named):
        return returned[-1]
    return returned["b"]["x"] if isinstance(returned, dict) else returned.hidden


class Chain(nnx.Module):
    """The model returns whatever else its blocks return beside its own output."""

    def __init__(self, how, depth=3):
        self.blocks = nnx.List([Returning(how, seed) for seed in range(depth)])
        self.head = nnx.Linear(8, 3, rngs=nnx.Rngs(9))

    def __call__(self, x):
        others = []
        for block in self.blocks:
            returned = block(x)
            x = activation(returned)
            others.append([leaf for leaf in jax.tree.leaves(returned) if isinstance(leaf, jax.Array)])
        return self.head(x), others


@pytest.mark.parametrize("how", HOW)
def test_the_array_that_goes_on_is_measured(how):
    model, x = Chain(how), images(16, 8)
    profile = spp.propagate(model, x)  # these blocks are found, too
    y, expected = x, []
    for block in model.blocks:
        y = activation(block(y))
        expected.append(var(y))
    assert profile.outputs == tuple(f"blocks/{i}{PLACES[how]}" for i in range(3))
    np.testing.assert_allclose(profile.forward_var, expected, rtol=1e-5)
    assert set(profile.shapes) == {(16, 8)}
    assert set(profile.dtypes) == {"float32"}
    assert profile.backward_var[0] > profile.backward_var[-1] * 0.5


def test_a_gradient_through_the_chosen_array_is_the_explicit_one():
    model, x = Chain("auxiliary loss first"), images(16, 8)

    def loss(out):
        logits, others = out
        return jnp.square(logits).mean() + sum(aux for aux, _ in others)

    def tail(y, start):
        total = 0.0
        for block in model.blocks[start:]:
            aux, y = block(y)
            total += aux
        return jnp.square(model.head(y)).mean() + total

    profile = spp.propagate(model, x, where=Returning, loss=loss)
    for i, block in enumerate(model.blocks):
        _, x = block(x)
        np.testing.assert_allclose(profile.backward_var[i], var(jax.grad(tail)(x, i + 1)), rtol=1e-5)


def test_one_array_alone_is_named_by_its_block_alone():
    class One(Returning):
        def __call__(self, x):
            return super().__call__(x)[1]

    model = nnx.Sequential(One("cache first", 0), One("cache first", 1))
    profile = spp.propagate(model, images(16, 8), where=One)
    assert profile.outputs == profile.paths == ("layers/0", "layers/1")


# ---------------------------------------------------------------- recurrent cells and caches


class Stacked(nnx.Module):
    """Two LSTM cells over four steps."""

    def __init__(self):
        self.cells = nnx.List([nnx.LSTMCell(8, 8, rngs=nnx.Rngs(seed)) for seed in range(2)])
        self.head = nnx.Linear(8, 3, rngs=nnx.Rngs(2))

    def run(self, x):
        """[(carry, hidden state) of each cell at each step]."""
        zero = jnp.zeros((x.shape[0], 8))
        carries, seen = [(zero, zero)] * 2, []
        for t in range(x.shape[1]):
            y = x[:, t]
            for i, cell in enumerate(self.cells):
                carries[i], y = cell(carries[i], y)
                seen.append((carries[i], y))
        return seen

    def __call__(self, x):
        seen = self.run(x)
        return self.head(seen[-1][1]), [carry for carry, _ in seen[-2:]]  # the last carries have the cell states


def test_lstm_cells_are_measured_by_their_hidden_state():
    def cell_states(out):
        return sum(cell.sum() for cell, _ in out[1])

    model, x = Stacked(), images(16, 4, 8)
    profile = spp.propagate(model, x, where=nnx.LSTMCell)
    seen = model.run(x)
    np.testing.assert_allclose(profile.forward_var, [var(y) for _, y in seen], rtol=1e-5)
    assert profile.outputs[:3] == ("cells/0[0][1]", "cells/1[0][1]", "cells/0[1][1]")
    cells = spp.propagate(model, x, where=nnx.LSTMCell, output=lambda out: out[0][0], loss=cell_states)
    np.testing.assert_allclose(cells.forward_var, [var(carry[0]) for carry, _ in seen], rtol=1e-5)
    assert cells.outputs[0] == "cells/0[0][0][0]"


@pytest.mark.parametrize("scanned", [False, True])
def test_nnx_rnn_layers(scanned):
    class Layers(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.RNN(nnx.LSTMCell(8, 8, rngs=nnx.Rngs(i)), return_carry=True) for i in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                _, x = layer(x)
            return x

    model, x = Layers(), images(4, 5, 8)
    if scanned:  # every step of the first layer's cell, in nnx.RNN's loop
        model = nnx.Sequential(nnx.RNN(model.layers[0].cell))
        profile = spp.propagate(model, x, where=nnx.LSTMCell)
        steps = model(x)
        np.testing.assert_allclose(profile.forward_var, [var(steps[:, t]) for t in range(5)], rtol=1e-5)
        assert profile.outputs[2].endswith("cell[2][1]")
    else:
        profile = spp.propagate(model, x, where=nnx.RNN)
        assert profile.outputs == tuple(f"layers/{i}[1]" for i in range(3))
        for i, layer in enumerate(model.layers):
            _, x = layer(x)
            np.testing.assert_allclose(profile.forward_var[i], var(x), rtol=1e-5)


def test_a_linen_lstm_in_a_scan():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            cell = linen.scan(
                linen.OptimizedLSTMCell,
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )(features=8, name="cell")
            zero = jnp.zeros((x.shape[0], 8))
            carry, y = cell((zero, zero), x)
            return linen.Dense(3)(y), carry

    x, net = images(4, 5, 8), Net()
    variables = net.init(jax.random.key(0), x)
    profile = spp.propagate(net, x, variables=variables, where=linen.OptimizedLSTMCell)
    inner = linen.OptimizedLSTMCell(features=8)
    carry, expected = (jnp.zeros((4, 8)),) * 2, []
    for t in range(5):
        carry, y = inner.apply({"params": variables["params"]["cell"]}, carry, x[:, t])
        expected.append(var(y))
    np.testing.assert_allclose(profile.forward_var, expected, rtol=1e-5)
    assert profile.outputs[0].endswith("[0][1]")


def test_attention_that_decodes_into_a_cache():
    """A cache that is larger than the activation, is passed to nobody, and is returned by the model."""

    class Attend(linen.Module):
        @linen.compact
        def __call__(self, x, cache):
            key, value, query = (linen.Dense(8, name=name)(x) for name in ("key", "value", "query"))
            cache = {
                "key": jnp.concatenate([cache["key"], key], 1),
                "value": jnp.concatenate([cache["value"], value], 1),
            }
            weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, cache["key"]))
            return cache, x + jnp.einsum("bqk,bkd->bqd", weights, cache["value"])

    class Decoder(linen.Module):
        @linen.compact
        def __call__(self, x, caches):
            new = []
            for i, cache in enumerate(caches):
                cache, x = Attend(name=f"block{i}")(x, cache)
                new.append(cache)
            return x, new

    caches = [{"key": images(2, 6, 8, seed=i), "value": images(2, 6, 8, seed=9 + i)} for i in range(3)]
    profile = spp.propagate(Decoder(), images(2, 1, 8), caches, where=Attend)
    assert profile.outputs == tuple(f"block{i}[1]" for i in range(3))
    assert set(profile.shapes) == {(2, 1, 8)}

    def keys_and_values(out):
        return sum(leaf.sum() for leaf in jax.tree.leaves(out[1]))

    keys = spp.propagate(Decoder(), images(2, 1, 8), caches, where=Attend, output="0/key", loss=keys_and_values)
    assert keys.outputs == tuple(f"block{i}[0]['key']" for i in range(3))
    assert set(keys.shapes) == {(2, 7, 8)}


def test_a_branch_is_measured_by_what_is_added():
    class Branch(nnx.Module):
        def __init__(self, seed):
            self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(seed))

        def __call__(self, x):
            y = self.layer(x)
            return jnp.concatenate([y, y]), y

    class Joined(nnx.Module):
        def __init__(self, seed):
            self.branch = Branch(seed)

        def __call__(self, x):
            return x + self.branch(x)[1]

    model, x = nnx.Sequential(Joined(0), Joined(1)), images(16, 8)
    profile = spp.propagate(model, x, where=Joined)
    branch = model.layers[0].branch(x)[1]
    np.testing.assert_allclose(profile.branch_var[0], np.asarray(branch, np.float64).var(0).mean(), rtol=1e-5)
    np.testing.assert_allclose(profile.branch_share[0], var(branch) / var(x + branch), rtol=1e-5)


# ---------------------------------------------------------------- output=


@pytest.mark.parametrize("output", [0, -2, "0", "[0]", (0,), lambda out: out[0]])
def test_an_array_that_is_asked_for(output):
    model, x = Chain("bfloat16 first"), images(16, 8)
    loss = lambda out: sum(low.astype(jnp.float32).sum() for low, _ in out[1])  # noqa: E731
    profile = spp.propagate(model, x, where=Returning, output=output, loss=loss)
    assert profile.outputs == tuple(f"blocks/{i}[0]" for i in range(3))
    assert set(profile.dtypes) == {"bfloat16"}


@pytest.mark.parametrize("output", ["b/x", "['b']['x']", ("b", "x"), lambda out: out["b"]["x"]])
def test_a_name_that_is_asked_for(output):
    model, x = Chain("dict"), images(16, 8)
    expected = spp.propagate(model, x, where=Returning)
    monitored = spp.Monitor(x, where=Returning, output=output)(model)
    seeds = spp.propagate_seeds(lambda seed: Chain("dict"), x, seeds=2, where=Returning, output=output)
    for profile in (monitored, seeds):
        assert profile.outputs == expected.outputs
        np.testing.assert_array_equal(profile.forward_var, expected.forward_var)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (5, r"output= raised IndexError on Returning 'blocks/0' .*which returns \[0\] \(bfloat16 \[16, 8\]\), \[1\]"),
        ("hidden", r"output='hidden' names no array that Returning 'blocks/0' returns: expected one of \[0\]"),
        (lambda out: out, r"output= chooses no floating-point array of what Returning 'blocks/0' returns"),
        (lambda out: 1 / 0, "output= raised ZeroDivisionError on Returning 'blocks/0'"),
    ],
)
def test_an_array_that_is_not_there(output, message):
    with pytest.raises(ValueError, match=message):
        spp.propagate(Chain("bfloat16 first"), images(16, 8), where=Returning, output=output)


def test_on_the_command_line(monkeypatch, tmp_path, capsys):
    from nfjax import cli

    (tmp_path / "several.py").write_text("""
import jax
from flax import nnx

class Block(nnx.Module):
    def __init__(self, seed):
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(seed))

    def __call__(self, given):
        y = given[1] + self.layer(given[1])
        return (given[0] * y, given[0]), y

class Model(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Block(0), Block(1)])

    def __call__(self, x):
        given = (x, x)
        for block in self.blocks:
            (a, b), y = block(given)
            given = (a + b, y)
        return given

def make():
    return Model(), jax.random.normal(jax.random.key(0), (4, 8))
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for output in ("1", "0/0"):
        assert cli.run(["spp", "--module=several:make", "--where=Block", f"--output={output}"]) == 0
        shown = capsys.readouterr().out
        assert ("blocks/0[1]" if output == "1" else "blocks/0[0][0]") in shown
    assert cli.run(["spp", "--depth=18", "--output=1"]) == 2
    assert "--output goes with --module" in capsys.readouterr().err
    sys.modules.pop("several")


def test_what_was_measured_is_shown_and_written(tmp_path):
    profile = spp.propagate(Chain("cache first"), images(16, 8), where=Returning)
    assert "blocks/0[1]" in repr(profile)
    profile.to_csv(tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["output"] for row in rows] == ["blocks/0[1]", "blocks/1[1]", "blocks/2[1]"]
    assert [row["path"] for row in rows] == ["blocks/0", "blocks/1", "blocks/2"]
    assert json.loads(profile.to_json())["outputs"] == [row["output"] for row in rows]


# ---------------------------------------------------------------- no gradient, and why


class Last(nnx.Module):
    """Three blocks, then a function of the last one's output."""

    def __init__(self, end, how="cache first"):
        self.blocks = nnx.List([Returning(how, seed) for seed in range(3)])
        self.end = end

    def __call__(self, x):
        for block in self.blocks:
            x = self.end(activation(block(x)))
        return x


@jax.custom_vjp
def silent(x):
    return 2 * x


silent.defvjp(lambda x: (silent(x), None), lambda _, g: (jnp.zeros_like(g),))


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (jax.lax.stop_gradient, "stop_gradient, which is not differentiable"),
        (jnp.round, "passes round, which"),
        (lambda x: jnp.floor(x) + jnp.sign(x), "floor, sign, which"),
        (lambda x: x.astype(jnp.int32).astype(jnp.float32), r"int32 values \(convert_element_type\)"),
        (lambda x: (x > 0).astype(jnp.float32), r"bool values \(gt\)"),
        (lambda x: jax.nn.one_hot(jnp.argmax(x, -1), 8), r"int32 values \(argmax\)"),
    ],
)
def test_what_stops_a_gradient_is_named(end, cause):
    with pytest.raises(ValueError, match=rf"no gradient reaches the output of 'blocks/1', array \[1\]: .*{cause}"):
        spp.propagate(Last(end), images(16, 8), where=Returning)


def test_a_gradient_that_starts_elsewhere():
    class Towers(nnx.Module):
        def __init__(self):
            self.a, self.b = Chain("cache first"), Chain("cache first")

        def __call__(self, x):
            return self.a(x)[0], self.b(x)[0]

    x = images(16, 8)
    with pytest.raises(ValueError, match=r"reaches the output of 'a/blocks/2'.* starts at the output of 'b/blocks/2'"):
        spp.propagate(Towers(), x, where=Returning)
    with pytest.raises(ValueError, match=r"reaches the output of 'b/blocks/2'.* the loss does not depend on it"):
        spp.propagate(Towers(), x, where=Returning, loss=lambda out: out[0].sum())
    assert len(spp.propagate(Towers(), x, where=Returning, loss=lambda out: out[0].sum() + out[1].sum())) == 6


def test_an_array_that_nothing_depends_on():
    class Forgetful(Stacked):
        def __call__(self, x):
            return super().__call__(x)[0]

    message = r"reaches the output of 'cells/0\[3\]', array \[0\]\[0\]: nothing .* It also returns \[0\]\[1\] \(float32"
    with pytest.raises(ValueError, match=message):
        spp.propagate(Forgetful(), images(16, 4, 8), where=nnx.LSTMCell, output="0/0")


def test_a_zero_gradient_of_a_rule_of_the_users_own_counts_as_one():
    """It is a number, zero, and no missing gradient."""
    profile = spp.propagate(Last(silent), images(16, 8), where=Returning)
    assert profile.backward_var[0] == 0
    assert profile.diagnose().backward.verdict == "vanishing"


# ---------------------------------------------------------------- what is left as it was


def test_modules_keep_what_they_were_given():
    """Arguments are compared by identity, changed in place, and passed on."""

    class Picky(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x, same, log):
            assert x is same
            log.append("called")
            return x + self.layer(x)

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Picky(), Picky()])

        def __call__(self, x):
            log = []
            for block in self.blocks:
                x = block(x, x, log)
            assert log == ["called", "called"]
            return x

    assert len(spp.propagate(Net(), images(16, 8), where=Picky)) == 2


@pytest.mark.parametrize("flag", ["jax_check_tracer_leaks", "jax_disable_jit"])
def test_debugging_switches(flag):
    model, x = Chain("cache first"), images(16, 8)
    expected = spp.propagate(model, x, where=Returning)
    before = getattr(jax.config, flag)
    try:
        jax.config.update(flag, True)
        profile = spp.propagate(model, x, where=Returning)
    finally:
        jax.config.update(flag, before)
    np.testing.assert_allclose(profile.forward_var, expected.forward_var, rtol=1e-5)
    np.testing.assert_allclose(profile.backward_var, expected.backward_var, rtol=1e-5)
