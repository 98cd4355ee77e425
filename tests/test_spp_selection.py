"""Which blocks are taken where `where` is left out, on small models of the shapes that public ones have."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from nfjax import spp
from nfjax.spp import _measuring, _selection
from nfjax.spp._residuals import in_one_line

WIDTH = 4
X = jnp.ones((2, 3, WIDTH))


def variables(model):
    """All of them zero: only shapes count here."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(model.init, rngs, X))


class BlocksError(Exception):
    """Ends a measurement where the blocks are known: nothing is compiled."""


@pytest.fixture
def blocks(monkeypatch):
    def choose(jaxpr, calls, *rest):
        raise BlocksError([calls[i].path for i in _selection.select(jaxpr, calls, *rest)])

    monkeypatch.setattr(_measuring, "select", choose)

    def blocks(model, **kwargs):
        if isinstance(model, linen.Module):
            kwargs["variables"] = variables(model)
        with pytest.raises(BlocksError) as chosen:
            spp.propagate(model, X, **kwargs)
        return chosen.value.args[0]

    return blocks


# ---------------------------------------------------------------- Linen


class Mlp(linen.Module):
    """A helper with parts of its own, and an activation that adds two functions of its input."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(WIDTH)(linen.gelu(linen.Dense(WIDTH)(x)))


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = linen.Dense(WIDTH)(x), linen.Dense(WIDTH)(memory), linen.Dense(WIDTH)(memory)
        q = q * jnp.cos(1.0) + jnp.roll(q, 1, -1) * jnp.sin(1.0)  # as rotary embeddings do
        return linen.Dense(WIDTH)(jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v)


class Mixer(linen.Module):
    """The same helper twice in each block."""

    @linen.compact
    def __call__(self, x):
        x = x + Mlp()(linen.LayerNorm()(x))
        return x + Mlp()(linen.LayerNorm()(x))


class EncoderLayer(linen.Module):
    """Normalized after the addition, with dropout."""

    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm()(x + linen.Dropout(0.5, deterministic=False)(Attention()(x)))
        return linen.LayerNorm()(x + Mlp()(x))


class DecoderLayer(linen.Module):
    @linen.compact
    def __call__(self, x, memory):
        x = x + Attention()(linen.LayerNorm()(x))
        x = x + Attention()(linen.LayerNorm()(x), memory)
        return x + Mlp()(linen.LayerNorm()(x)), {"memory": memory}


class Add(linen.Module):
    """A helper that is handed both terms."""

    @linen.compact
    def __call__(self, branch, x):
        return linen.LayerNorm()(x + linen.Dense(WIDTH)(branch))


class AttentionPart(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + Attention()(linen.LayerNorm()(x))


class MlpPart(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + Mlp()(linen.LayerNorm()(x))


class Composed(linen.Module):
    """A block whose two additions are made by its parts."""

    @linen.compact
    def __call__(self, x):
        return MlpPart()(AttentionPart()(x))


class HandedOver(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = Add()(Attention()(x), x)
        return Add()(linen.gelu(linen.Dense(WIDTH)(x)), x)


class Residual(linen.Module):
    """A helper that is handed the branch."""

    @linen.compact
    def __call__(self, x, branch):
        return x + branch(x)


class ByHelper(linen.Module):
    @linen.compact
    def __call__(self, x):
        return Residual()(Residual()(x, Attention()), Mlp())


class Normalized(linen.Module):
    """Convolution, norm, activation: a helper."""

    stride: int = 1

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH, (3,), self.stride)(x)
        return linen.gelu(linen.BatchNorm(use_running_average=False)(x))


class Basic(linen.Module):
    """Addition before the activation; some shortcuts are projections, with batch norm in training mode."""

    project: bool = False

    @linen.compact
    def __call__(self, x):
        y = Normalized()(Normalized()(x))
        if self.project:
            x = linen.BatchNorm(use_running_average=False)(linen.Conv(WIDTH, (1,))(x))
        return linen.relu(x + y)


class First(linen.Module):
    """The first block of a stage, another class, always with a projection."""

    @linen.compact
    def __call__(self, x):
        return linen.relu(linen.Conv(WIDTH, (1,))(x) + Normalized()(Normalized()(x)))


class Stage(linen.Module):
    blocks: tuple = (Basic, Basic)

    @linen.compact
    def __call__(self, x):
        for block in self.blocks:
            x = block()(x)
        return x


class LowRank(linen.Module):
    """A dense layer with a low-rank update."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(WIDTH)(x) + linen.Dense(WIDTH)(linen.Dense(1)(x))


class Adapted(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + LowRank()(linen.gelu(LowRank()(x)))


class Stack(linen.Module):
    """Runs modules of these classes one after another, as an encoder does, and something with a skip at the end that is
    called once.
    """

    layers: tuple

    @linen.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer()(x)
        return MlpPart(name="head")(linen.Dense(WIDTH)(linen.Dense(WIDTH)(x)))


class EncoderDecoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        memory = x
        for _ in range(2):
            memory = EncoderLayer()(memory)
        for _ in range(2):
            x, _ = DecoderLayer()(x, memory)
        return x


class Looped(linen.Module):
    """`scan` over rematerialized layers."""

    @linen.compact
    def __call__(self, x):
        layer = linen.remat(AttentionPart, prevent_cse=False)
        layers = linen.scan(
            lambda layer, x, _: (layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(layer(name="layers"), x, None)[0]


def two_stages(*blocks):
    return Stack((lambda: Stage(blocks),) * 2)


def names(kind, *numbers):
    return [f"{kind}_{number}" for number in numbers]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Stack((Mixer, Mixer)), names("Mixer", 0, 1)),
        (Stack((EncoderLayer, EncoderLayer)), names("EncoderLayer", 0, 1)),
        (Stack((Composed, Composed)), names("Composed", 0, 1)),
        (Stack((HandedOver, HandedOver)), names("HandedOver", 0, 1)),
        (Stack((ByHelper, ByHelper)), names("ByHelper", 0, 1)),
        (Stack((Adapted, Adapted)), names("Adapted", 0, 1)),
        (Stack((linen.remat(AttentionPart),) * 2), names("CheckpointAttentionPart", 0, 1)),
        (Looped(), ["layers"]),
        (EncoderDecoder(), names("EncoderLayer", 0, 1) + names("DecoderLayer", 0, 1)),
        (Stack((First, Basic, First, Basic)), ["First_0", "Basic_0", "First_1", "Basic_1"]),
        (two_stages(Basic, Basic), [f"Stage_{i}/Basic_{j}" for i in range(2) for j in range(2)]),
        (two_stages(Basic), [f"Stage_{i}/Basic_0" for i in range(2)]),
        (two_stages(First, Basic), [f"Stage_{i}/{kind}_0" for i in range(2) for kind in ("First", "Basic")]),
        (two_stages(Composed, Composed), [f"Stage_{i}/Composed_{j}" for i in range(2) for j in range(2)]),
        # All shortcuts are projections, as in the paper's ConvShort.
        (Stack((First,) * 3), names("First", 0, 1, 2)),
        # Nothing residual: the repeated module with parts of its own.
        (Stack((Mlp, Mlp)), [*names("Mlp", 0, 1), "head/Mlp_0"]),
    ],
    ids=lambda value: None if isinstance(value, linen.Module) else "+".join(value)[:40],
)
def test_the_blocks_of_a_linen_model(blocks, model, expected):
    assert blocks(model, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]) == expected


def test_recurrent_layers_are_no_residual_blocks(blocks):
    class Rnn(linen.Module):
        cell: type

        @linen.compact
        def __call__(self, x):
            for _ in range(2):
                x = linen.RNN(self.cell(WIDTH))(x)
            return x

    for cell in (linen.LSTMCell, linen.OptimizedLSTMCell, linen.GRUCell):
        assert blocks(Rnn(cell)) == ["RNN_0", "RNN_1"]


# ---------------------------------------------------------------- NNX


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.layer = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.where(x.sum() > 0, 1.0, 0.5) * self.layer(self.norm(x))


class Pooled(Layer):
    """No matrix: the branch averages neighbours."""

    def __call__(self, x):
        with jax.numpy_dtype_promotion("standard"):  # the division by 3
            return x + nnx.avg_pool(self.norm(x), (3,), padding="SAME") - x


class Bare(nnx.Module):
    """Written with parameters alone."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(rngs.params.normal((WIDTH, WIDTH)))

    def __call__(self, x):
        return x + jax.nn.relu(x @ self.kernel[...])


class Gated(nnx.Module):
    """Parameters alone before a norm: the sum is not the norm's."""

    def __init__(self, rngs):
        self.inward, self.outward = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.kernel, self.norm = nnx.Param(jnp.ones((WIDTH, WIDTH))), nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        y = jax.nn.silu(self.inward(x))
        return x + self.outward(self.norm(y @ self.kernel[...] + y))


class Chain(nnx.Module):
    def __init__(self, *classes):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([cls(rngs) for cls in classes])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Shared(Chain):
    """One layer three times."""

    def __call__(self, x):
        return super().__call__(super().__call__(super().__call__(x)))


def sequential(rngs):
    return nnx.Sequential(Layer(rngs), Pooled(rngs))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Chain(Layer, Layer), ["layers/0", "layers/1"]),
        (Chain(Pooled, Pooled), ["layers/0", "layers/1"]),
        (Chain(Bare, Bare, Bare), ["layers/0", "layers/1", "layers/2"]),
        (Chain(Gated, Gated), ["layers/0", "layers/1"]),
        (Shared(Layer), ["layers/0"] * 3),
        (Chain(sequential, sequential), [f"layers/{i}/layers/{j}" for i in range(2) for j in range(2)]),
    ],
)
def test_the_blocks_of_an_nnx_model(blocks, model, expected):
    assert blocks(model) == expected


# ---------------------------------------------------------------- refusals


class Two(linen.Module):
    """A network with two heads, none of whose layers repeats in the sense of a block."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH, (3,))(linen.Conv(WIDTH, (3,))(x))
        return linen.Dense(1)(x), linen.Dense(1)(x), linen.Dense(1)(x)


def given(error, opening="such as where="):
    """The value of `where=` that a message offers."""
    text = str(error.value)
    return eval(text[text.index(opening) + len(opening) :].split(";")[0].split(", did")[0])


def test_a_refusal_offers_what_works(blocks):
    with pytest.raises(ValueError, match=r'nothing that is called more than once.* such as where="Conv"; the') as error:
        spp.propagate(Two(), X, variables=variables(Two()))
    assert sorted(blocks(Two(), where=given(error))) == ["Conv_0", "Conv_1"]
    model = Stack((Mlp, Mlp, lambda: Stage((Normalized, Normalized)), lambda: Stage((Normalized, Normalized))))
    with pytest.raises(ValueError, match=r"candidates are Mlp \(3 calls\), Stage \(2 calls\), Normalized \(4") as error:
        spp.propagate(model, X, variables=variables(model), mutable=["batch_stats"])
    assert blocks(model, mutable=["batch_stats"], where=given(error)) == ["Stage_0", "Stage_1"]


def test_names_of_blocks_that_are_none(blocks):
    with pytest.raises(ValueError, match=r"'layers/1' is the path of a Layer: .* path == 'layers/1'; .*=\"Layer\""):
        spp.propagate(Chain(Layer, Layer), X, where="layers/1")
    with pytest.raises(ValueError, match=r"where='layers/0\[2\]' is the path of a Layer"):
        spp.propagate(Shared(Layer), X, where="layers/0[2]")
    with pytest.raises(ValueError, match=r"where='Layr' selects no module .*did you mean where=\"Layer\""):
        spp.propagate(Chain(Layer, Layer), X, where=["Linear", "Layr"])
    assert blocks(Chain(Layer, Pooled), where=("LayerNorm", nnx.BatchNorm)) == ["layers/0/norm", "layers/1/norm"]


def test_names_of_branches_that_are_none():
    for branch in ("brnch", nnx.BatchNorm, ("a", "b")):
        with pytest.raises(ValueError, match=r"means no module inside .* are 'norm' \(LayerNorm\), 'layer' \(Linear\)"):
            spp.propagate(Chain(Layer, Layer), X, branch=branch)
    with pytest.raises(ValueError, match=r"branch='brnch' means no module inside .* in the blocks are no modules"):
        spp.propagate(Chain(Bare, Bare), X, branch="brnch")


def test_whether_calls_lie_on_one_line(monkeypatch):
    found = {}

    def look(jaxpr, calls, reached, where):
        for kind in ("Conv", "Dense"):
            found[kind] = in_one_line(jaxpr, [i for i, call in enumerate(calls) if call.path.startswith(kind)])
        raise BlocksError

    monkeypatch.setattr(_measuring, "select", look)
    with pytest.raises(BlocksError):
        spp.propagate(Two(), X, variables=variables(Two()))
    assert found == {"Conv": True, "Dense": False}
