"""Networks by name, and models of the user's own, NNX and Linen, as a trainer needs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import models, resnet, spp

SIZE, CLASSES = 8, 5


class ToyNNX(nnx.Module):
    """Convolution, batch norm, dropout and a dense layer."""

    def __init__(self, num_classes, width=4, dtype=jnp.float32, *, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images):
        x = jax.nn.relu(self.norm(self.conv(images))).mean(axis=(1, 2))
        return self.head(self.dropout(x.astype(jnp.float32)))


class ToyLinen(linen.Module):
    """The same in Linen."""

    num_classes: int
    width: int = 4

    @linen.compact
    def __call__(self, images, train: bool):
        x = linen.Conv(self.width, (3, 3))(images)
        x = jax.nn.relu(linen.BatchNorm(use_running_average=not train)(x)).mean(axis=(1, 2))
        return linen.Dense(self.num_classes)(linen.Dropout(0.5, deterministic=not train)(x))


class Undecided(linen.Module):
    """Batch norm always in training mode."""

    num_classes: int

    @linen.compact
    def __call__(self, images):
        x = linen.BatchNorm(use_running_average=False)(images)
        return linen.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class Deterministic(linen.Module):
    """Another name of the flag."""

    num_classes: int

    @linen.compact
    def __call__(self, images, *, deterministic: bool = True):
        x = linen.Dropout(0.5, deterministic=deterministic)(images.mean(axis=(1, 2)))
        return linen.Dense(self.num_classes)(x)


def features(num_classes, rngs):
    """Forgets its head."""
    del num_classes
    return nnx.Conv(3, 4, (3, 3), rngs=rngs)


def build(name, num_classes=CLASSES, dtype=jnp.float32, **arguments):
    rngs = nnx.Rngs(params=0, default=1)
    return models.build(name, num_classes=num_classes, image_size=SIZE, dtype=dtype, rngs=rngs, **arguments)


def images(seed=0, batch=16):
    return jax.random.normal(jax.random.key(seed), (batch, SIZE, SIZE, 3), jnp.float32)


def arguments(name):
    return {"depth": 10} if name == "preact_resnet" else {}


@pytest.mark.parametrize("name", models.MODELS)
def test_every_name_is_a_network(name):
    def logits(key):
        model = models.build(
            name, num_classes=CLASSES, image_size=SIZE, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=key), width=4,
            **arguments(name),
        )  # fmt: skip
        return model(jnp.zeros((2, SIZE, SIZE, 3)))

    out = jax.eval_shape(logits, jax.random.key(0))
    assert (out.shape, out.dtype) == ((2, CLASSES), jnp.float32)


def test_a_name_builds_what_its_builder_builds():
    ours = build("resnet10", residual="convshort", width=4)
    same = resnet.PreActResNet(
        10, "convshort", num_classes=CLASSES, width=4, image_size=SIZE, rngs=nnx.Rngs(params=0, default=1)
    )
    for one, other in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(same)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["test_models:ToyNNX", ToyNNX, "test_models:ToyLinen", ToyLinen])
def test_a_model_of_ones_own_trains_and_is_scored(name, monkeypatch):
    """As a trainer does it: parameters, statistics and random state apart, and one jitted step."""
    model = build(name, width=6)
    assert isinstance(model, nnx.Module)
    model.train()
    graph, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    assert {type(v) for _, v in nnx.to_flat_state(rest)} <= {nnx.RngKey, nnx.RngCount}
    assert sorted(np.shape(v) for v in jax.tree.leaves(params)) == sorted(
        [(3, 3, 3, 6), (6,), (6,), (6,), (6, CLASSES), (CLASSES,)]
    )
    assert [np.shape(v) for v in jax.tree.leaves(stats)] == [(6,), (6,)]

    @jax.jit
    def step(params, stats, rest, x, y):
        def loss(params):
            model = nnx.merge(graph, params, stats, rest, copy=True)
            logits = model(x)
            labels = jax.nn.one_hot(y, CLASSES)
            return -(jax.nn.log_softmax(logits) * labels).sum(-1).mean(), nnx.split(
                model, nnx.Param, nnx.BatchStat, ...
            )[2:]

        (value, (stats, rest)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return value, params, stats, rest

    x, y = images(), jnp.arange(16) % CLASSES
    first = jax.tree.leaves(stats)
    values = []
    for _ in range(30):
        value, params, stats, rest = step(params, stats, rest, x, y)
        values.append(float(value))
    assert step._cache_size() == 1  # nothing of the structure changes
    assert np.mean(values[-5:]) < np.mean(values[:5])
    assert len({round(v, 6) for v in values[:3]}) == 3
    assert not any(np.array_equal(a, b) for a, b in zip(first, jax.tree.leaves(stats), strict=True))

    model = nnx.merge(graph, params, stats, rest)
    model.eval()
    scored = model(x)
    np.testing.assert_array_equal(scored, model(x))  # nothing is dropped
    np.testing.assert_allclose(scored[:4], model(x[:4]), atol=1e-5)  # nothing depends on the batch
    model.train()
    assert not np.allclose(model(x), model(x))  # dropout draws anew
    assert not np.allclose(scored, model(x))


def test_linen_and_nnx_agree_in_evaluation():
    """The wrapped model computes what `apply` does."""
    model = build(ToyLinen)
    plain = ToyLinen(CLASSES)
    variables = plain.init(jax.random.key(0), images(), train=False)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(
        nnx.to_pure_dict(nnx.state(model.network, nnx.Param))
    )
    params = nnx.to_pure_dict(nnx.state(model.network, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(model.network, nnx.BatchStat))
    expected = plain.apply({"params": params, "batch_stats": stats}, images(), train=False)
    np.testing.assert_allclose(model(images()), expected, atol=1e-6)


def test_any_flag_of_the_call_tells_the_mode():
    model = build(Deterministic)
    model.eval()
    np.testing.assert_array_equal(model(images()), model(images()))
    model.train()
    assert not np.allclose(model(images()), model(images()))


@pytest.mark.parametrize("name", [ToyNNX, ToyLinen])
def test_parameters_depend_on_the_key_alone_also_under_eval_shape(name):
    one, same = (jax.tree.leaves(nnx.state(build(name), nnx.Param)) for _ in range(2))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    abstract = nnx.eval_shape(lambda: build(name))
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))] == [leaf.shape for leaf in one]


def test_signal_propagation_sees_the_layers_and_the_mode_of_a_wrapped_model():
    model = build(ToyLinen)
    for change, shown in ((model.eval, "running statistics in 1 norm"), (model.train, "batch statistics in 1 norm")):
        change()
        profile = spp.propagate(model, images(), where="Conv", branch=lambda path, module: False)
        assert profile.paths == ("network/Conv_0",)
        assert profile.forward_var[0] > 0
        assert shown in str(profile.mode)


def takes(num_classes, *, rngs, **others):
    assert others == {"width": 3}
    return ToyNNX(num_classes, **others, rngs=rngs)


def test_what_the_signature_does_not_name_is_not_passed():
    assert build(takes, width=3).conv.kernel.shape == (3, 3, 3, 3)


def test_the_dtype_reaches_a_function_that_takes_it():
    def make(num_classes, image_size, dtype, rngs):
        assert (image_size, dtype) == (SIZE, jnp.bfloat16)
        return ToyNNX(num_classes, rngs=rngs)

    assert isinstance(build(make, dtype=jnp.bfloat16), ToyNNX)


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("resnet19", {}, ValueError, "unknown model 'resnet19'.*resnet18.*package.module:function"),
        (3, {}, ValueError, "unknown model 3"),
        ("no_such_module:make", {}, ValueError, "no module 'no_such_module'"),
        ("test_models:mak", {}, ValueError, "no function 'mak'; it has .*features"),
        (":make", {}, ValueError, "expected package.module:function"),
        ("resnet18", {"widht": 3}, ValueError, "argument of the model resnet18.*'widht'.*one of.*width"),
        ("resnet18", {"depth": 50}, ValueError, "argument of the model resnet18.*'depth'"),
        (ToyNNX, {"depth": 3}, ValueError, "argument of the model ToyNNX: 'depth': expected one of width"),
        (lambda rngs: None, {}, ValueError, "has no argument num_classes"),
        (lambda num_classes, depth: None, {}, ValueError, "needs the argument depth"),
        (lambda num_classes: 3, {}, TypeError, "returned int: expected an nnx.Module or a linen.Module"),
        (lambda num_classes: ToyNNX, {}, TypeError, "returned the class ToyNNX"),
        (lambda num_classes, rngs: ToyNNX(num_classes + 1, rngs=rngs), {}, ValueError, r"float32\[2, 6\].*\[2, 5\]"),
        (features, {}, ValueError, r"float32\[2, 8, 8, 4\].*\[2, 5\]"),
        (Undecided, {}, ValueError, "writes its batch statistics in evaluation.*train"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_way_out(name, given, error, message):
    with pytest.raises(error, match=message):
        build(name, **given)


def test_an_error_of_the_model_passes_through_with_a_note():
    class Asks(nnx.Module):
        def __init__(self, num_classes): ...

        def __call__(self, images, train):
            return images

    with pytest.raises(TypeError, match="train") as caught:
        build(Asks)
    assert "called as model(images)" in "".join(caught.value.__notes__)
