import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import cost
from nfjax.reproduce import TABLE_1, TABLE_2, as_printed
from nfjax.resnet import PreActResNet


class Small(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dense = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(self.conv(x)).mean((1, 2)))


class SmallLinen(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(6, (3, 3), strides=2, feature_group_count=2)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return linen.Dense(5)(x)


# 8x8 -> 4x4: 16 positions, 9 taps, 2 of 4 input channels each, 6 outputs; padding taps included.
MACS = 16 * 9 * 2 * 6 + 6 * 5
PARAMETERS = 9 * 2 * 6 + 6 + 12 + 6 * 5 + 5


def test_nnx_by_hand():
    spent = cost.count(Small(nnx.Rngs(0)), (1, 8, 8, 4))
    assert spent == cost.Cost(PARAMETERS, 12, MACS)
    assert spent.flops == 2 * MACS


@pytest.mark.parametrize("train", [False, True])
def test_linen_by_hand(train):
    module = SmallLinen()
    assert cost.count(module, (1, 8, 8, 4), train=train) == cost.Cost(PARAMETERS, 12, MACS)
    variables = module.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    assert cost.count(module, jnp.ones((3, 8, 8, 4)), variables=variables) == cost.Cost(PARAMETERS, 12, 3 * MACS)


def test_model_is_left_as_it_was():
    model = Small(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model))
    cost.count(model, (1, 8, 8, 4))
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))


@pytest.mark.parametrize("wrap", [linen.jit, linen.remat])
def test_inner_jaxprs_are_counted(wrap):
    assert cost.count(wrap(linen.Dense)(5), (7, 3)).macs == 7 * 3 * 5


def test_scan_counts_every_round():
    class Body(linen.Module):
        @linen.compact
        def __call__(self, carry, _):
            return linen.Dense(3)(carry), None

    class Scanned(linen.Module):
        @linen.compact
        def __call__(self, x):
            stack = linen.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=11)
            return stack()(x, None)[0]

    spent = cost.count(Scanned(), (2, 3))
    assert (spent.parameters, spent.macs) == (11 * 12, 11 * 2 * 3 * 3)


class Looped(nnx.Module):
    def __init__(self, loop):
        self.loop = loop

    def __call__(self, x):
        return self.loop(x)


def test_transposed_convolution_counts_its_inputs():
    """Each of 4x4 inputs feeds 2x2 outputs; the zeros that the stride inserts are no work."""
    conv = nnx.ConvTranspose(3, 5, (2, 2), strides=(2, 2), rngs=nnx.Rngs(0))
    assert cost.count(conv, (1, 4, 4, 3)).macs == 16 * 4 * 3 * 5


def test_attention_and_embedding():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(10, 8, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)

        def __call__(self, tokens):
            return self.norm(self.attend(self.embed(tokens)))

    projections, scores = 4 * 5 * 8 * 8, 2 * (2 * 5 * 5 * 4)
    spent = cost.count(Model(nnx.Rngs(0)), jnp.zeros((1, 5), jnp.int32))
    assert spent == cost.Cost(80 + 4 * (64 + 8) + 16, 16, projections + scores)


def test_branches_and_loops():
    dear = Looped(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x))
    assert cost.count(dear, (4, 4)).macs == 2 * 64
    with pytest.raises(NotImplementedError, match="while loop"):
        cost.count(Looped(lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x)), (4, 4))
    assert cost.count(Looped(lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y - 1, x)), (4, 4)).macs == 0


def test_pytrees_of_inputs():
    class Pair(nnx.Module):
        def __call__(self, pair, scale):
            return pair["a"] @ pair["b"] * scale

    assert cost.count(Pair(), {"a": (2, 3), "b": np.ones((3, 5), np.float32)}, jnp.float32(2)).macs == 30


def test_not_a_model():
    with pytest.raises(TypeError, match="function is no Flax model"):
        cost.count(lambda x: x, (1,))


# ---------------------------------------------------------------- parameters of normalization layers


class FilterResponseNorm(linen.Module):
    """A norm of somebody's own, 3 parameters for each channel."""

    @linen.compact
    def __call__(self, x):
        y = x * jax.lax.rsqrt(jnp.square(x).mean(axis=(1, 2), keepdims=True) + 1e-6)
        gamma, beta, threshold = (self.param(name, linen.initializers.ones, (1, 1, 1, 6)) for name in "gbt")
        return jnp.maximum(gamma * y + beta, threshold)


class Statistics(linen.Module):
    """No name says so, but it keeps batch statistics."""

    @linen.compact
    def __call__(self, x):
        scale, bias = (self.param(name, linen.initializers.ones, (6,)) for name in ("scale", "bias"))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (6,))
        return (x - mean.value) * scale + bias


class LayerScale(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x * self.param("gamma", linen.initializers.ones, (6,))


class PreNorm(linen.Module):
    """No norm itself: one and a layer."""

    inner: linen.Module

    @linen.compact
    def __call__(self, x):
        return self.inner(linen.LayerNorm()(x))


class NormFreeBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x * self.param("skip_gain", linen.initializers.ones, ())


@pytest.fixture
def others():
    """Their layers rely on JAX's default promotion."""
    with jax.numpy_rank_promotion("allow"):
        yield


def normalization(layer):
    return linen.Sequential([linen.Conv(6, (3, 3), use_bias=False), layer])


@pytest.mark.parametrize(
    ("layer", "of_norms", "beside", "unsure"),
    [
        (FilterResponseNorm(), 18, 0, ()),
        (Statistics(), 12, 0, ()),
        (LayerScale(), 0, 6, (("LayerScale", 6),)),
        (PreNorm(linen.Dense(5)), 12, 35, ()),
        (NormFreeBlock(), 0, 1, ()),
        (linen.WeightNorm(linen.Dense(5)), 0, 40, ()),
        (linen.SpectralNorm(linen.Dense(5)), 0, 35, ()),
        (nnx.bridge.ToLinen(nnx.LayerNorm, (6,)), 12, 0, ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_of_linen(others, layer, of_norms, beside, unsure):
    kwargs = {"update_stats": False} if isinstance(layer, linen.SpectralNorm) else {}
    model = normalization(layer) if not kwargs else linen.Sequential([layer])
    kernel = 9 * 3 * 6 if not kwargs else 0
    spent = cost.count(model, (1, 8, 8, 3) if not kwargs else (1, 6), **kwargs)
    assert (spent.parameters, spent.norm_parameters, spent.unsure) == (kernel + of_norms + beside, of_norms, unsure)


class Affine(nnx.Module):
    def __init__(self):
        self.scale, self.shift = nnx.Param(jnp.ones((1, 1, 6))), nnx.Param(jnp.zeros(6))

    def __call__(self, x):
        return self.scale * x + self.shift


class LayerNorm2d(nnx.LayerNorm):
    """Flax's, with another name."""


class Own(nnx.Module):
    """Of batch norm, its parameters in a list."""

    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros(6))
        self.factors = nnx.List([nnx.Param(jnp.ones(6)), nnx.Param(jnp.ones(6))])

    def __call__(self, x):
        return (x - self.mean) * self.factors[0] + self.factors[1]


class MyRMSNorm(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones((2, 3)))
        self.linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x * self.weight.reshape(6))


@pytest.mark.parametrize(
    ("layer", "of_norms", "beside", "unsure"),
    [
        (Affine(), 0, 12, (("Affine", 12),)),
        (LayerNorm2d(6, rngs=nnx.Rngs(0)), 12, 0, ()),
        (Own(), 12, 0, ()),
        (MyRMSNorm(), 6, 42, ()),
        (nnx.bridge.ToNNX(linen.LayerNorm(), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 6))), 12, 0, ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_of_nnx(others, layer, of_norms, beside, unsure):
    model = nnx.Sequential(nnx.Linear(3, 6, use_bias=False, rngs=nnx.Rngs(0)), layer)
    spent = cost.count(model, (4, 3))
    assert (spent.parameters, spent.norm_parameters, spent.unsure) == (18 + of_norms + beside, of_norms, unsure)


def test_norms_that_are_named(others):
    model = nnx.Sequential(nnx.Linear(3, 6, use_bias=False, rngs=nnx.Rngs(0)), Affine(), MyRMSNorm())
    for norms in (Affine, "Affine", [Affine], (Affine, "Affine")):
        spent = cost.count(model, (4, 3), norms=norms)
        assert (spent.norm_parameters, spent.unsure) == (12 + 6, ())
    assert cost.count(model, (4, 3), norms=(Affine, MyRMSNorm)).norm_parameters == 12 + 6 + 42  # all that is in it
    assert as_printed(spent)[0] == round((18 + 12 + 48 - 18) / 1e6, 2)
    with pytest.raises(ValueError, match="norms=Afine is no module of this model, which has Affine, Linear, "):
        cost.count(model, (4, 3), norms="Afine")
    with pytest.raises(TypeError, match="norms=3: expected a class, its name"):
        cost.count(model, (4, 3), norms=[3])


def test_shapes_of_inputs():
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    assert cost.count(model, (np.int64(2), 3)).macs == 30
    for shape in ((None, 3), (-1, 3)):
        with pytest.raises(ValueError, match=r"expected a shape of known sizes"):
            cost.count(model, shape)


@pytest.mark.parametrize(("row", "printed"), list((TABLE_1 | TABLE_2).items()), ids=lambda value: str(value))
def test_the_papers_tables(row, printed):
    depth, scheme = row
    residual, norm = {"BatchNorm": ("conv", "batch")}.get(scheme, (scheme.lower(), None))
    model = nnx.eval_shape(lambda: PreActResNet(depth, residual, norm, rngs=nnx.Rngs(0)))
    spent = cost.count(model, (1, 32, 32, 3))
    assert as_printed(spent) == printed
