"""Any Flax model with any call: nothing marked on it, its axis names bound, and a message of its own for each slip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, linen, nnx

from nfjax import cost, spp
from nfjax._flax import runnable

X = jax.random.normal(jax.random.key(1), (16, 8))


def equal(a, b, rtol=2e-6):
    assert a.samples.keys() == b.samples.keys()
    for name, values in a.samples.items():
        np.testing.assert_allclose(values, b.samples[name], rtol=rtol)


class Block(nnx.Module):
    def __init__(self, width=8, *, rngs):
        self.first = nnx.Linear(width, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.second(jax.nn.relu(self.first(x)))


class Chain(nnx.Module):
    def __init__(self, blocks):
        self.blocks = nnx.List(blocks)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def chain(cls, number=3):
    rngs = nnx.Rngs(0)
    return Chain([cls(rngs=rngs) for _ in range(number)])


# ---------------------------------------------------------------- named axes


@jax.custom_vjp
def averaged(x):
    return jax.lax.pmean(x, "other")


averaged.defvjp(lambda x: (averaged(x), None), lambda _, gradient: (jax.lax.pmean(gradient, "other"),))


class LinenNormed(linen.Module):
    """A block of batch norm over the devices of named axes; with more that names an axis."""

    axis_name: object = None
    more: str = ""

    @linen.compact
    def __call__(self, x, train=True):
        y = linen.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        y = linen.Dense(8)(jax.nn.relu(y))
        if self.more == "index":
            y = y * (1 + jax.lax.axis_index("devices")).astype(y.dtype)
        if self.more == "own derivative":
            y = averaged(y)
        return x + y


class LinenNet(linen.Module):
    axis_name: object = None
    more: str = ""
    remat: bool = False

    @linen.compact
    def __call__(self, x, train=True):
        block = linen.remat(LinenNormed, static_argnums=2) if self.remat else LinenNormed
        for i in range(2):
            x = block(self.axis_name, self.more, name=f"block{i}")(x, train)
        return linen.Dense(3, name="head")(x)


class NNXNormed(nnx.Module):
    def __init__(self, axis_name, rngs):
        self.norm = nnx.BatchNorm(8, axis_name=axis_name, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.linear(jax.nn.relu(self.norm(x)))


NAMED = {
    "two": {"axis_name": ("hosts", "devices")},
    "index": {"more": "index"},
    "derivative": {"axis_name": "batch", "more": "own derivative"},
    "remat": {"axis_name": "batch", "remat": True},
}


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED)
def test_linen_models_that_name_axes(named):
    """As on one device of many, whatever the model does with the name."""
    plain = spp.propagate(LinenNet(), X, where=LinenNormed, loss="cross_entropy")
    profile = spp.propagate(LinenNet(**named), X, where=LinenNormed, loss="cross_entropy")
    equal(profile, plain)
    assert (profile.shapes, profile.paths) == (plain.shapes, plain.paths)
    assert cost.count(LinenNet(**named), X) == cost.count(LinenNet(), X)


def test_nnx_models_that_name_axes():
    plain, named = (Chain([NNXNormed(name, nnx.Rngs(i)) for i in range(2)]) for name in (None, "batch"))
    before = np.array(named.blocks[0].norm.mean[...])
    equal(spp.propagate(named, X), spp.propagate(plain, X))
    assert cost.count(named, X.shape) == cost.count(plain, X.shape)
    np.testing.assert_array_equal(named.blocks[0].norm.mean[...], before)
    seeds = spp.propagate_seeds(
        lambda seed: Chain([NNXNormed("batch", nnx.Rngs(seed + i)) for i in range(2)]), X, seeds=2
    )
    np.testing.assert_array_equal(seeds.samples["backward_var"][0], spp.propagate(named, X).backward_var)
    np.testing.assert_array_equal(spp.Monitor(X)(named).forward_var, spp.propagate(named, X).forward_var)


def test_a_model_that_names_an_axis_when_it_is_initialized():
    class Summed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return jax.lax.psum(linen.Dense(8)(x), "devices")

    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(8)(x)

    named, plain = (linen.Sequential([cls(), cls()]) for cls in (Summed, Plain))
    equal(spp.propagate(named, X, where=Summed), spp.propagate(plain, X, where=Plain))
    assert cost.count(named, X.shape) == cost.Cost(2 * 72, 0, 2 * 16 * 64)


def test_groups_of_devices_are_refused():
    class Grouped(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(2):
                x = LinenBlock()(x + jax.lax.psum(x, "batch", axis_index_groups=[[0]]))
            return x

    with pytest.raises(NotImplementedError) as caught:
        spp.propagate(Grouped(), X)
    assert "names the axis 'batch', which nfjax binds to size one" in " ".join(caught.value.__notes__)


def test_another_name_error_passes_through():
    class Misspelled(nnx.Module):
        def __call__(self, x):
            return y  # noqa: F821

    for call in (spp.propagate, cost.count):
        with pytest.raises(NameError, match="'y' is not defined"):
            call(Misspelled(), X)


# ---------------------------------------------------------------- nothing is marked


class Walking(Block):
    """Takes all of its attributes for parts of its own, as `nnx.bridge.ToNNX` does."""

    def __call__(self, x):
        own = {name: value for name, value in vars(self).items() if not name.startswith("_pytree__")}
        assert own.keys() == {"first", "second"}
        for part in own.values():
            x = x + part(x)
        assert (
            jax.tree.structure(nnx.state(self))
            == jax.tree.structure({name: nnx.state(part) for name, part in own.items()})
            or len(nnx.state(self)) == 2
        )
        return x


class Refusing(Block):
    def __setattr__(self, name, value):
        if name not in ("first", "second"):
            raise AttributeError(f"no {name} here")
        super().__setattr__(name, value)


class Slotted(Block):
    __slots__ = ()


class Unregistered(Block, pytree=False):
    """No pytree for JAX."""


class Registered(Block, pytree=True):
    """A pytree for JAX."""


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen(nnx.Module):
    first: nnx.Linear

    def __call__(self, x):
        return x + jax.nn.relu(self.first(x))


def frozen(rngs):
    return Frozen(nnx.Linear(8, 8, rngs=rngs))


@pytest.mark.parametrize("cls", [Walking, Refusing, Slotted, Unregistered, Registered, frozen])
@pytest.mark.parametrize("wrap", [None, nnx.remat])
def test_modules_that_mind_their_attributes(cls, wrap):
    model = chain(cls)
    kind = type(model.blocks[0])

    class Wrapped(Chain):
        def __call__(self, x):
            for block in self.blocks:
                x = (wrap or (lambda f: f))(lambda block, x: block(x))(block, x)
            return x

    model = Wrapped(list(model.blocks))
    before = [dict(vars(node)) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    call = kind.__call__
    profile = spp.propagate(model, X, where=kind)
    assert profile.paths == ("blocks/0", "blocks/1", "blocks/2")
    after = [dict(vars(node)) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    assert [{k: id(v) for k, v in node.items()} for node in after] == [
        {k: id(v) for k, v in node.items()} for node in before
    ]
    assert kind.__call__ is call
    np.testing.assert_allclose(profile.forward_var[-1], np.asarray(model(X), np.float64).var(), rtol=1e-5)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm(name="norm")(x)
        return x + linen.Dense(8, name="dense")(y)


def test_a_linen_block_in_an_nnx_model():
    """`nnx.bridge.ToNNX`; its Linen modules have paths in the whole model."""
    blocks = [nnx.bridge.ToNNX(LinenBlock(), rngs=nnx.Rngs(i)).lazy_init(X) for i in range(3)]
    model, y = Chain(blocks), X
    profile = spp.propagate(model, X, where=nnx.bridge.ToNNX)
    assert profile.paths == ("blocks/0", "blocks/1", "blocks/2")
    for block, measured in zip(blocks, profile.forward_var, strict=True):
        y = block(y)
        np.testing.assert_allclose(measured, np.asarray(y, np.float64).var(), rtol=1e-5)
    assert spp.propagate(model, X, where=linen.Dense).paths == tuple(f"blocks/{i}/dense" for i in range(3))
    assert cost.count(model, X.shape) == cost.Cost(3 * (16 + 72), 3 * 16, 3 * 16 * 64)


COPIES = {
    "nnx.remat": lambda block, x: nnx.remat(lambda block, x: block(x))(block, x),
    "nnx.jit": lambda block, x: nnx.jit(lambda block, x: block(x))(block, x),
    "nnx.clone": lambda block, x: nnx.clone(block)(x),
    "nnx.merge": lambda block, x: nnx.merge(*nnx.split(block))(x),
    "jax.checkpoint": lambda block, x: jax.checkpoint(lambda block, x: block(x))(block, x),
    "jax.jit": lambda block, x: jax.jit(lambda block, x: block(x))(block, x),
    "jax.tree.map": lambda block, x: jax.tree.map(lambda value: value, block)(x),
}


@functools.partial(jax.jit, inline=False)
def shared(block, x):
    """One function for every block: JAX has its trace of the first."""
    return block(x)


@pytest.mark.parametrize("copied", [*COPIES.values(), shared], ids=[*COPIES, "one jax.jit"])
def test_copies_know_where_they_stand(copied):
    class Copying(Chain):
        def __call__(self, x):
            for block in self.blocks:
                x = copied(block, x)
            return x

    blocks = list(chain(Block).blocks)
    profile = spp.propagate(Copying(blocks), X, where=Block)
    assert profile.paths == ("blocks/0", "blocks/1", "blocks/2")
    equal(profile, spp.propagate(Chain(blocks), X))
    assert spp.propagate(Copying(blocks), X, where=nnx.Linear).paths[:2] == ("blocks/0/first", "blocks/0/second")


def test_a_model_that_stacks_its_blocks_when_it_is_called():
    """jax.tree.map compares the structures of modules that stand in different places."""

    class Stacking(Chain):
        def __call__(self, x):
            stacked = jax.tree.map(lambda *values: jnp.stack(values), *self.blocks)
            x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, stacked)
            return x

    blocks = list(chain(Block).blocks)
    profile, plain = spp.propagate(Stacking(blocks), X, where=Block), spp.propagate(Chain(blocks), X)
    equal(profile, plain)
    assert profile.paths == tuple(f"(outside)/Block[{i}]" for i in range(3))
    assert cost.count(Stacking(blocks), X) == cost.count(Chain(blocks), X)


def test_attributes_that_change_during_a_call():
    class Changing(Block):
        def __call__(self, x):
            self.seen = nnx.data(x)
            y = nnx.clone(self).second(x)
            del self.seen
            return nnx.clone(self).first(y)

    profile = spp.propagate(chain(Changing), X, where=nnx.Linear)
    assert profile.paths[:2] == ("blocks/0/second", "blocks/0/first")


def test_nothing_is_left_after_an_error():
    class Meta(type(nnx.Module)):
        """A class whose methods cannot be replaced."""

        def __setattr__(cls, name, value):
            if name == "__call__":
                raise TypeError("sealed")
            super().__setattr__(name, value)

    class Sealed(Block, metaclass=Meta):
        def __call__(self, x):
            return super().__call__(x)

    class Broken(Block):
        def __call__(self, x):
            raise RuntimeError("inside")

    calls = [cls.__call__ for cls in (Block, Chain, nnx.Linear, Broken, Sealed)]
    for cls, error, message in ((Broken, RuntimeError, "inside"), (Sealed, TypeError, "sealed")):
        model = Chain([*chain(Block).blocks, cls(rngs=nnx.Rngs(0))])
        before = [{k: id(v) for k, v in vars(block).items()} for block in model.blocks]
        for call in (spp.propagate, cost.count):
            with pytest.raises(error, match=message):
                call(model, X)
        assert [{k: id(v) for k, v in vars(block).items()} for block in model.blocks] == before
    assert [cls.__call__ for cls in (Block, Chain, nnx.Linear, Broken, Sealed)] == calls


# ---------------------------------------------------------------- any call


class Called(nnx.Module):
    """Positional flags and names, an `rngs` that must be given, a cache by keyword."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(2)])

    def __call__(self, x, train, activation, rngs, cache=None, factors=(1, 1)):
        assert train is True
        assert activation == "relu"
        assert rngs is None or isinstance(rngs, nnx.Rngs)
        assert factors == (1, 2)
        for block in self.blocks:
            x = block(x)
        if rngs is not None:
            x = x + jax.random.normal(rngs.noise(), x.shape)
        return x if cache is None else (x @ cache["keys"][0], cache)


class LinenCalled(linen.Module):
    @linen.compact
    def __call__(self, x, train, activation, cache=None, factors=(1, 1)):
        assert train is True
        assert activation == "relu"
        assert factors == (1, 2)
        for _ in range(2):
            x = LinenBlock()(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return x if cache is None else (x @ cache["keys"][0], cache, "named")


@pytest.mark.parametrize("rngs", [None, "given"])
def test_one_way_to_call_any_model(rngs):
    model = Called(nnx.Rngs(0))
    cache = {"keys": [jnp.ones((8, 5))], "index": 3, "name": "layer"}
    for more, macs in (({}, 0), ({"cache": cache}, 16 * 8 * 5)):
        given = {"rngs": None if rngs is None else nnx.Rngs(0, noise=1), "factors": (1, 2)} | more
        assert not more or len(spp.propagate(model, X, True, "relu", **given)) == 2
        for x in (X, X.shape, jax.ShapeDtypeStruct(X.shape, X.dtype)):
            assert cost.count(model, x, True, "relu", **given) == cost.Cost(4 * 72, 0, 4 * 16 * 64 + macs)
    abstract = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if hasattr(v, "shape") else v, cache)
    counted = cost.count(model, X.shape, True, "relu", rngs=None, cache=abstract, factors=(1, 2))
    assert counted.macs == 4 * 16 * 64 + 16 * 8 * 5


@pytest.mark.parametrize("rngs", [None, {"dropout": jax.random.key(3)}, jax.random.key(3)], ids=["none", "dict", "key"])
def test_one_way_to_call_any_linen_model(rngs):
    cache = {"keys": [jnp.ones((8, 5))], "index": 3, "name": "layer"}
    for more, macs in (({}, 0), ({"cache": cache}, 16 * 8 * 5)):
        given = {"rngs": rngs, "factors": (1, 2)} | more
        assert not more or len(spp.propagate(LinenCalled(), X, True, "relu", where=LinenBlock, **given)) == 2
        spent = cost.count(LinenCalled(), X.shape, True, "relu", **given)
        assert spent == cost.Cost(2 * (72 + 16), 32, 2 * 16 * 64 + macs)
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        cost.count(LinenCalled(), X.shape)


def test_rngs_is_an_argument_like_any_other():
    class Noisy(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Block(rngs=nnx.Rngs(i)) for i in range(2)])

        def __call__(self, x, rngs="default"):
            assert rngs is expected
            return Chain.__call__(self, x)

    for given, value in (({}, "default"), ({"rngs": None}, None)):
        expected = value
        assert len(spp.propagate(Noisy(), X, **given)) == 2
        assert len(spp.propagate_seeds(lambda seed: Noisy(), X, seeds=1, **given)) == 2
        assert len(spp.Monitor(X)(Noisy(), **given)) == 2
        assert cost.count(Noisy(), X, **given).parameters == 4 * 72
    assert len(spp.propagate(chain(Block), X, rngs=None)) == 3  # it takes none


def test_counting_allocates_nothing():
    """A model of 4 TB, its key and value cache, and the rngs of its call: all abstract."""

    class Huge(linen.Module):
        @linen.compact
        def __call__(self, x, cache):
            return linen.Dense(10**6)(linen.Dropout(0.5, deterministic=False)(x)) + cache

    width = 10**6
    cache = jax.ShapeDtypeStruct((1, width), jnp.float32)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    assert cost.count(Huge(), (1, width), cache=cache, rngs={"dropout": key}).macs == width**2
    model = nnx.eval_shape(lambda: Block(width, rngs=nnx.Rngs(0)))
    assert cost.count(model, (4, width)) == cost.Cost(2 * (width**2 + width), 0, 8 * width**2)


def test_counting_inside_jit():
    model, found = chain(Block), []

    @jax.jit
    def step(model, x):
        found.append(cost.count(model, x))
        return x

    step(model, X)
    assert found == [cost.count(model, X)]


# ---------------------------------------------------------------- messages


def test_a_call_inside_jit():
    model = chain(Block)
    for transformed in (
        jax.jit(lambda x: spp.propagate(model, x).forward_var.sum()),
        jax.jit(lambda x: spp.propagate(model, X).forward_var.sum()),
        nnx.jit(lambda x: spp.propagate(LinenNet(), x).forward_var.sum()),
        jax.grad(lambda x: spp.propagate(model, x).forward_var.sum()),
        jax.jit(lambda x: spp.Monitor(x)(model).forward_var.sum()),
    ):
        with pytest.raises(TypeError, match=r"inside a function that JAX transforms .* call it outside"):
            transformed(X)


def test_abstract_models_have_no_signal():
    abstract = nnx.eval_shape(lambda: chain(Block))
    for model, x in ((abstract, X), (chain(Block), jax.ShapeDtypeStruct((16, 8), jnp.float32))):
        with pytest.raises(TypeError, match=r"is abstract .*float32\[.*nfjax.spp needs arrays with values"):
            spp.propagate(model, x)


@pytest.mark.parametrize("call", [spp.propagate, cost.count])
def test_variables_in_the_wrong_place(call):
    model = LinenNet()
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match=r"give these by name, variables=\.\.\., and by position only"):
        call(model, variables, X)
    with pytest.raises((errors.ScopeParamNotFoundError, errors.ScopeCollectionNotFound)) as caught:
        call(LinenCalled(), X, True, "relu", factors=(1, 2), variables={"LinenBlock_0": {}})
    assert "variables= has 'LinenBlock_0', and no 'params'" in " ".join(caught.value.__notes__)
    with pytest.raises(TypeError, match=r"variables= is of type tuple: expected the collections of LinenNet"):
        call(model, X, variables=model.init_with_output(jax.random.key(0), X))
    with pytest.raises(TypeError, match="variables= belongs to Linen"):
        call(chain(Block), X, variables=variables)


@pytest.mark.parametrize(("call", "reader"), [(spp.propagate, "nfjax.spp"), (cost.count, "nfjax.cost")])
def test_a_wrong_shape_names_the_innermost_module(call, reader):
    model = chain(Block)
    model.blocks[1].second = nnx.Linear(9, 8, rngs=nnx.Rngs(0))
    bridged = Chain([nnx.bridge.ToNNX(LinenBlock(), rngs=nnx.Rngs(0)).lazy_init(X)])
    cases = [
        (model, X, {}, "Linear 'blocks/1/second' called with (float32[16, 8])"),
        (LinenNet(), X[:, :7], {}, "LinenNormed 'block0' called with (float32[16, 7], True)"),
        (bridged, X[:, :7], {}, "'blocks/0/norm' called with (float32[16, 7])"),
        (
            LinenNet(),
            X[:, :7],
            {"variables": LinenNet().init(jax.random.key(0), X), "train": False},
            "BatchNorm 'block0/BatchNorm_0' called with (float32[16, 7])",
        ),
    ]
    for wrong, x, given, place in cases:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call(wrong, x, **given)
        (note,) = [note for note in caught.value.__notes__ if "nfjax" in note]
        assert place in note
        assert f"raised by the model {type(wrong).__name__} while {reader} traced it, inside" in note


def test_an_error_is_raised_with_what_led_to_it():
    class Twice(Block):
        def __call__(self, x):
            try:
                raise KeyError("first")
            except KeyError:
                raise RuntimeError("second")  # noqa: B904

    with pytest.raises(RuntimeError, match="second") as caught:
        spp.propagate(chain(Twice), X)
    assert isinstance(caught.value.__context__, KeyError)
    assert not caught.value.__suppress_context__


def test_errors_elsewhere_are_not_located():
    """Another thread, or the user's own call, has its errors as they are."""
    model = chain(Block)
    called = runnable(model, (X,), {}, None, None, None, jax.random.key(0))
    with pytest.raises(TypeError) as caught:
        called.function((called.arrays[0], [X[:, :7]]))
    assert not any("nfjax" in note for note in getattr(caught.value, "__notes__", ()))
