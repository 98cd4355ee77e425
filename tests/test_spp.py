"""Signal propagation: the numbers against explicit derivatives, any Flax model, nothing left behind, clear errors."""

import copy
import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError

from nfjax import _flax, compilation, resnet, spp
from nfjax.spp import _measuring, _monitor, _statistics, _tracing
from tests.conftest import TINY

RULES = ("identity", "idshort", "learnscalar", "convshort", "conv")


def images(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def var(x):
    return np.asarray(x, np.float64).var()


@pytest.fixture
def tiny(monkeypatch):

    def make(seed=0, residual="idshort", norm=None, init="he_fan_out", **settings):
        settings = {"width": 4, "image_size": 8} | settings
        return resnet.PreActResNet(TINY, residual, norm, init, rngs=nnx.Rngs(seed), **settings)

    return make


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(width, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.second(jax.nn.relu(self.first(x)))


class Heir(Block):
    """Inherits its `__call__`."""


class Model(nnx.Module):
    def __init__(self, blocks, width=8, seed=0):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([cls(width, rngs=rngs) for cls in blocks])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("residual", "norm"), [*((rule, None) for rule in RULES), ("identity", "batch")])
def test_equal_to_an_explicit_vjp_at_every_block(tiny, residual, norm):
    model, x = tiny(residual=residual, norm=norm), images(4, 8, 8, 3)
    profile = spp.propagate(model, x, seed=3)

    def tail(x, start):
        for block in nnx.clone(model).blocks[start:]:
            x = block(x)
        return x

    @jax.jit
    def by_hand(x):
        """(output, gradient, output of the branch) of each block."""
        own = nnx.clone(model)  # batch norm writes its statistics
        outputs, branches = [own.stem(x)], []
        for block in own.blocks:
            branches.append(block.branch(block.activation(outputs[-1])))
            outputs.append(block(outputs[-1]))
        noise = jax.random.normal(_monitor.stream(3, _monitor.COTANGENT), outputs[-1].shape)
        pulls = [jax.vjp(lambda y, i=i: tail(y, i), y)[1] for i, y in enumerate(outputs[1:], 1)]
        return list(zip(outputs[1:], [pull(noise)[0] for pull in pulls], branches, strict=True))

    for i, (y, gradient, branch) in enumerate(by_hand(x)):
        np.testing.assert_allclose(profile.backward_var[i], var(gradient), rtol=2e-5)
        values = np.asarray(y, np.float64)
        np.testing.assert_allclose(profile.forward_var[i], values.var(), rtol=2e-5)
        np.testing.assert_allclose(profile.channel_sq_mean[i], (values.mean((0, 1, 2)) ** 2).mean(), rtol=2e-5)
        np.testing.assert_allclose(profile.channel_var[i], values.var((0, 1, 2)).mean(), rtol=2e-5)
        branch = np.asarray(branch, np.float64)
        np.testing.assert_allclose(profile.branch_var[i], branch.var((0, 1, 2)).mean(), rtol=2e-5)
        assert profile.shapes[i] == y.shape


def test_gradient_of_a_loss(tiny):
    model, x = tiny(), images(4, 8, 8, 3)
    profile = spp.propagate(model, x, loss=lambda logits: jnp.square(logits).sum())

    def loss(y, start):
        for block in model.blocks[start:]:
            y = block(y)
        features = model.activation(y).mean(axis=(1, 2))
        return jnp.square(model.classifier(features)).sum()

    @jax.jit
    def gradients(x):
        y, found = model.stem(x), []
        for i, block in enumerate(model.blocks, 1):
            y = block(y)
            found.append(jax.grad(lambda y, i=i: loss(y, i))(y))
        return found

    for expected, gradient in zip(profile.backward_var, gradients(x), strict=True):
        np.testing.assert_allclose(expected, var(gradient), rtol=2e-5)


def test_cross_entropy_on_random_labels_agrees_in_shape_with_gaussian_noise(tiny):
    model, x = tiny(width=16), images(32, 8, 8, 3)
    ratios = []
    for loss in (None, "cross_entropy"):
        profile = spp.propagate(model, x, loss=loss)
        ratios.append(profile.backward_var / profile.backward_var[-1])
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=0.5)
    other = spp.propagate(model, x, loss="cross_entropy", seed=1)
    assert other.backward_var[0] != profile.backward_var[0]  # other labels


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_variances_beyond_the_range_of_float32(scale):
    x = images(64, 5) * scale + 3 * scale
    result = _statistics.on_host(_statistics.moments(x))
    values = np.asarray(x, np.float64)
    np.testing.assert_allclose(result.var, values.var(), rtol=1e-5)
    np.testing.assert_allclose(result.channel_var, values.var(0).mean(), rtol=1e-5)
    np.testing.assert_allclose(result.channel_sq_mean, (values.mean(0) ** 2).mean(), rtol=1e-5)


def test_a_mean_far_above_the_spread_between_channels():
    x = 1e4 + jnp.arange(6.0)[None] + images(4096, 6)
    values = np.asarray(x, np.float64)
    result = _statistics.on_host(_statistics.moments(x))
    np.testing.assert_allclose(result.var, values.var(), rtol=1e-2)


def test_the_cotangent_is_not_the_users_noise():
    """An input drawn from the same seed, of the same shape as the last block's output."""

    class Relu(nnx.Module):
        def __call__(self, x):
            return 2 * jax.nn.relu(x)

    profile = spp.propagate(nnx.Sequential(*(Relu() for _ in range(2))), images(64, 64), where=Relu)
    assert profile.backward_var[0] == pytest.approx(2.0, rel=0.1)


def test_constant_and_zero_tensors_have_no_variance():
    for x in (jnp.zeros((4, 3)), jnp.full((4, 3), 7.0)):
        assert _statistics.on_host(_statistics.moments(x)).var == pytest.approx(0.0, abs=1e-12)


def test_low_precision_is_measured_as_it_is(tiny):
    x = images(4, 8, 8, 3)
    full, half = (spp.propagate(tiny(dtype=dtype, width=16), x) for dtype in (jnp.float32, jnp.bfloat16))
    assert set(full.dtypes) == {"float32"}
    assert set(half.dtypes) == {"bfloat16"}
    np.testing.assert_allclose(half.forward_var, full.forward_var, rtol=0.05)
    np.testing.assert_allclose(half.backward_var, full.backward_var, rtol=0.1)


def test_float16_overflow_is_reported():
    class Doubling(nnx.Module):
        def __init__(self):
            self.factor = nnx.Param(jnp.float16(50.0))

        def __call__(self, x):
            return self.factor[...] * x

    model = nnx.Sequential(*(Doubling() for _ in range(6)))
    profile = spp.propagate(model, images(8, 4).astype(jnp.float16), where=Doubling)
    finite = np.isfinite(profile.forward_var)
    assert finite.tolist() == sorted(finite.tolist(), reverse=True)
    assert 1 < finite.sum() < 6
    diagnosis = profile.diagnose()
    assert diagnosis.forward.verdict == "non-finite"
    assert diagnosis.forward.block == profile.paths[int(finite.sum())]
    assert "non-finite" in str(diagnosis)


# ---------------------------------------------------------------- any Flax model


class LinenBlock(linen.Module):
    width: int = 8

    @linen.compact
    def __call__(self, x, train=False):
        y = linen.Dense(self.width, name="first")(x)
        y = linen.Dropout(0.5, deterministic=not train)(jax.nn.relu(y))
        return x + linen.Dense(self.width, name="second")(y)


class ScanBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return LinenBlock(name="inner")(x), None


class LinenModel(linen.Module):
    depth: int = 12
    mode: str = "plain"

    @linen.compact
    def __call__(self, x, train=False):
        if self.mode.endswith("scan"):
            body = linen.remat(ScanBlock) if self.mode == "remat scan" else ScanBlock
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
            x, _ = linen.scan(body, length=self.depth, **axes)(name="layers")(x, None)
        elif self.mode == "shared":
            block = LinenBlock(name="block")
            for _ in range(self.depth):
                x = block(x, train)
        else:
            wrap = {"plain": lambda cls: cls, "remat": lambda cls: linen.remat(cls, static_argnums=2)}[self.mode]
            for i in range(self.depth):
                x = wrap(LinenBlock)(name=f"block{i}")(x, train)
        return {"logits": linen.Dense(3, name="head")(x), "aux": None}


def test_linen_and_nnx_agree():
    """The same network twice, with equal weights; and twelve blocks in execution order, not in that of their names."""
    model, x = Model([Block] * 12), images(16, 8)

    def dense(layer):
        return {"kernel": layer.kernel[...], "bias": layer.bias[...]}

    params = {f"block{i}": {"first": dense(b.first), "second": dense(b.second)} for i, b in enumerate(model.blocks)}
    variables = {"params": params | {"head": dense(model.head)}}
    ours = spp.propagate(model, x)
    linens = spp.propagate(LinenModel(), x, variables=variables)
    assert ours.paths == tuple(f"blocks/{i}" for i in range(12))
    assert linens.paths == tuple(f"block{i}" for i in range(12))
    for name in ("forward_var", "backward_var", "channel_sq_mean", "channel_var"):
        np.testing.assert_allclose(getattr(ours, name), getattr(linens, name), rtol=1e-5)


@pytest.mark.parametrize("mode", ["remat", "scan", "remat scan"])
def test_linen_transformations_change_nothing(mode):
    plain, x = LinenModel(5), images(16, 8)
    params = plain.init(jax.random.key(0), x)["params"]
    expected = spp.propagate(plain, x, variables={"params": params})
    if mode.endswith("scan"):
        blocks = [params[f"block{i}"] for i in range(5)]
        params = {"head": params["head"], "layers": {"inner": jax.tree.map(lambda *p: jnp.stack(p), *blocks)}}
    profile = spp.propagate(LinenModel(5, mode), x, variables={"params": params}, where=LinenBlock)
    np.testing.assert_allclose(profile.forward_var, expected.forward_var, rtol=1e-5)
    np.testing.assert_allclose(profile.backward_var, expected.backward_var, rtol=1e-5)
    if mode.endswith("scan"):
        assert profile.paths == tuple(f"layers/inner[{i}]" for i in range(5))


def test_a_linen_module_shared_by_several_places():
    profile = spp.propagate(LinenModel(3, "shared"), images(16, 8))
    assert profile.paths == ("block[0]", "block[1]", "block[2]")


def test_linen_dropout_variables_and_bound_modules():
    model, x = LinenModel(3), images(16, 8)
    variables = model.init(jax.random.key(0), x)
    still = spp.propagate(model, x, variables=variables)
    np.testing.assert_array_equal(spp.propagate(model.bind(variables), x).forward_var, still.forward_var)
    np.testing.assert_array_equal(spp.propagate(model, x).forward_var, still.forward_var)  # drawn from seed 0
    dropped = spp.propagate(model, x, variables=variables, train=True)
    assert dropped.forward_var[0] > still.forward_var[0]
    rngs = [{"dropout": jax.random.key(i)} for i in range(2)]
    a, b = (spp.propagate(model, x, variables=variables, rngs=r, train=True) for r in rngs)
    assert a.forward_var[0] != b.forward_var[0]


@pytest.mark.parametrize("training", [True, False])
def test_linen_batch_norm(training):
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return x + linen.Dense(8)(linen.BatchNorm(use_running_average=not train)(x))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            for _ in range(3):
                x = Normed()(x, train)
            return x

    x = images(16, 8) * 9
    variables = Net().init(jax.random.key(0), x)
    profile = spp.propagate(Net(), x, variables=variables, train=training)
    expected, _ = Net().apply(variables, x, train=training, mutable=["batch_stats"])
    np.testing.assert_allclose(profile.forward_var[-1], var(expected), rtol=1e-5)
    assert variables["batch_stats"]["Normed_0"]["BatchNorm_0"]["mean"].tolist() == [0.0] * 8


def test_linen_is_applied_as_the_user_would():
    """Collections become mutable only where the model writes them; missing parameters are missed."""

    class Asking(linen.Module):
        @linen.compact
        def __call__(self, x):
            scale = 5.0 if self.is_mutable_collection("batch_stats") else 1.0
            return x + scale * linen.Dense(8)(x)

    model, x = linen.Sequential([Asking() for _ in range(2)]), images(16, 8)
    variables = model.init(jax.random.key(0), x)
    profile = spp.propagate(model, x, variables=variables)
    np.testing.assert_allclose(profile.forward_var[-1], var(model.apply(variables, x)), rtol=1e-5)
    written = spp.propagate(model, x, variables=variables, mutable=["batch_stats"])
    assert written.forward_var[-1] > 2 * profile.forward_var[-1]
    with pytest.raises((ScopeParamNotFoundError, ScopeCollectionNotFound)):
        spp.propagate(model, x, variables=variables["params"])
    assert len(spp.propagate(LinenModel(3), x, rngs={"dropout": jax.random.key(1)}, train=True)) == 3


@pytest.mark.parametrize("how", ["remat", "scan", "jit"])
def test_nnx_transformations(how):
    rngs = nnx.Rngs(0)
    blocks = [Block(8, rngs=rngs) for _ in range(4)]
    x = images(16, 8)

    class Plain(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List(blocks)

        def __call__(self, x):
            for block in self.blocks:
                call = {"remat": nnx.remat, "jit": nnx.jit, "scan": lambda f: f}[how](lambda block, x: block(x))
                x = call(block, x)
            return x

    class Scanned(nnx.Module):
        def __init__(self):
            states = [nnx.split(block)[1] for block in blocks]
            self.layers = nnx.merge(nnx.split(blocks[0])[0], jax.tree.map(lambda *s: jnp.stack(s), *states))

        def __call__(self, x):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    expected = [var(x := block(x)) for block in blocks]
    plain = spp.propagate(nnx.Sequential(*blocks), images(16, 8))
    for _ in range(2):  # the second time with whatever JAX has cached of the first
        profile = spp.propagate(Scanned() if how == "scan" else Plain(), images(16, 8), where=Block)
        np.testing.assert_allclose(profile.forward_var, expected, rtol=1e-5)
        np.testing.assert_allclose(profile.backward_var, plain.backward_var, rtol=1e-5)
    expected_paths = [f"layers[{i}]" if how == "scan" else f"blocks/{i}" for i in range(4)]
    assert list(profile.paths) == expected_paths


def test_a_block_that_inherits_its_call_is_seen():
    profile = spp.propagate(Model([Block, Heir, Block, Heir]), images(16, 8), where=Heir)
    assert profile.paths == ("blocks/1", "blocks/3")
    assert len(spp.propagate(Model([Block, Heir]), images(16, 8), where=Block)) == 2
    assert len(spp.propagate(Model([Block, Heir]), images(16, 8), where="Heir")) == 1


def test_blocks_that_return_several_arrays():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, count, x):
            return {"a_count": count + 1, "x": self.layer(x)}

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Pair(nnx.Rngs(i)) for i in range(3)])

        def __call__(self, x):
            count = jnp.int32(0)
            for block in self.blocks:
                count, x = block(count, x).values()
            return count, x

    profile = spp.propagate(Net(), images(16, 8), where=Pair)
    assert len(profile) == 3
    assert profile.shapes[0] == (16, 8)
    np.testing.assert_allclose(profile.forward_var[-1], var(Net()(images(16, 8))[1]), rtol=1e-5)


def test_selection_without_a_choice(tiny):
    """Our networks' blocks; the one repeated composite class of others, not what is part of it."""
    for norm in (None, "batch"):
        assert spp.propagate(tiny(norm=norm), images(4, 8, 8, 3)).paths == tuple(f"blocks/{i}" for i in range(4))
    assert len(spp.propagate(Model([Block] * 3), images(16, 8))) == 3


class Single(nnx.Module):
    """A block with one part only."""

    def __init__(self, width, *, rngs):
        self.layer = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return x + jax.nn.relu(self.layer(x))


def test_blocks_with_one_part_and_one_block_in_a_loop():
    assert len(spp.propagate(Model([Single] * 3), images(16, 8))) == 3

    class Looped(nnx.Module):
        def __init__(self):
            self.block = Block(8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return jax.lax.fori_loop(0, 3, lambda i, x: self.block(x), x)

    assert spp.propagate(Looped(), images(16, 8)).paths == ("block[0]", "block[1]", "block[2]")


def test_modules_that_look_at_their_own_class():
    class Strict(Block):
        def __call__(self, x):
            assert type(self) is Strict
            return super(type(self), self).__call__(x)

        def __setattr__(self, name, value):
            if name not in ("first", "second"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    assert len(spp.propagate(Model([Strict] * 2), images(16, 8), where=Strict)) == 2
    assert Strict.__subclasses__() == []


def test_modules_outside_the_models_attributes():
    held = Block(8, rngs=nnx.Rngs(1))
    model = nnx.Sequential(Block(8, rngs=nnx.Rngs(0)), lambda x: held(x), Block(8, rngs=nnx.Rngs(2)))
    assert spp.propagate(model, images(16, 8)).paths == ("layers/0", "(outside)/Block", "layers/2")


def test_a_shared_branch_belongs_to_each_block(tiny):
    model = tiny(residual="convshort", image_size=8)
    model.blocks[1].branch = model.blocks[0].branch

    class Two(nnx.Module):
        def __init__(self, blocks):
            self.blocks = nnx.List(blocks)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    first = model.blocks[0]
    twice = Two([first, nnx.clone(first)])
    twice.blocks[1].branch = first.branch
    x = images(4, 8, 8, 4)
    measured = spp.propagate(twice, x, where=resnet.BasicBlock).branch_var
    for block, value in zip(twice.blocks, measured, strict=True):
        branch = np.asarray(first.branch(block.activation(x)), np.float64)
        np.testing.assert_allclose(value, branch.var((0, 1, 2)).mean(), rtol=1e-5)
        x = block(x)


def test_outputs_and_parameters_of_any_kind():
    class Odd(Model):
        def __init__(self, blocks):
            super().__init__(blocks)
            self.scale = nnx.Param(1.0)

        def __call__(self, x):
            return {"y": super().__call__(x) * self.scale[...], "name": "odd", "count": 3}

    profile = spp.propagate_seeds(lambda seed: Odd([Block] * 2), images(16, 8), seeds=2)
    assert profile.samples["forward_var"].shape == (2, 2)
    scored = spp.propagate(Odd([Block] * 2), images(16, 8), loss=lambda out: out["y"].mean())
    assert len(scored) == 2


def test_host_callbacks_are_not_mixed_up():
    class Calling(Model):
        def __init__(self, factor):
            super().__init__([Block] * 2)
            self.factor = factor

        def __call__(self, x):
            factor = np.float32(self.factor)
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return super().__call__(jax.pure_callback(lambda v: np.asarray(v) * factor, shape, x))

    small, large = (spp.propagate(Calling(factor), images(16, 8)).forward_var[0] for factor in (1, 100))
    assert large > 100 * small


class Stage(nnx.Module):
    def __init__(self, width, *, rngs):
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_stages_are_no_blocks_and_an_unclear_choice_lists_the_candidates():
    paths = spp.propagate(Model([Stage, Stage]), images(16, 8)).paths
    assert paths == tuple(f"blocks/{i}/blocks/{j}" for i in range(2) for j in range(3))
    with pytest.raises(ValueError, match=r"Block \(1\), Linear \(3\)"):
        spp.propagate(Model([Block]), images(16, 8))
    assert len(spp.propagate(Model([Stage, Stage]), images(16, 8), where=(Stage, Block))) == 8


def test_a_predicate_sees_paths_and_the_users_own_modules():
    model, seen = Model([Block] * 3), []

    def where(path, module):
        seen.append((path, module))
        return path.endswith("first")

    profile = spp.propagate(model, images(16, 8), where=where, branch=lambda path, module: False)
    assert profile.paths == tuple(f"blocks/{i}/first" for i in range(3))
    assert dict(seen)["blocks/1"] is model.blocks[1]
    assert np.isnan(profile.branch_var).all()


def test_a_branch_by_name_or_class():
    model, x = Model([Block] * 3), images(16, 8)
    by_name = spp.propagate(model, x, branch="second")
    expected = model.blocks[0].second(jax.nn.relu(model.blocks[0].first(x)))
    np.testing.assert_allclose(by_name.branch_var[0], np.asarray(expected, np.float64).var(0).mean(), rtol=1e-5)


# ---------------------------------------------------------------- nothing left behind


def everything(model):
    """All attributes of all modules, by identity."""
    return {
        (path, name): id(value)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        for name, value in vars(node).items()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    class Fragile(Block):
        def __call__(self, x):
            if self.broken:
                raise RuntimeError("inside the model")
            return super().__call__(x)

    model, x = Model([Block, Fragile, Fragile]), images(16, 8)
    model.blocks[1].broken, model.blocks[2].broken = False, fails
    attributes, classes = everything(model), [type(block) for block in model.blocks]
    calls = [Block.__call__, Fragile.__call__, Model.__call__]
    kernels = [np.array(block.first.kernel[...]) for block in model.blocks]
    before = None if fails else model(x)
    if fails:
        with pytest.raises(RuntimeError, match="inside the model") as caught:
            spp.propagate(model, x, where=Block)
        assert "while nfjax.spp traced it" in " ".join(caught.value.__notes__)
        assert _tracing._recorder.get() is None
    else:
        spp.propagate(model, x, where=Block)
        np.testing.assert_array_equal(model(x), before)
    assert everything(model) == attributes
    assert [type(block) for block in model.blocks] == classes
    assert [Block.__call__, Fragile.__call__, Model.__call__] == calls
    for block, kernel in zip(model.blocks, kernels, strict=True):
        np.testing.assert_array_equal(block.first.kernel[...], kernel)


def test_batch_statistics_and_random_streams_stay(tiny):
    class Dropping(Block):
        def __init__(self, width, *, rngs):
            super().__init__(width, rngs=rngs)
            self.norm = nnx.BatchNorm(width, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return super().__call__(self.dropout(self.norm(x)))

    model = Model([Dropping] * 2)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    spp.propagate(model, images(16, 8), where=Dropping)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_tagged_trace_is_never_served_to_others():
    @jax.jit
    def shared(x, kernel):
        return jnp.tanh(x @ kernel)

    class Jitted(nnx.Module):
        def __init__(self, rngs):
            self.inner = Block(8, rngs=rngs)

        def __call__(self, x):
            return shared(self.inner(x), self.inner.first.kernel[...])

    model = nnx.Sequential(Jitted(nnx.Rngs(0)), Jitted(nnx.Rngs(1)))
    spp.propagate(model, images(16, 8), where=Jitted)
    assert "nfjax" not in str(jax.make_jaxpr(model)(images(16, 8)))


def test_nothing_per_block_is_kept_but_statistics():
    """On linear blocks, whose gradient needs no activation, memory does not grow with depth."""

    class Linear(nnx.Module):
        def __init__(self, width, *, rngs):
            self.layer = nnx.Linear(width, width, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    def temporary(depth):
        model = _flax.runnable(Model([Linear] * depth, 64), [images(4096, 64)], {}, None, None, None, jax.random.key(0))
        measurement = _measuring.prepare(model, _measuring.Choice(where=Linear))
        return measurement.program.memory_analysis().temp_size_in_bytes

    activation = 4096 * 64 * 4
    # Against 40 if every gradient were kept; shallower, XLA's schedule decides how many are alive at once.
    assert temporary(64) - temporary(24) < 2 * activation


# ---------------------------------------------------------------- several seeds


def test_seeds_do_not_compile_again_and_neither_does_another_init(tiny, monkeypatch):
    monkeypatch.setattr(compilation, "_programs", type(compilation._programs)())
    x = spp.noise((4, 8, 8, 3))
    profile = spp.propagate_seeds(tiny, x, seeds=4)
    assert len(compilation._programs) == 1
    assert profile.samples["forward_var"].shape == (4, 4)
    assert len(set(profile.samples["forward_var"][:, 0].tolist())) == 4
    np.testing.assert_allclose(profile.forward_var, np.median(profile.samples["forward_var"], axis=0))
    assert (profile.quantile("backward_var", 0.0) <= profile.backward_var).all()
    spp.propagate_seeds(lambda seed: tiny(seed, init="brock"), x, seeds=[7, 8])
    spp.propagate(tiny(9), images(4, 8, 8, 3))
    assert len(compilation._programs) == 1
    spp.propagate_seeds(lambda seed: tiny(seed, "convshort"), x, seeds=1)
    assert len(compilation._programs) == 2


def test_a_seed_equals_a_single_run(tiny):
    x = images(4, 8, 8, 3)
    together = spp.propagate_seeds(tiny, x, seeds=(3, 5))
    alone = spp.propagate(tiny(5), x, seed=5)
    for name, values in together.samples.items():
        np.testing.assert_array_equal(values[1], alone.samples[name][0])
    assert together.seeds == (3, 5)


def test_seeds_of_linen_models():
    profile = spp.propagate_seeds(lambda seed: LinenModel(3), spp.noise((16, 8)), seeds=3)
    assert len(set(profile.samples["forward_var"][:, 0].tolist())) == 3
    model = LinenModel(3)
    drawn = spp.propagate_seeds(lambda seed: (model, model.init(jax.random.key(seed), images(1, 8))), images(16, 8))
    assert drawn.samples["forward_var"].shape == (5, 3)


def test_another_network_for_another_seed_is_refused(tiny):
    with pytest.raises(ValueError, match=r"make\(1\) returned another network than make\(0\)"):
        spp.propagate_seeds(lambda seed: tiny(seed, RULES[seed]), images(4, 8, 8, 3), seeds=2)
    with pytest.raises(ValueError, match="seeds is empty"):
        spp.propagate_seeds(tiny, images(4, 8, 8, 3), seeds=0)


# ---------------------------------------------------------------- bad input


class Stopped(Block):
    def __call__(self, x):
        return jax.lax.stop_gradient(super().__call__(x))


def test_no_block_selected():
    with pytest.raises(ValueError, match=r"where=LayerNorm selects no module .*it calls Block \(2\), Linear \(5\)"):
        spp.propagate(Model([Block] * 2), images(16, 8), where=nnx.LayerNorm)
    with pytest.raises(ValueError, match="where='Blok' selects no module"):
        spp.propagate(Model([Block] * 2), images(16, 8), where="Blok")
    with pytest.raises(TypeError, match="where=3"):
        spp.propagate(Model([Block] * 2), images(16, 8), where=3)


def test_a_predicate_that_raises():
    with pytest.raises(ValueError, match="where= raised ZeroDivisionError on Linear 'blocks/0/first'"):
        spp.propagate(Model([Block]), images(16, 8), where=lambda path, module: path.endswith("first") and 1 / 0)


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_a_block_that_is_not_differentiable(loss):
    with pytest.raises(ValueError, match="no gradient reaches the output of 'blocks/1'"):
        spp.propagate(Model([Block, Block, Stopped, Block]), images(16, 8), where=Block, loss=loss)


def test_a_while_loop_is_not_differentiable():
    class Loop(Block):
        def __call__(self, x):
            return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x + 1, x)

    with pytest.raises(ValueError, match="cannot be differentiated"):
        spp.propagate(Model([Block, Loop, Block]), images(16, 8), where=Block)


def test_a_block_inside_a_conditional_is_refused():
    class Conditional(Block):
        def __call__(self, x):
            return nnx.cond(x.sum() > 0, lambda block, x: block(x), lambda block, x: x, self.first, x)

    with pytest.raises(ValueError, match=r"Linear 'blocks/0/first' runs inside JAX's 'cond'"):
        spp.propagate(Model([Conditional, Block]), images(16, 8), where=nnx.Linear)


def test_outputs_that_cannot_be_measured_or_scored():
    class Integer(Block):
        def __call__(self, x):
            return jnp.argmax(x, axis=-1)

    with pytest.raises(ValueError, match=r"Integer 'layers/1' returns no floating-point array"):
        spp.propagate(nnx.Sequential(Model([Block]), Integer(8, rngs=nnx.Rngs(0))), images(16, 8), where=Integer)


def test_losses_that_do_not_fit():
    model, x = Model([Block] * 2), images(16, 8)
    linen_model = LinenModel(2)
    with pytest.raises(ValueError, match="needs logits"):
        spp.propagate(linen_model, x, loss="cross_entropy")
    assert len(spp.propagate(linen_model, x, loss=lambda output: output["logits"].mean())) == 2
    with pytest.raises(ValueError, match=r"floating-point scalar, not shape \(16, 3\)"):
        spp.propagate(model, x, loss=lambda logits: logits)
    with pytest.raises(ValueError, match="unknown loss 'hinge': expected a callable or one of cross_entropy"):
        spp.propagate(model, x, loss="hinge")
    with pytest.raises(TypeError, match="loss=3"):
        spp.propagate(model, x, loss=3)
    with pytest.raises(ValueError, match="unknown cotangent='ones'"):
        spp.propagate(model, x, cotangent="ones")


def test_a_model_without_an_output():
    class Nothing(Model):
        def __call__(self, x):
            super().__call__(x)

    with pytest.raises(ValueError, match="Nothing returns no array"):
        spp.propagate(Nothing([Block] * 2), images(16, 8))


def test_inputs_and_models_that_do_not_fit(tiny):
    with pytest.raises(ValueError, match=r"images have shape \(8, 8, 3\): expected \[B, H, W, 3\]") as caught:
        spp.propagate(tiny(), images(8, 8, 3))
    assert "is its input what it expects?" in " ".join(caught.value.__notes__)
    with pytest.raises(TypeError, match=r"not the class Model"):
        spp.propagate(Model, images(16, 8))
    with pytest.raises(TypeError, match="not function"):
        spp.propagate(lambda x: x, images(16, 8))
    with pytest.raises(TypeError, match="variables= belongs to Linen"):
        spp.propagate(tiny(), images(4, 8, 8, 3), variables={})


# ---------------------------------------------------------------- profiles


def made(forward, backward, shapes=None):
    forward, backward = np.array(forward, np.float64), np.array(backward, np.float64)
    n = len(forward)
    nan = np.full(n, np.nan)
    rest = [nan] * (len(_statistics.STATISTICS) - 2)
    samples = dict(zip(_statistics.STATISTICS, (forward, backward, *rest), strict=True))
    return spp.Profile(
        tuple(f"blocks/{i}" for i in range(n)),
        tuple(shapes or [(4, 8)] * n),
        ("float32",) * n,
        (0,),
        {name: values[None] for name, values in samples.items()},
    )


def test_diagnosis_of_growth():
    diagnosis = made([1, 1, 1, 1, 1], 2.0 ** np.arange(12, 2, -2)).diagnose()
    assert diagnosis.forward.verdict == "preserved"
    assert diagnosis.forward.block is None
    assert diagnosis.backward.verdict == "exploding"
    assert diagnosis.backward.block == "blocks/2"  # 16 times the last: the first that leaves the factor of 10
    assert diagnosis.backward.per_block == pytest.approx(4.0)
    assert diagnosis.backward.total == pytest.approx(256.0)
    assert "gradient variance grows 4x per block towards the input, 256x in all: exploding" in str(diagnosis)
    assert made([1] * 5, 2.0 ** np.arange(12, 2, -2)).diagnose(tolerance=300).backward.verdict == "preserved"


def test_diagnosis_of_decay_by_stage():
    shapes = [(4, 8)] * 3 + [(4, 16)] * 3
    diagnosis = made([8, 4, 2, 0.2, 0.1, 0.05], [1] * 6, shapes).diagnose()
    assert (diagnosis.forward.verdict, diagnosis.forward.block) == ("vanishing", "blocks/3")
    assert diagnosis.forward.stages == pytest.approx((0.5, 0.5))
    assert diagnosis.forward.transitions == pytest.approx((0.1,))
    assert "across transitions 0.1" in str(diagnosis)


@pytest.mark.parametrize(
    ("forward", "verdict", "block"),
    [
        ([1, 5, np.nan, 1], "non-finite", "blocks/2"),
        ([1, np.inf, 1, 1], "non-finite", "blocks/1"),
        ([1, 0, 0, 0], "vanishing", "blocks/1"),
        ([0, 0, 0, 0], "vanishing", "blocks/0"),
        ([1, 100, 1, 1], "exploding", "blocks/1"),
        ([1], "preserved", None),
    ],
)
def test_diagnosis_of_extremes(forward, verdict, block):
    diagnosis = made(forward, [1] * len(forward)).diagnose()
    assert (diagnosis.forward.verdict, diagnosis.forward.block) == (verdict, block)
    assert verdict in str(diagnosis)


def test_profiles_are_written_and_shown(tmp_path, tiny):
    profile = spp.propagate_seeds(tiny, images(4, 8, 8, 3), seeds=2)
    profile.to_csv(tmp_path / "p.csv")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    statistics = (
        "forward_var,backward_var,channel_sq_mean,channel_var,branch_var,branch_share,similarity,dead,saturated"
    )
    assert lines[0] == f"seed,index,path,shape,dtype,{statistics},output,mode"
    assert len(lines) == 1 + 2 * 4
    assert float(lines[6].split(",")[5]) == pytest.approx(profile.samples["forward_var"][1, 1], rel=1e-6)
    assert json.loads(profile.to_json(tmp_path / "p.json")) == json.loads((tmp_path / "p.json").read_text())
    broken = made([1, np.inf], [np.nan, 1])
    content = json.loads(broken.to_json())
    assert content["forward_var"] == [[1.0, "inf"]]
    assert content["backward_var"] == [[None, 1.0]]
    shown = repr(profile)
    assert "median of 2 seeds" in shown
    assert len(shown.splitlines()) == 2 + 4
    assert "blocks/3" in shown
    with pytest.raises(ValueError, match="unknown statistic 'var'"):
        profile.quantile("var", 0.5)
    with pytest.raises(ValueError, match="tolerance=1"):
        profile.diagnose(tolerance=1)


def test_medians_of_infinities_are_no_nan():
    profile = made([1], [1])
    profile.samples["forward_var"] = np.array([[np.inf], [np.inf], [1.0]])
    assert profile.forward_var[0] == math.inf


# ---------------------------------------------------------------- pictures


def test_plot_shows_the_numbers(tiny, tmp_path):
    profile = spp.propagate_seeds(tiny, images(4, 8, 8, 3), seeds=3)
    prediction = spp.predict(tiny(), (4, 8, 8, 3))
    figure = spp.plot({"IdShort": profile, "same": profile}, {"IdShort": prediction}, title="Title")
    forward, backward = figure.axes
    thin, first = forward.lines[:2]
    np.testing.assert_allclose(first.get_ydata(), profile.forward_var)
    np.testing.assert_allclose(thin.get_ydata(), prediction.forward_var)
    np.testing.assert_allclose(backward.lines[1].get_ydata(), profile.backward_var / profile.backward_var[-1])
    assert forward.get_yscale() == backward.get_yscale() == "log"
    assert first.get_color() != forward.lines[2].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["IdShort", "same", "thin: closed form"]
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    alone = spp.plot(profile, prediction).axes[0].lines[0]
    np.testing.assert_allclose(alone.get_ydata(), prediction.forward_var)
    figure.savefig(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000
    raw = spp.plot(profile, relative=False)
    np.testing.assert_allclose(raw.axes[1].lines[0].get_ydata(), profile.backward_var)
    with pytest.raises(ValueError, match="no profile to plot"):
        spp.plot({})
    with pytest.raises(ValueError, match="predictions for other"):
        spp.plot({"IdShort": profile}, {"other": prediction})


def test_plot_of_what_is_not_finite(tmp_path):
    figure = spp.plot(made([1, np.inf, 0, np.nan], [np.inf, 1, 1, 1]))
    assert np.isnan(figure.axes[0].lines[0].get_ydata()[1:]).all()
    figure.savefig(tmp_path / "plot.png")


# ---------------------------------------------------------------- a statistic of one's own


def test_a_statistic_is_one_line(monkeypatch, tiny, tmp_path):
    """Attribute, quantiles over seeds, table, CSV and JSON follow, and the compiled pass stays."""
    monkeypatch.setattr(compilation, "_programs", type(compilation._programs)())
    before = spp.propagate_seeds(tiny, spp.noise((4, 8, 8, 3)), seeds=2)
    monkeypatch.setitem(spp.STATISTICS, "backward_channel_var", lambda seen: seen.gradient.channel_var)
    profile = spp.propagate_seeds(tiny, spp.noise((4, 8, 8, 3)), seeds=2)
    assert len(compilation._programs) == 1
    assert profile.samples["backward_channel_var"].shape == (2, 4)
    assert (profile.backward_channel_var > 0).all()
    assert (profile.backward_channel_var < profile.backward_var).all()
    np.testing.assert_array_equal(profile.backward_var, before.backward_var)
    assert profile.quantile("backward_channel_var", 1.0)[0] == profile.samples["backward_channel_var"][:, 0].max()
    assert "backward_channel_var" in repr(profile)
    assert "backward_channel_var" in dir(profile)
    profile.to_csv(tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert float(rows[5]["backward_channel_var"]) == pytest.approx(profile.samples["backward_channel_var"][1, 1])
    assert len(json.loads(profile.to_json())["backward_channel_var"]) == 2
    with pytest.raises(AttributeError, match="backward_channel_var"):
        _ = before.backward_channel_var
    assert copy.deepcopy(profile).backward_channel_var[0] == profile.backward_channel_var[0]


# ---------------------------------------------------------------- while training


def test_a_monitor_compiles_once(monkeypatch, tiny):
    monkeypatch.setattr(compilation, "_programs", type(compilation._programs)())
    x = images(4, 8, 8, 3)
    monitor = spp.Monitor(x, seed=2)
    model = tiny()
    first = monitor(model)
    np.testing.assert_array_equal(first.backward_var, spp.propagate(model, x, seed=2).backward_var)
    model.blocks[0].branch.convolutions[1].kernel[...] *= 2.0
    prepared, second = monitor._prepared, monitor(model)
    assert monitor._prepared is prepared
    assert second.forward_var[0] > first.forward_var[0]
    deeper = tiny(residual="identity")
    assert monitor(deeper).forward_var[0] == spp.propagate(deeper, x, seed=2).forward_var[0]  # another network
    values = spp.scalars(second)
    assert values["forward_var/blocks/0"] == second.forward_var[0]
    assert len(values) == 8


def test_a_monitor_traces_once():
    traced = []

    class Counting(Block):
        def __call__(self, x):
            traced.append(type(x).__name__)
            return super().__call__(x)

    model, monitor = Model([Counting, Counting]), spp.Monitor(images(16, 8), where=Counting)
    first = monitor(model)
    calls = len(traced)
    model.blocks[0].second.kernel[...] *= 2.0
    assert monitor(model).forward_var[0] > first.forward_var[0]
    assert len(traced) == calls > 0


def test_a_branch_that_is_nowhere_is_refused_with_the_names_there_are():
    model, x = Chain(), np.ones((2, 3), np.float32)
    for branch, shown in (("brnch", "'brnch'"), (nnx.Conv, "Conv"), (["brnch"], r"\('brnch'\)")):
        with pytest.raises(
            ValueError,
            match=rf"branch={shown} means no module inside the blocks: .*; in the blocks are 'first' \(Linear\)",
        ):
            spp.propagate(model, x, where=Link, branch=branch)
    assert np.isnan(spp.propagate(model, x, where=Link, branch=lambda path, module: False).branch_var).all()
    assert np.isnan(spp.propagate(model, x, where=Link).branch_var).all()
    assert np.isfinite(spp.propagate(model, x, where=Link, branch="first").branch_var).all()


class Link(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return x + self.first(x)


class Chain(nnx.Module):
    def __init__(self):
        self.links = nnx.List([Link(nnx.Rngs(i)) for i in range(2)])

    def __call__(self, x):
        for link in self.links:
            x = link(x)
        return x
