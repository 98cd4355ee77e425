import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import cost
from nfjax.reproduce import TABLE_1, TABLE_2
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


@pytest.mark.parametrize(("row", "printed"), list((TABLE_1 | TABLE_2).items()), ids=lambda value: str(value))
def test_the_papers_tables(row, printed):
    depth, scheme = row
    residual, norm = {"BatchNorm": ("conv", "batch")}.get(scheme, (scheme.lower(), None))
    model = nnx.eval_shape(lambda: PreActResNet(depth, residual, norm, rngs=nnx.Rngs(0)))
    spent = cost.count(model, (1, 32, 32, 3))
    assert (spent.paper_parameters, spent.paper_flops) == printed
