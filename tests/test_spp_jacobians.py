"""Singular values of the blocks' Jacobians: what numpy finds in the Jacobian written out."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import resnet, spp


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def explicit(block, x):
    """(mean square, largest) from all singular values of the Jacobian of the whole batch."""
    if isinstance(block, nnx.Module):  # one that writes statistics is not to write them inside of jacfwd
        graph, state = nnx.split(block)
        return explicit(lambda x: nnx.merge(graph, state, copy=True)(x), x)
    y, jacobian = jax.jit(lambda x: (block(x), jax.jacfwd(block)(x)))(x)
    values = np.linalg.svd(np.asarray(jacobian, np.float64).reshape(y.size, x.size), compute_uv=False)
    return np.square(values).sum() / x.size, values[0]


def check(found, expected, rtol=1e-4):
    """The largest equal to a tolerance, the mean squares within five standard errors that are small."""
    mean_square, largest = np.transpose(expected)
    np.testing.assert_allclose(found.largest, largest, rtol=rtol)
    assert (found.largest <= largest * (1 + 1e-5)).all()  # a lower bound
    assert (np.abs(found.mean_square - mean_square) <= 5 * found.mean_square_error + 1e-5 * mean_square).all()
    assert (found.mean_square_error < 0.02 * mean_square).all()
    assert not found.reasons


# Small blocks cost nothing to multiply often.
measure = functools.partial(spp.jacobians, probes=2000, iterations=40)


class Chain(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, blocks):
        self.blocks = nnx.List(blocks)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def expected(self, x):
        found = []
        for block in self.blocks:
            found.append(explicit(block, x))
            x = block(x)
        return found


class Block(nnx.Module):
    """function(x, layer(x)); layers: a list of the parts, of which the first is the layer."""

    def __init__(self, function, *layers):
        self.layers, self.function = nnx.List(layers), function

    def __call__(self, x):
        return self.function(x, *self.layers)


def linear(inputs, outputs, seed=0):
    return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(seed))


def residual(width=6, depth=3):
    return Chain([Block(lambda x, layer: x + layer(x), linear(width, width, seed)) for seed in range(depth)])


# ---------------------------------------------------------------- from theory


def test_linear_layers_have_the_singular_values_of_their_kernels():
    widths = (5, 9, 4)
    model = Chain([Block(lambda x, layer: layer(x), linear(*pair)) for pair in itertools.pairwise(widths)])
    found = measure(model, draw(3, 5), where="Block")
    kernels = [np.asarray(block.layers[0].kernel[...], np.float64) for block in model.blocks]
    check(found, [(np.square(w).sum() / len(w), np.linalg.svd(w, compute_uv=False)[0]) for w in kernels])
    assert found.paths == ("blocks/0", "blocks/1")
    assert found.input_shapes == ((3, 5), (3, 9))
    assert found.output_shapes == ((3, 9), (3, 4))


def test_an_orthogonal_kernel_is_an_isometry():
    def orthogonal(seed):
        init = nnx.initializers.orthogonal(scale=1.0)
        return nnx.Linear(16, 16, kernel_init=init, rngs=nnx.Rngs(seed))

    model = Chain([Block(lambda x, layer: layer(x), orthogonal(seed)) for seed in range(3)])
    found = spp.jacobians(model, draw(4, 16), where="Block")
    np.testing.assert_allclose(found.mean_square, 1, rtol=1e-5)  # whatever is drawn
    np.testing.assert_allclose(found.mean_square_error, 0, atol=1e-6)
    np.testing.assert_allclose(found.largest, 1, rtol=1e-5)
    np.testing.assert_allclose(found.last_growth, 0, atol=1e-5)


def test_a_diagonal_jacobian_has_its_exact_mean_from_one_probe():
    scales = jnp.arange(1.0, 7.0)
    model = Chain([Block(lambda x, layer: layer(x) * scales[None], nnx.relu) for _ in range(2)])
    x = jnp.where(jnp.arange(24).reshape(4, 6) % 3 == 0, -1.0, 1.0)
    found = spp.jacobians(model, x, where="Block", probes=1, iterations=20)
    open_ = np.square(np.asarray(scales))[None] * (np.asarray(x) > 0)
    np.testing.assert_allclose(found.mean_square, open_.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.largest, np.sqrt(open_.max()), rtol=1e-5)
    assert np.isnan(found.mean_square_error).all()


def test_a_residual_block_has_those_of_one_plus_its_kernel():
    model = residual()
    kernels = [np.eye(6) + np.asarray(block.layers[0].kernel[...]) for block in model.blocks]
    expected = [(np.square(w).sum() / 6, np.linalg.svd(w, compute_uv=False)[0]) for w in kernels]
    check(measure(model, draw(3, 6)), expected)


def test_a_relu_layer_has_those_of_its_open_rows():
    model, x = Chain([Block(lambda x, layer: nnx.relu(layer(x)), linear(6, 6, seed)) for seed in range(2)]), draw(1, 6)
    expected = []
    for block in model.blocks:
        kernel, x_out = np.asarray(block.layers[0].kernel[...], np.float64), block(x)
        masked = kernel * (np.asarray(x_out) > 0)
        expected.append((np.square(masked).sum() / 6, np.linalg.svd(masked, compute_uv=False)[0]))
        x = x_out
    check(measure(model, draw(1, 6), where="Block"), expected)


def test_batch_norm_couples_the_examples():
    def block(x, layer, norm):
        return x + norm(layer(x))

    model = Chain([Block(block, linear(3, 3, seed), nnx.BatchNorm(3, rngs=nnx.Rngs(0))) for seed in range(2)])
    check(measure(model, draw(5, 3)), model.expected(draw(5, 3)))
    found = spp.jacobians(model, draw(5, 3))
    assert "batch statistics in 2 norms" in repr(found)
    model.eval()
    assert found.mean_square[0] != pytest.approx(spp.jacobians(model, draw(5, 3)).mean_square[0], rel=1e-3)


def test_a_convolution_has_those_of_its_explicit_jacobian():
    def conv(inputs, outputs, stride):
        return nnx.Conv(inputs, outputs, (3, 3), strides=stride, rngs=nnx.Rngs(stride))

    model = Chain([Block(lambda x, layer: layer(x), conv(*sizes)) for sizes in ((2, 3, 1), (3, 4, 2))])
    x = draw(1, 4, 4, 2)
    found = measure(model, x, where="Block")
    check(found, model.expected(x))
    assert found.output_shapes == ((1, 4, 4, 3), (1, 2, 2, 4))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_our_network_has_those_of_its_blocks_called_by_hand(norm):
    rule = "identity" if norm == "batch" else "convshort"
    model = resnet.PreActResNet(
        stage_sizes=(1, 1), block="basic", residual=rule, norm=norm, width=2, image_size=8, rngs=nnx.Rngs(0)
    )
    x = draw(2, 8, 8, 3)
    found = measure(model, x, iterations=60)
    inputs = model.stem(x)
    expected = []
    for block in model.blocks:
        expected.append(explicit(block, inputs))
        inputs = block(inputs)
    check(found, expected)


def test_a_white_gradient_changes_its_variance_by_the_mean_square():
    model, x = residual(width=256, depth=2), draw(128, 256)
    backward = spp.propagate(model, x).backward_var
    np.testing.assert_allclose(spp.jacobians(model, x).mean_square[-1], backward[-2] / backward[-1], rtol=0.03)


# ---------------------------------------------------------------- any model


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + linen.tanh(linen.Dense(x.shape[-1])(x))


class LinenChain(linen.Module):
    block: type = LinenBlock
    depth: int = 3

    @linen.compact
    def __call__(self, x):
        for number in range(self.depth):
            x = self.block(name=f"block_{number}")(x)
        return x


def same(a, b):
    np.testing.assert_allclose(a.mean_square, b.mean_square, rtol=1e-4)
    np.testing.assert_allclose(a.largest, b.largest, rtol=1e-4)


def test_linen_and_its_remat_and_scan():
    x, plain = draw(4, 5), LinenChain()
    variables = plain.init(jax.random.key(1), x)
    found = measure(plain, x, variables=variables)
    y, expected = x, []
    for number in range(3):
        block = functools.partial(LinenBlock().apply, {"params": variables["params"][f"block_{number}"]})
        expected.append(explicit(block, y))
        y = block(y)
    check(found, expected)
    same(found, measure(LinenChain(linen.remat(LinenBlock)), x, variables=variables))
    same(found, measure(LinenChain(linen.jit(LinenBlock)), x, variables=variables))

    class Scanned(linen.Module):
        reverse: bool = False

        @linen.compact
        def __call__(self, x):
            step = linen.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                reverse=self.reverse,
            )
            return step(LinenBlock(name="block"), x, None)[0]

    layers = [variables["params"][f"block_{number}"] for number in range(3)]
    for reverse in (False, True):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(layers[::-1] if reverse else layers))
        scanned = measure(Scanned(reverse), x, variables={"params": {"block": stacked}})
        assert scanned.paths == ("block[0]", "block[1]", "block[2]")
        same(found, scanned)


class Step(nnx.Module):
    def __init__(self, rngs, width=5):
        self.layer = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.layer(x))


class Remat(Chain):
    def __call__(self, x):
        run = nnx.remat(lambda block, x: block(x))
        for block in self.blocks:
            x = run(block, x)
        return x


class Jitted(Chain):
    def __call__(self, x):
        run = nnx.jit(lambda block, x: block(x))
        for block in self.blocks:
            x = run(block, x)
        return x


class RematStep(Step):
    __call__ = nnx.remat(Step.__call__)


class Looped(nnx.Module):
    """The blocks of a chain in one array."""

    def __init__(self, blocks, remat=False):
        graph, states = nnx.split(blocks[0])[0], [nnx.split(block)[1] for block in blocks]
        self.block = nnx.merge(graph, jax.tree.map(lambda *x: jnp.stack(x), *states))
        self.remat = remat

    def __call__(self, x):
        step = nnx.remat(lambda x, block: block(x)) if self.remat else lambda x, block: block(x)
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.block)


def test_nnx_and_its_remat_and_scan():
    x, blocks = draw(4, 5), [Step(nnx.Rngs(seed)) for seed in range(3)]
    found = measure(Chain(blocks), x)
    check(found, Chain(blocks).expected(x))
    for other in (Remat(blocks), Jitted(blocks), Looped(blocks), Looped(blocks, remat=True)):
        same(found, measure(other, x))
    same(found, measure(Chain([RematStep(nnx.Rngs(seed)) for seed in range(3)]), x))


def test_a_block_that_runs_several_times_is_measured_each_time():
    class Shared(Chain):
        def __call__(self, x):
            for _ in range(3):
                x = self.blocks[0](x)
            return x

    x, block = draw(4, 5), Step(nnx.Rngs(0))
    found = measure(Shared([block]), x)
    assert found.paths == ("blocks/0[0]", "blocks/0[1]", "blocks/0[2]")
    check(found, Chain([block] * 3).expected(x))


def test_blocks_inside_of_blocks():
    class Outer(Chain):
        def __call__(self, x):
            return x + super().__call__(x)

    x, outer = draw(4, 5), Outer([Step(nnx.Rngs(seed)) for seed in range(2)])
    found = measure(Chain([outer]), x, where=(Outer, Step))
    assert found.paths == ("blocks/0/blocks/0", "blocks/0/blocks/1", "blocks/0")
    check(found, [*Chain(outer.blocks).expected(x), explicit(outer, x)])


def test_what_a_block_reads_besides_its_input_is_held_fixed():
    """A memory that depends on all earlier blocks is no way around the input."""

    class Reading(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.other = nnx.Linear(5, 5, rngs=rngs), nnx.Linear(5, 5, rngs=rngs)

        def __call__(self, memory, x):
            return x + jnp.tanh(self.layer(x)) * self.other(memory), memory + x

    class Reader(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Reading(nnx.Rngs(seed)) for seed in range(3)])

        def __call__(self, x):
            memory = jnp.ones_like(x)
            for block in self.blocks:
                x, memory = block(memory, x)
            return x

    model, x = Reader(), draw(4, 5)
    found = measure(model, x, output=0)
    memory, expected, y = jnp.ones_like(x), [], x
    for block in model.blocks:
        expected.append(explicit(lambda y, block=block, memory=memory: block(memory, y)[0], y))
        y, memory = block(memory, y)
    check(found, expected)
    assert found.inputs == ("4x5 (array 2 of 2)",) * 3
    assert found.outputs == ("blocks/0[0]", "blocks/1[0]", "blocks/2[0]")


def test_of_an_lstm_the_hidden_state_by_the_hidden_state_before():
    cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))

    class Sequence(nnx.Module):
        def __init__(self):
            self.cell = cell

        def __call__(self, x):
            state = cell_state
            for t in range(x.shape[1]):
                state, y = self.cell(state, x[:, t])
            return y

    cell_state = (draw(2, 4, seed=1), draw(2, 4, seed=2))
    x = draw(2, 3, 3)
    found = measure(Sequence(), x, where="LSTMCell")
    state, expected = cell_state, []
    for t in range(3):
        expected.append(explicit(lambda h, c=state[0], t=t: cell((c, h), x[:, t])[1], state[1]))
        state, _ = cell(state, x[:, t])
    # The first state is a constant of the model: what it is given is its input alone.
    assert found.inputs == ("2x3", "2x4 (array 2 of 3)", "2x4 (array 2 of 3)")
    np.testing.assert_allclose(found.largest[1:], [largest for _, largest in expected[1:]], rtol=1e-4)
    assert spp.jacobians(Sequence(), x, where="LSTMCell", output=lambda out: out[0][0]).inputs[1].endswith("1 of 3)")


def test_an_array_that_is_given_several_times_is_one_input():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

        def __call__(self, query, key, value):
            return query + self.attend(query, key, value)

    class Transformer(Chain):
        def __call__(self, x):
            for block in self.blocks:
                x = block(x, x, x)
            return x

    x, blocks = draw(2, 3, 4), [Attention(nnx.Rngs(seed)) for seed in range(2)]
    found = measure(Transformer(blocks), x)
    y = blocks[0](x, x, x)
    check(found, [explicit(lambda x: blocks[0](x, x, x), x), explicit(lambda x: blocks[1](x, x, x), y)])
    assert found.inputs == ("2x3x4", "2x3x4")


def test_blocks_inside_of_vmap_are_measured_for_all_together():
    class Members(Chain):
        def __call__(self, x):
            run = nnx.vmap(lambda block, x: block(x), in_axes=(None, 1), out_axes=1)
            for block in self.blocks:
                x = run(block, x)
            return x

    x, blocks = draw(2, 2, 5), [Step(nnx.Rngs(seed)) for seed in range(2)]
    check(measure(Members(blocks), x), Chain(blocks).expected(x))


def test_axis_names_are_bound():
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            for number in range(2):
                norm = linen.BatchNorm(use_running_average=False, axis_name="batch", name=f"norm_{number}")
                x = x + norm(linen.Dense(3, name=f"dense_{number}")(x))
            return x

    class Plain(Normed):
        @linen.compact
        def __call__(self, x):
            for number in range(2):
                norm = linen.BatchNorm(use_running_average=False, name=f"norm_{number}")
                x = x + norm(linen.Dense(3, name=f"dense_{number}")(x))
            return x

    a, b = (measure(model, draw(5, 3), where="BatchNorm") for model in (Normed(), Plain()))
    same(a, b)


def test_bfloat16():
    model, x = residual(width=16, depth=2), draw(4, 16)
    exact = model.expected(x)
    graph, state = nnx.split(model)
    half = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    for block in half.blocks:
        block.layers[0].dtype = jnp.bfloat16
    found = measure(half, x.astype(jnp.bfloat16))
    assert found.dtypes == ("bfloat16", "bfloat16")
    np.testing.assert_allclose(found.mean_square, [mean for mean, _ in exact], rtol=0.02)
    np.testing.assert_allclose(found.largest, [largest for _, largest in exact], rtol=0.02)


def test_scales_that_squares_cannot_have():
    for scale in (1e25, 1e-25):
        model = Chain([Block(lambda x, layer, s=scale: layer(x) * s, linear(4, 4, seed)) for seed in range(1)])
        found = measure(model, draw(2, 4), where="Block")
        kernel = np.asarray(model.blocks[0].layers[0].kernel[...], np.float64) * scale
        check(found, [(np.square(kernel).sum() / 4, np.linalg.svd(kernel, compute_uv=False)[0])])


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def test_a_rule_for_the_gradient_alone():
    model = Chain([Block(lambda x, layer: doubled(x) + layer(x), linear(5, 5, seed)) for seed in range(2)])
    kernels = [2 * np.eye(5) + np.asarray(block.layers[0].kernel[...]) for block in model.blocks]
    expected = [(np.square(w).sum() / 5, np.linalg.svd(w, compute_uv=False)[0]) for w in kernels]
    check(measure(model, draw(3, 5), where="Block"), expected)


def test_parallel_heads_need_no_gradient_from_the_last():
    class Heads(Chain):
        def __call__(self, x):
            return [block(x) for block in self.blocks]

    x, model = draw(4, 5), Heads([Step(nnx.Rngs(seed)) for seed in range(3)])
    check(measure(model, x), [explicit(block, x) for block in model.blocks])


# ---------------------------------------------------------------- what it costs, and how it converges


def test_the_number_of_products():
    """`probes` + `iterations` with the Jacobian and `iterations` with its transpose, in one pass through the model."""
    counts = {"forward": 0, "push": 0, "pull": 0}

    def counted(name, x):
        def count(x):
            counts[name] += 1
            return x

        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    @jax.custom_jvp
    def function(x):
        return counted("forward", x)

    @function.defjvp
    def _(primals, tangents):
        linear_call = jax.custom_derivatives.linear_call
        push = linear_call(lambda _, t: counted("push", t), lambda _, u: counted("pull", u), (), tangents[0])
        return function(primals[0]), push

    model = Chain([Block(lambda x, layer: layer(x) + function(x), linear(4, 4, seed)) for seed in range(3)])
    found = spp.jacobians(model, draw(2, 4), where="Block", probes=5, iterations=7)
    assert len(found) == 3
    assert counts["push"] == 3 * (5 + 7)
    assert counts["pull"] == 3 * 7
    assert counts["forward"] <= 3 * 2


def test_more_iterations_come_closer():
    model, x = residual(width=64, depth=2), draw(8, 64)
    runs = [spp.jacobians(model, x, iterations=n) for n in (1, 2, 16)]
    largest = np.stack([run.largest for run in runs])
    assert (np.diff(largest, axis=0) >= 0).all()  # each is a further lower bound of the same random start
    np.testing.assert_allclose(runs[1].last_growth, 1 - largest[0] / largest[1], rtol=1e-4)
    assert np.isnan(runs[0].last_growth).all()
    assert (runs[-1].last_growth < 0.005).all()
    kernels = [np.eye(64) + np.asarray(block.layers[0].kernel[...]) for block in model.blocks]
    np.testing.assert_allclose(largest[-1], [np.linalg.svd(w, compute_uv=False)[0] for w in kernels], rtol=0.01)


def test_a_seed_is_repeatable_and_another_is_another():
    model, x = residual(), draw(3, 6)
    first, again, other = (spp.jacobians(model, x, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.mean_square, again.mean_square)
    assert (first.mean_square != other.mean_square).all()


# ---------------------------------------------------------------- what a stranger would type


def test_the_table_and_the_file(tmp_path):
    found = spp.jacobians(residual(), draw(3, 6), probes=4, iterations=8)
    head, columns, *rows = repr(found).splitlines()
    assert head == (
        "Singular values of the Jacobians of 3 blocks, float32, of the whole batch at once (4 probes, 8 iterations)"
    )
    assert columns.split() == ["block", "input", "output", "mean", "square", "largest", "last", "growth"]
    assert [row.split()[:4] for row in rows] == [[str(i), f"blocks/{i}", "3x6", "3x6"] for i in range(3)]
    content = json.loads(found.to_json(tmp_path / "jacobians.json"))
    assert json.loads((tmp_path / "jacobians.json").read_text()) == content
    assert content["largest"] == found.largest.tolist()
    assert content["paths"] == ["blocks/0", "blocks/1", "blocks/2"]


def test_integers_have_no_jacobian_and_the_other_blocks_do():
    class Words(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(7, 5, rngs=nnx.Rngs(0))
            self.blocks = nnx.List([Step(nnx.Rngs(seed)) for seed in range(2)])

        def __call__(self, words):
            x = self.embed(words)
            for block in self.blocks:
                x = block(x)
            return x

    model, words = Words(), jnp.array([[1, 2, 3]])
    found = measure(model, words, where=("Embed", "Step"))
    assert found.reasons == {"embed": "it is given no floating-point array"}
    assert "embed: NaN, it is given no floating-point array" in repr(found)
    assert found.input_shapes[0] is None
    assert np.isnan([found.mean_square[0], found.largest[0]]).all()
    assert json.loads(found.to_json())["largest"][0] is None
    expected = Chain(model.blocks).expected(model.embed(words))
    np.testing.assert_allclose(found.largest[1:], [largest for _, largest in expected], rtol=1e-4)
    alone = spp.jacobians(model, words, where="Embed")
    assert np.isnan(alone.largest).all()


def test_an_empty_batch_is_told():
    found = spp.jacobians(residual(), jnp.zeros((0, 6)))
    assert found.reasons == dict.fromkeys(found.paths, "it is given an empty array, 0x6")
    assert np.isnan([found.mean_square, found.largest]).all()


def test_nan_is_told():
    model = residual()
    model.blocks[1].layers[0].kernel[...] = model.blocks[1].layers[0].kernel[...].at[0, 0].set(jnp.nan)
    found = spp.jacobians(model, draw(3, 6))
    # A linear block after it has a Jacobian that does not depend on what it is given.
    assert found.reasons == {"blocks/1": "its Jacobian is not finite"}
    assert np.isnan(found.largest).tolist() == [False, True, False]


def test_a_block_that_ignores_its_input_has_the_jacobian_zero():
    model = Chain([Block(lambda x, layer: layer(jnp.ones_like(x)), linear(4, 4, seed)) for seed in range(2)])
    found = spp.jacobians(model, draw(2, 4), where="Block")
    for values in (found.mean_square, found.largest, found.last_growth):
        np.testing.assert_array_equal(values, 0)


def test_a_batch_of_one_number():
    model = Chain([Block(lambda x, layer: 3 * x + layer(x), linear(1, 1)) for _ in range(2)])
    kernel = float(model.blocks[0].layers[0].kernel[0, 0])
    found = spp.jacobians(model, draw(1, 1), where="Block")
    np.testing.assert_allclose(found.largest, abs(3 + kernel), rtol=1e-5)
    np.testing.assert_allclose(found.mean_square, (3 + kernel) ** 2, rtol=1e-5)


@pytest.mark.parametrize("options", [{"probes": 0}, {"iterations": 0}, {"probes": 2.5}, {"iterations": True}])
def test_wrong_numbers(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}={value}: expected a whole number, 1 or more"):
        spp.jacobians(residual(), draw(3, 6), **options)


def test_wrong_names_and_models():
    with pytest.raises(ValueError, match=r"where='Blok' selects no module .* did you mean where=\"Block\""):
        spp.jacobians(residual(), draw(3, 6), where="Blok")
    with pytest.raises(ValueError, match="output='hidden' names no array that Block 'blocks/0' returns"):
        spp.jacobians(residual(), draw(3, 6), output="hidden")
    with pytest.raises(TypeError, match="is no Flax model"):
        spp.jacobians(lambda x: x, draw(3, 6))


def test_what_cannot_be_cut_out_is_named():
    def halved(x, layer):
        return jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x / 2, layer(x))

    model = Chain([Block(halved, linear(4, 4, seed)) for seed in range(2)])
    with pytest.raises(ValueError, match=r"Block 'blocks/0' cannot be differentiated \(Reverse-mode .*\); choose"):
        spp.jacobians(model, draw(2, 4), where="Block")

    class Conditional(Chain):
        def __call__(self, x):
            for block in self.blocks:
                x = nnx.cond(x.sum() > 0, lambda block, x: block(x), lambda block, x: x, block, x)
            return x

    with pytest.raises(ValueError, match=r"Step 'blocks/0' runs inside JAX's 'cond'"):
        spp.jacobians(Conditional([Step(nnx.Rngs(seed)) for seed in range(2)]), draw(4, 5), where="Step")
