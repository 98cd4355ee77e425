"""The residual rules, norms and convolutions of others, against their authors' formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import initializers, layers, residual, resnet, spp
from nfjax.residual import RESIDUALS, Learned

RULES = ("skipinit", "fixup", "rescalenet", "nf", "depthscale", "mpsum")
NORMS = ("group", "dyt", "derf")


def network(depth=10, rule="identity", norm=None, **settings):
    return resnet.PreActResNet(depth, rule, norm, **{"width": 8} | settings, rngs=nnx.Rngs(0))


def rules_of(depth, name):
    """The rule of each block, and the number of blocks."""
    blocks = nnx.eval_shape(lambda: network(depth, name)).blocks
    return [block.residual.rule for block in blocks], len(blocks)


@pytest.fixture(autouse=True)
def _promotion():
    """Flax's own norms promote types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# ---------------------------------------------------------------- coefficients


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_coefficients_are_those_of_the_authors(depth):
    rescaled, count = rules_of(depth, "rescalenet")
    for number, rule in enumerate(rescaled, count - 1):  # as their program counts the blocks
        assert (rule.a, rule.b) == pytest.approx((math.sqrt(number / (number + 1)), (number + 1) ** -0.5))
        assert rule.a**2 + rule.b**2 == pytest.approx(1)
    assert all((rule.a, rule.b) == (1.0, count**-0.5) for rule in rules_of(depth, "depthscale")[0])
    summed = rules_of(depth, "mpsum")[0]
    assert all((rule.a, rule.b) == pytest.approx((0.7 / math.sqrt(0.58), 0.3 / math.sqrt(0.58))) for rule in summed)
    assert all((rule.a, rule.b) == (1.0, Learned("alpha", 0.0)) for rule in rules_of(depth, "skipinit")[0])


def test_half_and_half_is_idshort():
    given = residual.mpsum(None, t=0.5)
    assert (given.a, given.b) == pytest.approx((residual.SQRT_HALF, residual.SQRT_HALF))


@pytest.mark.parametrize(("depth", "convolutions"), [(18, 2), (50, 3), (101, 3)])
def test_fixup_scales_the_kernels_of_its_branches(depth, convolutions):
    rules, count = rules_of(depth, "fixup")
    scale = count ** (-1 / (2 * convolutions - 2))
    assert all(rule.branch_scales == pytest.approx((scale,) * (convolutions - 1) + (0.0,)) for rule in rules)
    assert all(rule.b == Learned("scale", 1.0) for rule in rules)


def test_nf_divides_by_the_expected_deviation():
    """Those of DeepMind's program: 1 at the start, the growth of the stage before at every transition."""
    betas = [rule.beta for rule in rules_of(50, "nf")[0]]
    first, second, third = [1.0, 1.0198, 1.0392], [1.0583, 1.0198, 1.0392, 1.0583], [1.0770, 1.0198]
    np.testing.assert_allclose(betas[:9], first + second + third, atol=5e-5)
    np.testing.assert_allclose(betas[13], 1.1136, atol=5e-5)


# ---------------------------------------------------------------- what they promise


def expected_of_nf(depth):
    """1 + alpha^2 behind a transition, and alpha^2 more in each block."""
    return np.array([1 + 0.04 * (index + 1) for count in resnet.STAGES[depth][1] for index in range(count)])


class Pointwise(resnet.BasicBlock):
    """Of 1x1 convolutions, which lose nothing at borders."""

    @classmethod
    def layout(cls, position):
        c_in, c_out = position.in_features, position.out_features
        return [(c_in, c_out, 1, position.stride), (c_out, c_out, 1, 1)]


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_nf_has_the_variance_that_it_expects(depth):
    """In closed form exactly, through transitions, where no zero padding takes a part of it."""
    model = network(None, "nf", block=Pointwise, stage_sizes=resnet.STAGES[depth][1])
    found = spp.predict(model, (32, 32, 3)).forward_var
    expected = expected_of_nf(depth)
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-4)


def test_nf_as_measured_loses_only_what_padding_takes():
    """The closed form counts the taps that fall on the padding: up to 11 % by the last block."""
    depth = 18
    model = network(depth, "nf", width=64)
    measured = spp.propagate(model, jax.random.normal(jax.random.key(1), (4, 32, 32, 3))).forward_var
    predicted = spp.predict(model, (32, 32, 3)).forward_var
    assert (predicted / expected_of_nf(depth) > 0.88).all()
    assert (predicted < expected_of_nf(depth)).all()
    np.testing.assert_allclose(measured / predicted, 1, atol=0.2)


@pytest.mark.parametrize("index", [1, 2], ids=["same", "transition"])
def test_an_nf_block_by_hand(index):
    model = network(18, "nf")
    block, alpha = model.blocks[index], 0.2
    for _, module in nnx.iter_modules(block):
        if isinstance(module, layers.StandardizedConv):
            module.bias[...] = jnp.linspace(-1, 1, len(module.bias[...]))
    beta, gamma = math.sqrt(1 + index * alpha**2), math.sqrt(2 / (1 - 1 / math.pi))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))

    def convolve(conv, z):
        v = np.asarray(conv.kernel[...], np.float64)
        n_in = math.prod(v.shape[:-1])
        kernel = (v - v.mean((0, 1, 2))) / (v.std((0, 1, 2)) * math.sqrt(n_in))
        kernel = jnp.asarray(kernel, jnp.float32)
        pad = ((kernel.shape[0] // 2,) * 2,) * 2
        settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(z, kernel, (conv.strides,) * 2, pad, **settings) + conv.bias[...]

    z = gamma * jnp.maximum(x / beta, 0)
    first, second = block.branch.convolutions
    f = convolve(second, gamma * jnp.maximum(convolve(first, z), 0))
    h = x if block.residual.shortcut is None else convolve(block.residual.shortcut, z)
    assert (block.residual.shortcut is None) == (index == 1)
    np.testing.assert_allclose(block(x), h + alpha * f, atol=2e-5)


def test_skipinit_is_the_identity_between_transitions():
    model = network(18, "skipinit")
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))
    np.testing.assert_array_equal(model.blocks[1](x), x)


def test_a_fixup_network_begins_at_zero_and_its_first_step_is_that_of_any_depth():
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    labels = jnp.arange(4)
    changes = []
    for count in (1, 3, 12):
        model = network(None, "fixup", stage_sizes=(count,), block="basic")
        graph, params = nnx.split(model, nnx.Param)

        @jax.jit
        def step(params, graph=graph):
            def loss(params):
                logits = nnx.merge(graph, params)(images)
                return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), logits

            grads, logits = jax.grad(loss, has_aux=True)(params)
            stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
            return logits, nnx.merge(graph, stepped)(images)

        logits, change = step(params)
        np.testing.assert_array_equal(logits, jnp.zeros((4, 10)))
        changes.append(change)
    assert float(jnp.abs(changes[0]).max()) > 1e-3
    # Between transitions every block begins as the identity, and only the classifier has a gradient.
    for change in changes[1:]:
        np.testing.assert_allclose(change, changes[0], rtol=1e-5, atol=1e-7)


def test_fixup_has_a_number_before_every_convolution_activation_and_the_classifier():
    model = network(10, "fixup")
    flat = {path: leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)) if leaf[...].ndim == 0}
    blocks = [path for path in flat if path[0] == "blocks"]
    assert len(blocks) == 4 * (2 * 2 + 1)  # before each of two activations and what follows them; the scale
    assert {path for path in flat if path[0] != "blocks"} == {("activation", "before"), ("activation", "behind")}
    assert all(float(leaf[...]) == (path[-1] == "scale") for path, leaf in flat.items())


def test_biases_stand_around_the_activation():
    activation = layers.Activation(3, None, biases=True, rngs=nnx.Rngs(0))
    activation.before[...], activation.behind[...] = jnp.float32(-1.0), jnp.float32(0.5)
    np.testing.assert_allclose(activation(jnp.asarray([[0.0, 1.5, 3.0]])), [[0.5, 1.0, 2.5]])


# ---------------------------------------------------------------- standardized weights


def standardized(scaled, dtype=jnp.float32):
    make = layers.scaled_standardized_convolution if scaled else layers.standardized_convolution
    conv = make(6, 5, 3, 1, (8, 8), init=initializers.he_fan_out(), dtype=dtype, rngs=nnx.Rngs(0))
    conv.kernel[...] = conv.kernel[...] * 3 + 0.7
    if scaled:
        conv.gain[...] = jnp.arange(1.0, 6.0)
    return conv


@pytest.mark.parametrize("scaled", [False, True])
def test_each_channel_has_the_mean_and_variance_of_the_formula(scaled):
    conv = standardized(scaled)
    kernel = np.asarray(conv.standardized(), np.float64)
    np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0, atol=1e-6)
    expected = np.arange(1.0, 6.0) ** 2 / (9 * 6) if scaled else np.ones(5)
    np.testing.assert_allclose(kernel.var((0, 1, 2)), expected, rtol=1e-5)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 6))
    dimensions = ("NHWC", "HWIO", "NHWC")
    plain = jax.lax.conv_general_dilated(
        x, jnp.asarray(kernel, jnp.float32), (1, 1), "SAME", dimension_numbers=dimensions
    )
    np.testing.assert_allclose(conv(x), plain, atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_is_that_of_a_standardized_kernel(scaled):
    """With v the kernel, v' its deviation from the channel's mean, s its standard deviation and w = c v' / s: the
    gradient is c / s (g - mean g - v' mean(g v') / s^2), which is orthogonal to 1 and to v'.
    """
    conv = standardized(scaled)
    g = np.asarray(jax.random.normal(jax.random.key(2), conv.kernel.shape), np.float64)
    graph, params = nnx.split(conv)

    def product(params):
        return (nnx.merge(graph, params).standardized() * jnp.asarray(g, jnp.float32)).sum()

    found = np.asarray(jax.grad(product)(params)["kernel"][...], np.float64)
    v = np.asarray(conv.kernel[...], np.float64)
    mean = functools.partial(np.mean, axis=(0, 1, 2), keepdims=True)
    centred = v - mean(v)
    s = np.sqrt(mean(centred**2))
    c = np.arange(1.0, 6.0) / math.sqrt(54) if scaled else 1.0
    np.testing.assert_allclose(found, c / s * (g - mean(g) - centred * mean(g * centred) / s**2), atol=1e-5)
    np.testing.assert_allclose(mean(found), 0, atol=1e-6)
    np.testing.assert_allclose(mean(found * centred), 0, atol=1e-6)


def test_kernels_stay_standardized_while_they_are_trained():
    model = network(10, "nf", width=4)
    images, labels = jax.random.normal(jax.random.key(1), (8, 8, 8, 3)), jnp.arange(8)
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def step(params):
        def loss(params):
            return -jnp.take_along_axis(jax.nn.log_softmax(nnx.merge(graph, params)(images)), labels[:, None], 1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)

    losses = []
    for _ in range(5):
        value, params = step(params)
        losses.append(float(value))
        for block in nnx.merge(graph, params).blocks:
            for conv in block.branch.convolutions:
                kernel, n_in = np.asarray(conv.standardized(), np.float64), math.prod(conv.kernel.shape[:-1])
                np.testing.assert_allclose(kernel.mean((0, 1, 2)), 0, atol=1e-6)
                np.testing.assert_allclose(kernel.var((0, 1, 2)), np.asarray(conv.gain[...]) ** 2 / n_in, rtol=1e-3)
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- in place of a norm


def test_dyt_and_derf_are_their_formulas():
    x = jax.random.normal(jax.random.key(1), (2, 3, 3, 4))
    tanh, erf = layers.DynamicTanh(4), layers.DynamicErf(4)
    np.testing.assert_allclose(tanh(x), jnp.tanh(0.5 * x), rtol=1e-6)
    np.testing.assert_allclose(erf(x), jax.lax.erf(0.5 * x), rtol=1e-6)
    for layer in (tanh, erf):
        layer.alpha[...], layer.scale[...], layer.bias[...] = jnp.float32(2.0), jnp.arange(4.0), jnp.ones(4)
    erf.shift[...] = jnp.float32(0.3)
    np.testing.assert_allclose(tanh(x), jnp.arange(4.0) * jnp.tanh(2 * x) + 1, rtol=1e-6)
    np.testing.assert_allclose(erf(x), jnp.arange(4.0) * jax.lax.erf(2 * x + 0.3) + 1, rtol=1e-5)


def test_group_norm_goes_with_standardized_weights():
    model = network(10, "identity", "group", width=64)
    convolutions = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Conv)]
    assert {type(conv) for conv in convolutions} == {layers.StandardizedConv}
    assert model.blocks[0].activation.norm.num_groups == 32
    own = network(10, "identity", "group", conv=layers.convolution)
    assert type(own.stem.conv) is nnx.Conv
    assert own.blocks[0].activation.norm.num_groups == 8


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("norm", NORMS)  # the rules are in test_resnet.py
def test_an_image_is_alone_in_its_batch(norm):
    model = network(10, "identity", norm)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

    @nnx.jit
    def outputs(model, whole):
        found = []
        for part in (model.stem, *model.blocks):
            whole, alone = part(whole), part(whole[:1])
            found.append((whole, alone))
        return found

    for whole, alone in outputs(model, images):
        np.testing.assert_allclose(whole[:1], alone, atol=2e-5 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize(("rule", "norm"), [("nf", None), ("fixup", None), *(("identity", norm) for norm in NORMS)])
def test_bfloat16_remat_and_both_stems(rule, norm):
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    plain, kept, half = (
        network(None, rule, norm, stage_sizes=(1, 1), block="basic", stem="imagenet", image_size=16, **settings)
        for settings in ({}, {"remat": True}, {"dtype": jnp.bfloat16})
    )

    def gradient(model):
        graph, params = nnx.split(model, nnx.Param)
        return jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(images) ** 2).mean()))(params)

    for a, b in zip(*map(jax.tree.leaves, map(gradient, (plain, kept))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()) + 1e-12)

    @nnx.jit
    def outputs(model, x):
        found = [model.stem(x)]
        for block in model.blocks:
            found.append(block(found[-1]))
        return found

    (*_, x), (_, *narrow) = outputs(plain, images), outputs(half, images.astype(jnp.bfloat16))
    assert [y.dtype for y in narrow] == [jnp.bfloat16] * 2
    y = narrow[-1]
    assert float(jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(x.ravel())) < 0.1


@pytest.mark.parametrize("depth", [34, 152])
@pytest.mark.parametrize("norm", NORMS)  # the rules are in test_resnet.py
def test_deep_and_shallow_networks_can_be_built(norm, depth):
    model = nnx.eval_shape(lambda: network(depth, "identity", norm))
    assert len(model.blocks) == sum(resnet.STAGES[depth][1])


@pytest.mark.parametrize("rule", RULES)
def test_the_closed_form_is_what_is_measured(rule):
    profile = spp.propagate_seeds(
        lambda seed: resnet.PreActResNet(10, rule, width=32, rngs=nnx.Rngs(seed)), spp.noise((8, 16, 16, 3)), seeds=3
    )
    prediction = spp.predict(network(10, rule, width=32), (16, 16, 3))
    np.testing.assert_allclose(profile.forward_var / prediction.forward_var, 1, atol=0.35)
    np.testing.assert_allclose(profile.backward_var / prediction.backward_var, 1, atol=0.35)


def test_every_rule_and_norm_is_tested_here_or_in_test_residual():
    assert set(RULES) | {"identity", "idshort", "learnscalar", "convshort", "conv"} == RESIDUALS.keys()
    assert {"batch", *NORMS} == layers.NORMS.keys()
