"""Signal propagation: zeros that are a parameter's, and signals that nothing changes."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nfjax import resnet, spp
from nfjax.spp import _measuring
from tests.conftest import TINY

zeros, random = nnx.initializers.zeros, nnx.initializers.lecun_normal()


def images(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def var(x):
    return np.asarray(x, np.float64).var()


class Block(nnx.Module):
    """x + scale * second(relu(first(x))), or without the skip."""

    def __init__(self, seed, last=random, scale=1.0, skip=True, norm=False, gamma=None):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = nnx.Linear(8, 8, kernel_init=last, rngs=rngs)
        gamma = gamma or nnx.initializers.ones
        self.norm = nnx.LayerNorm(8, scale_init=gamma, rngs=rngs) if norm else None
        self.scale, self.skip = nnx.Param(jnp.full((8,), scale)), skip

    def residual(self, x):
        y = self.second(jax.nn.relu(self.first(x)))
        y = y if self.norm is None else self.norm(y)
        return self.scale[None, :] * y

    def __call__(self, x):
        return x + self.residual(x) if self.skip else self.residual(x)


class Model(nnx.Module):
    def __init__(self, blocks, head=random):
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(8, 3, kernel_init=head, rngs=nnx.Rngs(99))

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def measure(blocks, head=random, **settings):
    return spp.propagate(Model(blocks, head), images(16, 8), where=Block, **settings)


# ---------------------------------------------------------------- the branch's share


def test_the_share_of_what_a_block_adds():
    model, x = Model([Block(seed) for seed in range(3)]), images(16, 8)
    profile = spp.propagate(model, x, where=Block)
    for i, block in enumerate(model.blocks):
        y = block(x)
        np.testing.assert_allclose(profile.branch_share[i], var(y - x) / var(y), rtol=1e-5)
        x = y
    assert profile.diagnose().notes == ()


def test_the_share_of_what_is_called_a_branch(monkeypatch):
    """Our blocks': also where the block changes its shape."""
    model, x = resnet.PreActResNet(TINY, "idshort", width=4, image_size=8, rngs=nnx.Rngs(0)), images(4, 8, 8, 3)
    profile, y = spp.propagate(model, x), model.stem(x)
    for i, block in enumerate(model.blocks):
        branch, y = block.branch(block.activation(y)), block(y)
        np.testing.assert_allclose(profile.branch_share[i], var(branch) / var(y), rtol=1e-5)


def test_the_share_in_remat_and_scan():
    blocks = [Block(seed) for seed in range(3)]

    class Remat(Model):
        def __call__(self, x):
            for block in self.blocks:
                x = nnx.remat(lambda block, x: block(x))(block, x)
            return x

    class Scanned(nnx.Module):
        def __init__(self):
            states = [nnx.split(block)[1] for block in blocks]
            self.layers = nnx.merge(nnx.split(blocks[0])[0], jax.tree.map(lambda *s: jnp.stack(s), *states))

        def __call__(self, x):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    expected = measure(blocks).branch_share
    for model in (Remat(blocks), Scanned()):
        shares = spp.propagate(model, images(16, 8), where=Block).branch_share
        np.testing.assert_allclose(shares, expected, rtol=1e-5)


def test_of_several_inputs_the_one_that_is_added_to():
    class Cross(Block):
        def __call__(self, context, x):
            return x + self.residual(context)

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Cross(0), Cross(1)])

        def __call__(self, x):
            context = x
            for block in self.blocks:
                x = block(context, 3 * x)
            return x

    model, x = Net(), images(16, 8)
    profile = spp.propagate(model, x, where=Cross)
    added = model.blocks[0].residual(x)
    assert profile.branch_share[0] == pytest.approx(var(added) / var(3 * x + added), rel=1e-5)


def test_no_share_without_an_input_of_the_same_shape():
    class Widening(nnx.Module):
        def __init__(self, seed, width):
            self.layer = nnx.Linear(width, 2 * width, rngs=nnx.Rngs(seed))

        def __call__(self, x):
            return self.layer(x)

    profile = spp.propagate(nnx.Sequential(Widening(0, 8), Widening(1, 16)), images(16, 8), where=Widening)
    assert np.isnan(profile.branch_share).all()
    assert "branch_share" not in repr(profile)


def test_a_share_at_extreme_scales_and_low_precision():
    model = Model([Block(seed) for seed in range(2)])
    expected = spp.propagate(model, images(16, 8), where=Block).branch_share
    for scale in (1e-25, 1e18):
        shares = spp.propagate(model, images(16, 8) * scale, where=Block).branch_share
        np.testing.assert_allclose(shares, expected, rtol=1e-4)
    half = nnx.clone(model)
    nnx.update(half, jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(half)))
    for block in half.blocks:
        block.first.dtype = block.second.dtype = jnp.bfloat16
    half.head.dtype = jnp.bfloat16
    shares = spp.propagate(half, images(16, 8).astype(jnp.bfloat16), where=Block).branch_share
    np.testing.assert_allclose(shares, expected, rtol=0.05)


# ---------------------------------------------------------------- blocks that are the identity


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"last": zeros}, "'blocks/0/second/kernel', 'blocks/1/second/kernel', 'blocks/2/second/kernel' and 1 more"),
        ({"norm": True, "gamma": zeros}, "'blocks/0/norm/scale', 'blocks/1/norm/scale'"),
        ({"scale": 0.0}, "'blocks/0/scale', 'blocks/1/scale'"),
        ({"scale": 1e-5}, None),
    ],
)
def test_a_signal_that_is_preserved_by_doing_nothing(settings, named):
    profile = measure([Block(seed, **settings) for seed in range(4)])
    diagnosis = profile.diagnose()
    assert diagnosis.forward.verdict == diagnosis.backward.verdict == "preserved"
    assert (profile.branch_share < 1e-8).all()
    (note,) = diagnosis.notes
    assert "4 of 4 blocks are the identity" in note
    assert "that activation and gradient are preserved is trivial" in note
    assert (f"all zero: {named}" in note) if named else "all zero" not in note
    assert f"note: {note}" in str(diagnosis)


def test_the_share_of_a_branch_that_is_scaled_outside_of_it():
    """SkipInit: what is called a branch has a variance, and nothing of it is added."""

    class Skip(nnx.Module):
        def __init__(self, seed):
            self.branch = nnx.Linear(8, 8, rngs=nnx.Rngs(seed))
            self.alpha = nnx.Param(jnp.zeros(()))

        def __call__(self, x):
            return x + self.alpha[...] * self.branch(x)

    profile = spp.propagate(nnx.Sequential(*(Skip(seed) for seed in range(3))), images(16, 8), where=Skip)
    assert (profile.branch_var > 0.1).all()
    assert (profile.branch_share == 0).all()
    (note,) = profile.diagnose().notes
    assert "all zero: 'layers/0/alpha', 'layers/1/alpha', 'layers/2/alpha'" in note


def test_few_identities_among_others_and_small_branches_are_no_caveat():
    assert measure([Block(0, last=zeros), *(Block(seed) for seed in range(1, 4))]).diagnose().notes == ()
    small = measure([Block(seed, scale=0.2) for seed in range(4)])
    assert small.diagnose().forward.verdict == "preserved"
    assert small.diagnose().notes == ()


def test_linen_identities():
    class Residual(linen.Module):
        @linen.compact
        def __call__(self, x):
            y = linen.Dense(8)(jax.nn.relu(linen.Dense(8)(x)))
            return x + linen.LayerNorm(scale_init=linen.initializers.zeros, name="norm")(y)

    profile = spp.propagate(linen.Sequential([Residual() for _ in range(3)]), images(16, 8), where=Residual)
    (note,) = profile.diagnose().notes
    assert "3 of 3 blocks are the identity" in note
    assert "all zero: 'layers_0/norm/scale'" in note


# ---------------------------------------------------------------- zeros


def test_a_zero_head():
    profile = measure([Block(seed) for seed in range(3)], zeros, loss=lambda logits: logits[:, 0].sum())
    assert (profile.backward_var == 0).all()
    diagnosis = profile.diagnose()
    assert (diagnosis.backward.verdict, diagnosis.forward.verdict) == ("vanishing", "preserved")
    (note,) = diagnosis.notes
    assert "no gradient comes back through 'head/kernel', all zero" in note
    assert "without loss= the gradient starts at the last block" in note
    assert profile.zeros == {"blocks/2": ("head/kernel",)}
    assert json.loads(profile.to_json())["zeros"] == {"blocks/2": ["head/kernel"]}
    assert measure([Block(seed) for seed in range(3)], zeros).diagnose().notes == ()  # it starts before the head


def test_a_zero_kernel_in_a_chain():
    """Biases are zero too, and have nothing to do with it."""
    blocks = [Block(seed, skip=False, last=zeros if seed == 2 else random) for seed in range(4)]
    blocks[3].first.bias[...] = jnp.ones(8)  # a ReLU lets the gradient through
    profile = measure(blocks)
    assert (profile.backward_var > 0).tolist() == [False, False, True, True]
    forward, backward = profile.diagnose().notes
    assert forward.startswith("no activation comes through 'blocks/2/second/kernel', all zero")
    assert backward.startswith("no gradient comes back through 'blocks/2/second/kernel', all zero")
    assert "loss=" not in backward


def test_a_zero_kernel_before_all_blocks():
    class Stem(Model):
        def __init__(self, blocks):
            super().__init__(blocks)
            self.stem = nnx.Conv(8, 8, (3,), kernel_init=zeros, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return super().__call__(self.stem(x[None])[0])

    profile = spp.propagate(Stem([Block(0, skip=False), Block(1, skip=False)]), images(16, 8), where=Block)
    assert (profile.forward_var == 0).all()
    assert profile.diagnose().notes[0].startswith("no activation comes through 'stem/kernel', all zero")


def test_a_zero_gradient_without_a_zero_parameter():
    class Dead(Block):
        def __call__(self, x):
            return jax.nn.relu(-jnp.abs(super().__call__(x)) - 1.0)

    profile = measure([Block(0), Dead(1), Block(2, skip=False)])
    assert profile.backward_var[0] == 0
    assert profile.zeros == {}
    assert profile.diagnose().notes == ()


def test_zero_kernels_of_several_seeds_and_of_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            for i in range(2):
                x = x + linen.Dense(8, name=f"layer{i}")(jax.nn.relu(x))
            return linen.Dense(3, kernel_init=linen.initializers.zeros, name="head")(x)

    profile = spp.propagate_seeds(
        lambda seed: Net(), images(16, 8), seeds=2, where=lambda path, _: "layer" in path, loss=lambda y: y.sum()
    )
    assert profile.zeros == {"layer0": ("head/kernel",), "layer1": ("head/kernel",)}  # around layer1 by the skip
    assert "'head/kernel'" in profile.diagnose().notes[0]


def test_parameters_are_looked_at_only_where_something_is_zero(monkeypatch):
    def refused(*_):
        raise AssertionError

    monkeypatch.setattr(_measuring._variables, "zeros", refused)
    assert measure([Block(seed) for seed in range(2)]).zeros == {}


# ---------------------------------------------------------------- shown


def test_the_share_is_shown_and_written(tmp_path):
    profile = measure([Block(seed) for seed in range(2)])
    assert "branch_share" in repr(profile).splitlines()[1]
    profile.to_csv(tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    np.testing.assert_allclose([float(row["branch_share"]) for row in rows], profile.branch_share, rtol=1e-6)
    np.testing.assert_allclose(json.loads(profile.to_json())["branch_share"][0], profile.branch_share, rtol=1e-12)
    assert profile.quantile("branch_share", 1.0).shape == (2,)
