import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import initializers, layers, resnet
from nfjax import residual as rules
from nfjax.residual import RESIDUALS, Learned, Position, Rule

HALF = math.sqrt(0.5)
# (a, b) of the first of four blocks; `nf`, whose kernels are standardized, is in test_rules_of_others.py.
COEFFICIENTS = {
    "identity": (1.0, 1.0),
    "idshort": (HALF, HALF),
    "learnscalar": (HALF, HALF),
    "convshort": (HALF, HALF),
    "conv": (1.0, 1.0),
    "skipinit": (1.0, 0.0),
    "fixup": (1.0, 1.0),
    "rescalenet": (math.sqrt(3 / 4), math.sqrt(1 / 4)),
    "depthscale": (1.0, 0.5),
    "mpsum": (0.7 / math.sqrt(0.58), 0.3 / math.sqrt(0.58)),
}
CONVOLUTIONAL = ("convshort", "conv")


def position(c_in=8, c_out=8, stride=1):
    return Position((2, 2), 0, 0, 2, c_in, c_out, stride, (8, 8))


def make_block(residual, norm=None, **where):
    init = initializers.INITIALIZERS["he_fan_out"]
    conv = functools.partial(layers.convolution, init=init, dtype=jnp.float32)
    activation = functools.partial(layers.Activation, norm=layers.NORMS[norm] if norm else None)
    return resnet.BasicBlock(position(**where), rules.get(residual), activation, conv, rngs=nnx.Rngs(0))


def conv2d(x, kernel, stride=1):
    pad = kernel.shape[0] // 2
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=dimensions
    )


@pytest.mark.parametrize("where", [{}, {"c_out": 16, "stride": 2}, {"c_out": 16}], ids=["same", "strided", "wider"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_block_is_the_closed_form(name, where):
    block = make_block(name, **where)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))
    first, second = (conv.kernel[...] for conv in block.branch.convolutions)
    stride = where.get("stride", 1)
    z = jnp.maximum(x, 0)
    f = conv2d(jnp.maximum(conv2d(z, first, stride), 0), second)
    has_conv = name in CONVOLUTIONAL or bool(where)
    h = conv2d(z, block.residual.shortcut.kernel[...], stride) if has_conv else x
    a, b = COEFFICIENTS[name]
    np.testing.assert_allclose(block(x), a * h + b * f, rtol=1e-5, atol=1e-5)


def test_every_rule_is_covered_by_the_closed_form():
    assert COEFFICIENTS.keys() | {"nf"} == RESIDUALS.keys()


def test_learnscalar_multiplies_the_skip_path_only():
    block = make_block("learnscalar")
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 8))
    assert float(block.residual.alpha[...]) == 1
    before = block(x)
    block.residual.alpha[...] = jnp.float32(3)
    np.testing.assert_allclose(block(x) - before, math.sqrt(0.5) * 2 * x, rtol=1e-4, atol=1e-4)


def test_learnscalar_transition_has_a_convolution_and_no_alpha():
    block = make_block("learnscalar", c_out=16, stride=2)
    assert not hasattr(block.residual, "alpha")
    assert block.residual.shortcut.kernel.shape == (1, 1, 8, 16)


def test_norm_stands_before_every_relu():
    block = make_block("convshort", norm="batch")
    x = 5 + 3 * jax.random.normal(jax.random.key(1), (16, 8, 8, 8))

    def bn(y):
        return (y - y.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(y.var((0, 1, 2), keepdims=True) + 1e-5)

    first, second = (conv.kernel[...] for conv in block.branch.convolutions)
    z = jnp.maximum(bn(x), 0)
    f = conv2d(jnp.maximum(bn(conv2d(z, first)), 0), second)
    expected = HALF * (conv2d(z, block.residual.shortcut.kernel[...]) + f)
    np.testing.assert_allclose(block(x), expected, rtol=1e-3, atol=1e-3)


def test_positions_count_the_blocks_before_them():
    places = [(stage, i) for stage, size in enumerate((2, 3)) for i in range(size)]
    positions = [Position((2, 3), stage, i, 2, 8, 8, 1, (8, 8)) for stage, i in places]
    assert [p.index for p in positions] == [0, 1, 2, 3, 4]
    assert {p.num_blocks for p in positions} == {5}


# ---- room for the related rules (SkipInit, Fixup, NF-ResNet): each one small function, as a callable or a table line


def skipinit(position):
    """x + alpha f(x), alpha learned, from 0 (De and Smith 2020)."""
    return Rule(b=Learned("alpha", 0.0))


def zero_last(position):
    """Fixup's branch: the last convolution starts at 0, the others scaled by L^(-1/(2m-2)) (Zhang et al. 2019)."""
    scale = position.num_blocks ** (-1 / (2 * position.num_convolutions - 2))
    return Rule(branch_scales=(scale,) * (position.num_convolutions - 1) + (0.0,))


def normalized(position):
    """x + 0.2 f(x / beta), beta = sqrt(1 + 0.2^2 l) within a stage (Brock et al. 2020)."""
    return Rule(b=0.2, beta=math.sqrt(1 + 0.04 * position.index_in_stage))


def test_branch_scales_multiply_the_kernels():
    plain, scaled = make_block("identity"), make_block(zero_last)
    ours, theirs = ([conv.kernel[...] for conv in block.branch.convolutions] for block in (scaled, plain))
    np.testing.assert_allclose(ours[0], theirs[0] * 4 ** (-1 / 2), rtol=1e-6)  # 4 blocks, 2 convolutions
    np.testing.assert_array_equal(ours[1], 0.0)


def test_beta_divides_what_the_branch_and_a_shortcut_convolution_read():
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))

    def rule(beta, convolution):
        return lambda position: Rule(b=0.2, beta=beta, convolution=convolution)

    for convolution in (False, True):
        block, divided = make_block(rule(1.0, convolution)), make_block(rule(4.0, convolution))
        h = x / 4 if convolution else x
        expected = (0.0 if convolution else x) + (block(x / 4) - (0.0 if convolution else h / 4))
        np.testing.assert_allclose(divided(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [skipinit, zero_last])
def test_a_rule_of_ones_own_starts_as_the_identity(rule):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))
    np.testing.assert_allclose(make_block(rule)(x), x)


@pytest.mark.parametrize("rule", [skipinit, zero_last, normalized])
def test_a_rule_of_ones_own_makes_a_network(rule, monkeypatch):
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    given = resnet.PreActResNet(18, rule, width=4, rngs=nnx.Rngs(0))(images)
    monkeypatch.setitem(RESIDUALS, "own", rule)
    named = resnet.PreActResNet(18, "own", width=4, rngs=nnx.Rngs(0))(images)
    assert given.shape == (2, 10)
    assert bool(jnp.isfinite(given).all())
    np.testing.assert_array_equal(given, named)


def test_what_is_no_rule_is_refused_where_it_is_given():
    with pytest.raises(
        TypeError, match=r"residual=Residual is a class: expected a function position -> residual\.Rule"
    ):
        resnet.PreActResNet(18, rules.Residual, width=4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"returned 0\.5: expected a residual\.Rule"):
        resnet.PreActResNet(18, lambda position: 0.5, width=4, rngs=nnx.Rngs(0))


def test_unknown_rule():
    with pytest.raises(
        ValueError, match="unknown residual 'convshot': expected a callable or one of identity, idshort"
    ):
        rules.get("convshot")
