import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import initializers, resnet
from nfjax import residual as rules
from nfjax.residual import RESIDUALS, Position, Residual

HALF = math.sqrt(0.5)
SCALES = {"identity": 1.0, "idshort": HALF, "learnscalar": HALF, "convshort": HALF, "conv": 1.0}
CONVOLUTIONAL = ("convshort", "conv")


def position(c_in=8, c_out=8, stride=1):
    return Position(0, 4, 0, 0, 2, c_in, c_out, stride, (8, 8))


def make_block(residual, norm=None, **where):
    def conv(c_in, c_out, k, stride, size, rngs):
        init = initializers.INITIALIZERS["he_fan_out"]
        return resnet.convolution(c_in, c_out, k, stride, size, init=init, dtype=jnp.float32, rngs=rngs)

    norm = resnet.NORMS[norm] if norm else None
    return resnet.BasicBlock(position(**where), rules.get(residual), norm, conv, rngs=nnx.Rngs(0))


def conv2d(x, kernel, stride=1):
    pad = kernel.shape[0] // 2
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=dimensions
    )


@pytest.mark.parametrize("where", [{}, {"c_out": 16, "stride": 2}, {"c_out": 16}], ids=["same", "strided", "wider"])
@pytest.mark.parametrize("name", SCALES)
def test_block_is_the_closed_form(name, where):
    block = make_block(name, **where)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))
    first, second = (conv.kernel[...] for conv in block.branch.convolutions)
    stride = where.get("stride", 1)
    z = jnp.maximum(x, 0)
    f = conv2d(jnp.maximum(conv2d(z, first, stride), 0), second)
    has_conv = name in CONVOLUTIONAL or bool(where)
    h = conv2d(z, block.residual.shortcut.kernel[...], stride) if has_conv else x
    np.testing.assert_allclose(block(x), SCALES[name] * (h + f), rtol=1e-5, atol=1e-5)


def test_every_rule_is_covered_by_the_closed_form():
    assert SCALES.keys() == RESIDUALS.keys()


def test_learnscalar_multiplies_the_skip_path_only():
    block = make_block("learnscalar")
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 8))
    assert float(block.residual.alpha[...]) == 1
    before = block(x)
    block.residual.alpha[...] = jnp.float32(3)
    np.testing.assert_allclose(block(x) - before, math.sqrt(0.5) * 2 * x, rtol=1e-4, atol=1e-4)


def test_learnscalar_transition_has_a_convolution_and_no_alpha():
    block = make_block("learnscalar", c_out=16, stride=2)
    assert block.residual.alpha is None
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


# ---- room for the related rules (SkipInit, Fixup, NF-ResNet): each one small class, as a callable or a table line


class SkipInit(Residual):
    """x + alpha f(x), alpha learned, from 0 (De and Smith 2020)."""

    def __init__(self, position, conv, rngs):
        super().__init__(position, conv, rngs)
        self.alpha = nnx.Param(jnp.zeros((), jnp.float32))

    def __call__(self, x, activate, branch):
        z = activate(x)
        return self.skip(x, z) + self.alpha[...] * branch(z)


class ZeroLast(Residual):
    """Fixup's branch: the last convolution starts at 0, the others scaled by L^(-1/(2m-2)) (Zhang et al. 2019)."""

    def __init__(self, position, conv, rngs):
        super().__init__(position, conv, rngs)
        self.last, self.scale = (
            position.num_convolutions - 1,
            position.num_blocks ** (-1 / (2 * position.num_convolutions - 2)),
        )

    def branch_convolution(self, index, layer):
        layer.kernel[...] = layer.kernel[...] * (0.0 if index == self.last else self.scale)
        return layer


class Normalized(Residual):
    """x + 0.2 f(x / beta), beta = sqrt(1 + 0.2^2 l) within a stage (Brock et al. 2020)."""

    def __init__(self, position, conv, rngs):
        super().__init__(position, conv, rngs)
        self.beta = math.sqrt(1 + 0.04 * position.index_in_stage)

    def __call__(self, x, activate, branch):
        z = activate(x / self.beta)
        return self.skip(x, z) + 0.2 * branch(z)


@pytest.mark.parametrize("rule", [SkipInit, ZeroLast])
def test_a_rule_of_ones_own_starts_as_the_identity(rule):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 8))
    np.testing.assert_allclose(make_block(rule)(x), x)


@pytest.mark.parametrize("rule", [SkipInit, ZeroLast, Normalized])
def test_a_rule_of_ones_own_makes_a_network(rule, monkeypatch):
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    given = resnet.PreActResNet(18, rule, width=4, rngs=nnx.Rngs(0))(images)
    monkeypatch.setitem(RESIDUALS, "own", rule)
    named = resnet.PreActResNet(18, "own", width=4, rngs=nnx.Rngs(0))(images)
    assert given.shape == (2, 10)
    assert bool(jnp.isfinite(given).all())
    np.testing.assert_array_equal(given, named)


def test_unknown_rule():
    with pytest.raises(
        ValueError, match="unknown residual 'convshot': expected a callable or one of identity, idshort"
    ):
        rules.get("convshot")
