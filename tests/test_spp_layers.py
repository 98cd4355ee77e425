"""`spp` layer by layer: which layers there are, what of a signal is lost besides its variance, and the kernels."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import initializers, resnet, spp

HE = initializers.he_normal("fan_in")


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


class MLP(nnx.Module):
    def __init__(self, width, depth, activation=nnx.relu, init=HE):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(width, width, kernel_init=init, rngs=rngs) for _ in range(depth)])
        self.activation = activation

    def __call__(self, x):
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


# ---------------------------------------------------------------- which layers


def test_layers_of_a_residual_network_in_order():
    model = resnet.PreActResNet(10, "identity", width=4, image_size=8, rngs=nnx.Rngs(0))
    profile = spp.propagate(model, noise(4, 8, 8, 3), level="layer")
    assert profile.level == "layer"
    assert profile.paths[:3] == ("stem/conv", "blocks/0/branch/convolutions/0", "blocks/0/branch/convolutions/1")
    assert profile.paths[-1] == "classifier"
    assert len(profile) == 1 + 8 + 3 + 1  # stem, convolutions, projections, classifier
    assert [kernel.layer for kernel in profile.kernels] == list(profile.paths)
    assert np.isnan(profile.branch_share).all()
    assert np.isfinite(profile.forward_var).all()
    assert "Profile of 13 layers" in repr(profile)
    assert "per layer towards the output" in str(profile.diagnose())


class Transformer(linen.Module):
    remat: bool = False

    @linen.compact
    def __call__(self, x):
        block = linen.remat(Block) if self.remat else Block
        for i in range(2):
            x = block(name=f"block{i}")(x)
        return linen.Dense(3, name="head")(linen.LayerNorm(use_bias=False, use_scale=False, name="last")(x))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x + linen.MultiHeadDotProductAttention(2, name="attention")(linen.LayerNorm(name="norm")(x))
        return x + linen.Dense(8, name="out")(linen.relu(linen.Dense(16, name="in")(x)))


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_transformer(remat):
    profile = spp.propagate(Transformer(remat), noise(8, 5, 8), level="layer")
    block = ["norm", "attention/query", "attention/key", "attention/value", "attention/out", "attention", "in", "out"]
    assert profile.paths == (*(f"block{i}/{name}" for i in range(2) for name in block), "last", "head")
    fans = {kernel.path: kernel.fans for kernel in profile.kernels}
    assert fans["block0/attention/query/kernel"] == (8, 8)  # [8, 2 heads, 4]
    assert fans["block0/attention/out/kernel"] == (8, 8)  # [2 heads, 4, 8]
    assert fans["block0/in/kernel"] == (8, 16)
    assert np.isfinite(profile.dead[profile.paths.index("block0/out")])
    assert np.isnan(profile.dead[profile.paths.index("block0/in")])


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        def body(layer, x, _):
            return linen.relu(layer(x)), None

        many = linen.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return many(linen.Dense(16, kernel_init=initializers.he_normal("fan_in"), name="layer"), x, None)[0]


def test_layers_of_a_loop():
    profile = spp.propagate(Scanned(), noise(8, 16), level="layer")
    assert profile.paths == ("layer[0]", "layer[1]", "layer[2]")
    (kernel,) = profile.kernels
    assert kernel.shape == (16, 16)
    assert kernel.fans == (16, 16)
    assert "He fan-in" in kernel.looks_like


@pytest.mark.parametrize("cell", [linen.OptimizedLSTMCell, linen.LSTMCell, linen.GRUCell])
def test_a_recurrent_layer_is_one_layer(cell):
    class Tagger(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3, name="head")(linen.RNN(cell(8), name="recurrent")(x))

    profile = spp.propagate(Tagger(), noise(4, 20, 8), level="layer")
    assert profile.paths == ("recurrent", "head")


def test_where_chooses_layers_too():
    model = MLP(8, 3)
    chosen = spp.propagate(model, noise(4, 8), level="layer", where=lambda path, module: path.endswith("1"))
    assert chosen.paths == ("layers/1",)
    with pytest.raises(ValueError, match="unknown level='layers': expected 'block' or 'layer'"):
        spp.propagate(model, noise(4, 8), level="layers")


class Heads(nnx.Module):
    def __init__(self):
        self.trunk, self.side = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))
        self.main = nnx.Linear(8, 2, rngs=nnx.Rngs(2))

    def __call__(self, x):
        x = self.trunk(x)
        return self.side(x), self.main(x)


def test_a_layer_that_no_gradient_reaches():
    profile = spp.propagate(Heads(), noise(4, 8), level="layer")
    assert profile.unreached == ("side",)
    assert np.isnan(profile.backward_var).tolist() == [False, True, False]
    assert np.isfinite(profile.forward_var).all()
    assert profile.diagnose().backward.verdict != "non-finite"
    assert spp.find_breakdown(profile) is None
    with pytest.raises(ValueError, match="no gradient reaches the output of 'main'"):
        spp.propagate(Heads(), noise(4, 8), level="layer", loss=lambda out: jax.lax.stop_gradient(out[0]).sum())
    both = spp.propagate(Heads(), noise(4, 8), level="layer", loss=lambda out: out[0].sum() + out[1].sum())
    assert both.unreached == ()


def test_a_model_without_layers():
    class Nothing(nnx.Module):
        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match="Nothing calls no module that holds parameters"):
        spp.propagate(Nothing(), noise(4, 8), level="layer")


def test_a_monitor_measures_layers_and_leaves_kernels_alone():
    monitor, model = spp.Monitor(noise(4, 8), level="layer"), MLP(8, 2)
    once = spp.propagate(model, noise(4, 8), level="layer")
    assert monitor(model).kernels == ()
    np.testing.assert_array_equal(monitor(model).forward_var, once.forward_var)


# ---------------------------------------------------------------- do different inputs become the same


def test_similarity_follows_the_arc_cosine_kernel():
    """Cho and Saul 2009: of a wide ReLU network, cos' = (sqrt(1 - cos^2) + (pi - arccos(cos)) cos) / pi."""
    profile = spp.propagate(MLP(1024, 6), noise(32, 1024), level="layer")
    cosine, expected = 0.0, []
    for _ in range(6):
        expected.append(cosine)
        cosine = (math.sqrt(1 - cosine**2) + (math.pi - math.acos(cosine)) * cosine) / math.pi
    np.testing.assert_allclose(profile.similarity, expected, atol=1024**-0.5)  # what a finite width leaves


def test_similarity_of_a_batch_of_one_and_of_equal_inputs():
    model = MLP(8, 2)
    assert np.isnan(spp.propagate(model, noise(1, 8), level="layer").similarity).all()
    same = jnp.broadcast_to(noise(1, 8), (4, 8))
    np.testing.assert_allclose(spp.propagate(model, same, level="layer").similarity, 1.0, rtol=1e-6)
    opposite = jnp.stack([noise(8), -noise(8)])
    assert spp.propagate(model, opposite, level="layer").similarity[0] == pytest.approx(-1.0)
    assert np.isnan(spp.propagate(model, jnp.zeros((4, 8)), level="layer").similarity).all()


# ---------------------------------------------------------------- units that do nothing


def biased(model, share, bias=-100.0):
    """The first of a model's layers never lets that share of its units come through."""
    layer = model.layers[0]
    size = layer.bias.shape[0]
    layer.bias[...] = jnp.where(jnp.arange(size) < int(share * size), bias, 0.0)
    return model


RECTIFIERS = {
    "relu": nnx.relu,
    "relu6": jax.nn.relu6,
    "maximum": lambda x: jnp.maximum(x, 0),
    "the other way": lambda x: jnp.maximum(0.0, x),
    "squared": lambda x: jnp.square(nnx.relu(x)),
    "jitted": jax.jit(lambda x: jax.nn.relu(x)),
}


@pytest.mark.parametrize("activation", RECTIFIERS.values(), ids=RECTIFIERS)
def test_dead_units_are_counted(activation):
    model = biased(MLP(16, 3, activation), 0.25)
    profile = spp.propagate(model, noise(64, 16), level="layer")
    assert np.isnan(profile.dead[0])  # nothing was rectified before it
    assert profile.dead[1] == pytest.approx(0.25)
    assert "dead" in repr(profile)
    assert np.isnan(profile.saturated).all()


@pytest.mark.parametrize(
    "activation", [nnx.gelu, lambda x: nnx.gelu(x, approximate=False), nnx.silu, nnx.elu, nnx.leaky_relu, nnx.softplus]
)
def test_activations_without_dead_units_and_bounds(activation):
    profile = spp.propagate(MLP(16, 3, activation), noise(64, 16), level="layer")
    assert np.isnan(profile.dead).all()
    assert np.isnan(profile.saturated).all()


@pytest.mark.parametrize(
    ("activation", "near"),
    [
        (jnp.tanh, lambda y: abs(y) > 0.98),
        (nnx.sigmoid, lambda y: (y < 0.01) | (y > 0.99)),
        (jax.lax.erf, lambda y: abs(y) > 0.98),
    ],
)
def test_saturated_values_are_counted(activation, near):
    model = MLP(16, 2, activation, init=jax.nn.initializers.normal(2.0))
    x = noise(64, 16)
    profile = spp.propagate(model, x, level="layer")
    expected = float(near(activation(model.layers[0](x))).mean())
    assert 0.2 < expected < 0.95
    assert profile.saturated[1] == pytest.approx(expected, abs=1e-3)
    assert np.isnan(profile.dead).all()


class Looped(nnx.Module):
    """A block with a ReLU, under remat or in a scan."""

    def __init__(self, kind):
        self.kind = kind
        make = nnx.vmap(lambda rngs: Residual(rngs), in_axes=0, out_axes=0)
        self.blocks = make(nnx.Rngs(0).split(3))

    def __call__(self, x):
        if self.kind == "scan":
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return nnx.scan(
            lambda x, block: nnx.remat(lambda block, x: block(x))(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, self.blocks)


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.second(nnx.relu(self.first(x)))


@pytest.mark.parametrize("kind", ["scan", "remat"])
def test_dead_units_in_loops_and_remat(kind):
    model = Looped(kind)
    dead = np.array([0, 4, 8])[:, None] > np.arange(16)
    model.blocks.first.bias[...] = jnp.where(dead, -100.0, 0.0)
    profile = spp.propagate(model, noise(64, 16))
    np.testing.assert_allclose(profile.dead, [0.0, 0.25, 0.5])


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("init", "name", "standardized"),
    [
        (initializers.he_fan_in(), "He fan-in", True),
        (initializers.he_fan_out(), "He fan-out", True),
        (initializers.brock(), "Brock", True),
        (initializers.he_normal("fan_in"), "He fan-in", False),
        (jax.nn.initializers.lecun_normal(), "LeCun", False),
        (jax.nn.initializers.glorot_uniform(), "Glorot", False),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_kernels_are_known_by_their_variance(init, name, standardized, seed):
    class Model(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(16, 48, (3, 3), kernel_init=init, rngs=nnx.Rngs(seed))

        def __call__(self, x):
            return self.conv(x)

    (kernel,) = spp.propagate(Model(), noise(2, 6, 6, 16), level="layer").kernels
    assert kernel.looks_like == (name,)
    assert kernel.standardized == standardized
    assert kernel.fans == (9 * 16, 9 * 48)
    assert kernel.variance == pytest.approx(float(jnp.var(Model().conv.kernel[...])), rel=1e-6)
    assert name in str(kernel)


class Stacked(linen.Module):
    """Convolutions in a loop, dense layers side by side, and attention's biases."""

    @linen.compact
    def __call__(self, x):
        def body(layer, x, _):
            return linen.relu(layer(x)), None

        init = {"kernel_init": initializers.he_fan_in()}
        many = linen.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = many(linen.Conv(16, (3, 3), name="loop", **init), x, None)[0]
        x = linen.Conv(16, (3, 3), feature_group_count=16, name="depthwise", **init)(x)
        x = linen.MultiHeadDotProductAttention(2, name="attention")(x.reshape(len(x), -1, 16))
        lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None, "axis_size": 4}
        return linen.vmap(linen.Dense, **lifted)(16, name="side", **init)(x)


def test_kernels_that_are_stacked_or_grouped():
    kernels = {kernel.path: kernel for kernel in spp.propagate(Stacked(), noise(2, 4, 4, 16), level="layer").kernels}
    assert not [path for path in kernels if path.endswith("bias")]
    assert kernels["loop/kernel"].fans == (144, 144)
    assert "He fan-in" in kernels["loop/kernel"].looks_like
    assert kernels["depthwise/kernel"].fans == (9, 9)
    assert kernels["side/kernel"].fans == (16, 16)


def test_a_kernel_that_is_zero_and_one_that_nothing_explains():
    model = MLP(32, 2)
    model.layers[0].kernel[...] *= 3
    model.layers[1].kernel[...] *= 0
    strange, zero = spp.propagate(model, noise(4, 32), level="layer").kernels
    assert strange.looks_like == ()
    assert "no initialization that is known" in str(strange)
    assert zero.zero
    assert "all zero" in str(zero)


def test_profiles_are_written_with_their_kernels(tmp_path):
    profile = spp.propagate(MLP(8, 2), noise(4, 8), level="layer")
    content = json.loads(profile.to_json(tmp_path / "profile.json"))
    assert content["level"] == "layer"
    assert [kernel["path"] for kernel in content["kernels"]] == ["layers/0/kernel", "layers/1/kernel"]
