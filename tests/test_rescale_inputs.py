"""What `nfjax.rescale` is given that it cannot use, or not as it seems: each a clear word, and nothing half-scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import rescale

METHODS = pytest.mark.parametrize("method", [rescale.lsuv, rescale.balance])


class Frozen(nnx.Variable):
    """A variable of a user's own, which is no parameter."""


class Fixed(nnx.Module):
    """A kernel that is not trained."""

    def __init__(self, rngs):
        self.kernel = Frozen(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        return x @ self.kernel[...]


class Quantized(nnx.Module):
    """A kernel of whole numbers with a scale."""

    def __init__(self, rngs):
        self.values = nnx.Param(jax.random.randint(rngs.params(), (8, 8), -127, 128, jnp.int8))
        self.scale = nnx.Param(jnp.float32(0.01))

    def __call__(self, x):
        return x @ (self.values[...].astype(jnp.float32) * self.scale[...])


class Block(nnx.Module):
    def __init__(self, before, rngs):
        self.before = before(rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.dense(self.before(x)))


class Network(nnx.Module):
    """Three blocks of a dense layer, with something before it; inputs of any type."""

    def __init__(self, before=lambda rngs: lambda x: x):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(before, rngs) for _ in range(3)])

    def __call__(self, x):
        x = x.astype(jnp.float32)
        for block in self.blocks:
            x = block(x)
        return x


def batch(n):
    return jax.random.normal(jax.random.key(1), (n, 8))


def leaves(model):
    return {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def changed(before, after):
    assert {path: value.dtype for path, value in before.items()} == {path: value.dtype for path, value in after.items()}
    return [path for path, value in before.items() if not np.array_equal(value, after[path])]


@METHODS
def test_a_batch_that_says_nothing_is_refused(method):
    with pytest.raises(ValueError, match=r"every value of the batch is 2.0: what a constant does .* expected a batch"):
        method(Network(), jnp.full((4, 8), 2.0))
    with pytest.raises(ValueError, match=r"an input of shape \(0, 8\) is empty"):
        method(Network(), jnp.zeros((0, 8)))


@METHODS
@pytest.mark.parametrize(
    ("x", "caution"),
    [
        (batch(1), "the batch is a single example"),
        (jnp.tile(batch(1), (4, 1)), "the 4 examples of the batch are all the same"),
        (jnp.arange(32, dtype=jnp.uint8).reshape(4, 8), "an input is uint8, such as pixels from 0 to 255"),
    ],
    ids=["one", "alike", "uint8"],
)
def test_a_batch_that_says_little_is_used_with_a_caution(method, x, caution):
    model, reports = Network(), []
    told = leaves(method(model, x, report=reports.append))
    assert f"\nmind: {caution}" in str(reports[0])
    with pytest.warns(UserWarning, match=caution):
        found = leaves(method(model, x))
    assert changed(told, found) == []
    assert all(np.isfinite(value).all() for value in found.values())


@METHODS
def test_a_number_beside_the_batch_may_be_constant(method):
    class Stepped(Network):
        def __call__(self, x, step):
            return super().__call__(x) + step.astype(jnp.float32)[:, None]

    found = method(Stepped(), batch(4), jnp.zeros(4, jnp.int32), report=lambda report: None)
    assert changed(leaves(Stepped()), leaves(found))


@METHODS
def test_what_is_no_parameter_is_frozen(method):
    model, reports = Network(Fixed), []
    before = leaves(model)
    after = leaves(method(model, batch(32), report=reports.append))
    assert changed(before, leaves(model)) == []
    assert changed(before, after)
    assert all(path.endswith("dense/kernel") for path in changed(before, after))
    frozen = [row for row in reports[0].rows if row.path.endswith("before/kernel")]
    assert len(frozen) == 3
    assert all(row.factor == 1 and row.note == "is a Frozen, no nnx.Param: frozen" for row in frozen)
    with pytest.raises(ValueError, match=r"kernels= leaves no .*\n  blocks/0/before/kernel: is a Frozen, no nnx.Param"):
        method(model, batch(32), kernels=lambda path: "before" in path)


@METHODS
def test_a_quantized_kernel_is_left_and_named(method):
    model, reports = Network(Quantized), []
    after = leaves(method(model, batch(32), report=reports.append))
    assert changed(leaves(Network(Quantized)), after)
    assert all(path.endswith("dense/kernel") for path in changed(leaves(model), after))
    assert "quantized; rescale before that: blocks/0/before/values (int8), blocks/1/before/values" in str(reports[0])


def test_a_network_that_is_quantized_as_a_whole_is_refused():
    with pytest.raises(ValueError, match=r"quantized, which has to come after rescaling: values \(int8\)"):
        rescale.lsuv(Quantized(nnx.Rngs(0)), batch(32))
