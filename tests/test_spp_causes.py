"""What `diagnose` says of why a signal does not survive, and what it leaves unsaid of networks that are well."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import initializers, rescale, resnet, spp


def noise(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


HE = initializers.he_fan_in()


class Block(nnx.Module):
    """scale (x + layer(activation(x))), or without the shortcut."""

    def __init__(self, width, seed, init=HE, skip=True, scale=1.0, activation=nnx.relu, **dtypes):
        self.layer = nnx.Linear(width, width, kernel_init=init, rngs=nnx.Rngs(seed), **dtypes)
        self.skip, self.scale, self.activation = skip, scale, activation

    def __call__(self, x):
        out = self.layer(self.activation(x))
        return self.scale * (x + out) if self.skip else out


class Stack(nnx.Module):
    def __init__(self, count, width=32, **options):
        self.blocks = nnx.List([Block(width, seed, **options) for seed in range(count)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def causes(model, x, **options):
    return spp.propagate(model, x, **options).diagnose().causes


def told(found):
    return " | ".join(cause.what for cause in found)


def test_a_network_that_is_well_has_no_causes():
    profile = spp.propagate(Stack(12, scale=0.5**0.5), noise(64, 32))
    assert profile.diagnose().causes == ()
    assert profile.diagnose().healthy
    profile.assert_healthy()


def test_an_identity_shortcut_that_adds_variance():
    (cause,) = causes(Stack(12, width=256), noise(64, 256))
    assert cause.what == "an identity shortcut adds the variance of the branch at every block"
    growth = float(re.search(r"is ([0-9.]+) within the stages", cause.evidence)[1])
    assert growth == pytest.approx(2.0, rel=0.1)  # He's initialization: Var[f(x)] = E[x^2]
    assert 'residual="idshort"' in cause.remedy
    assert not cause.fatal
    assert causes(Stack(12, scale=0.5**0.5), noise(64, 32)) == ()  # the remedy


def tapering(init):
    """A ReLU network without shortcuts whose width halves at every layer."""

    class Model(nnx.Module):
        def __init__(self):
            widths = [4096, 2048, 1024, 512, 256, 128, 64]
            rngs = nnx.Rngs(0)
            self.layers = nnx.List(
                [nnx.Linear(a, b, kernel_init=init, rngs=rngs) for a, b in itertools.pairwise(widths)]
            )

        def __call__(self, x):
            for layer in self.layers:
                x = layer(nnx.relu(x))
            return x

    return Model()


@pytest.mark.parametrize(
    ("init", "needs", "remedy", "direction"),
    [
        # n_in = 2 n_out: with 2 / n_in the gradient halves at every layer, with 2 / n_out activations double.
        (initializers.he_fan_in(), "He fan-in, and the gradient needs 2 / n_out", "fan_out", "backward"),
        (initializers.he_fan_out(), "He fan-out, and the activations need 2 / n_in", "fan_in", "forward"),
    ],
)
def test_kernels_for_the_other_direction(init, needs, remedy, direction):
    model, x = tapering(init), noise(64, 4096)
    profile = spp.propagate(model, x, level="layer")
    verdict = getattr(profile.diagnose(), direction)
    assert verdict.per_block == pytest.approx(0.5 if direction == "backward" else 2.0, rel=0.15)
    (cause,) = profile.diagnose(tolerance=4.0).causes
    assert cause.what == f"kernels have the variance of {needs}"
    assert "6 of 6 kernels match" in cause.evidence
    assert remedy in cause.remedy
    assert f'direction="{direction}"' in cause.remedy


def test_kernels_without_the_gain_of_relu():
    model, x = Stack(16, skip=False, init=nnx.initializers.lecun_normal()), noise(256, 32)
    (cause,) = causes(model, x, level="layer")
    assert cause.what == "kernels without the gain of ReLU"
    assert "16 of 16 kernels have the variance 1 / n_in" in cause.evidence
    mended = rescale.lsuv(model, x, init=None)
    assert spp.propagate(mended, x, level="layer").diagnose().forward.verdict == "preserved"


def test_lecun_without_relu_is_no_cause():
    model = Stack(8, skip=False, init=nnx.initializers.lecun_normal(), activation=lambda x: x)
    assert causes(model, noise(256, 32), level="layer") == ()


def test_transitions_that_lose_the_square_of_the_stride():
    def network(init):
        return resnet.PreActResNet(34, "idshort", init=init, width=16, image_size=32, rngs=nnx.Rngs(0))

    x = noise(4, 32, 32, 3)
    found = causes(network("he_fan_out"), x)
    (cause,) = [cause for cause in found if cause.what.startswith("transitions")]
    assert cause.what == "transitions lose the square of the stride"
    assert "at 3 of 3 transitions, where the number of positions falls to 1 / 4" in cause.evidence
    assert "he_effective_fan_out" in cause.remedy
    assert "transitions" not in told(causes(network("he_effective_fan_out"), x))  # the remedy


def test_dead_units_are_told_of():
    model = Stack(3)
    model.blocks[0].layer.bias[...] = jnp.where(jnp.arange(32) < 24, -100.0, 0.0)
    (cause,) = causes(cut(model), noise(64, 32))
    assert cause.what == "most units of some blocks are dead: 0 for every input"
    assert cause.evidence == "75% in 'blocks/1', more than 50% in 1 of 3 blocks, of a batch of 64"
    assert cause.fatal


def cut(model):
    for block in model.blocks:
        block.skip = False
    return model


def test_few_examples_say_nothing_of_dead_units():
    model = cut(Stack(3))
    model.blocks[0].layer.bias[...] = jnp.where(jnp.arange(32) < 24, -100.0, 0.0)
    assert "dead" not in told(causes(model, noise(4, 32)))


def test_saturated_units_are_told_of():
    model = Stack(4, skip=False, activation=jnp.tanh, init=jax.nn.initializers.normal(4.0))
    (cause,) = [cause for cause in causes(model, noise(64, 32)) if "saturated" in cause.what]
    assert cause.what.startswith("most values of some blocks are saturated")
    assert cause.fatal


def test_inputs_that_become_the_same():
    found = causes(Stack(24, width=64, skip=False, init=initializers.he_normal("fan_in")), noise(64, 64))
    (cause,) = [cause for cause in found if "the same" in cause.what]
    assert "the cosine between the activations of two examples is" in cause.evidence
    assert cause.fatal


def test_branches_lost_in_rounding():
    options = {"init": jax.nn.initializers.normal(1e-4), "dtype": jnp.bfloat16}
    (cause,) = causes(Stack(4, **options), noise(64, 32, dtype=jnp.bfloat16))
    assert cause.what == "the branches of 4 blocks are lost in the rounding of bfloat16, from 'blocks/0'"
    assert "0.0039" in cause.evidence
    assert causes(Stack(4, init=jax.nn.initializers.normal(1e-4)), noise(64, 32)) == ()


def test_activations_that_underflow():
    model = Stack(3, skip=False, init=jax.nn.initializers.normal(1e-3), dtype=jnp.float16)
    found = causes(model, noise(64, 32, dtype=jnp.float16))
    profile = spp.propagate(model, noise(64, 32, dtype=jnp.float16))
    first = next(path for path, var in zip(profile.paths, profile.forward_var, strict=True) if var**0.5 < 6.1e-5)
    assert first != profile.paths[-1]
    assert found[0].what == f"the activations underflow in float16, at {first!r}"
    assert "loss scale" not in found[0].remedy
    assert found[0].fatal
    assert "dead" not in told(found)


def test_a_gradient_that_underflows():
    model = Stack(3, scale=0.5**0.5, dtype=jnp.float16)
    x = noise(64, 32, dtype=jnp.float16)
    (cause,) = causes(model, x, loss=lambda out: (out.astype(jnp.float32) ** 2).sum() * 1e-6)
    assert cause.what == "the gradient underflows in float16, at 'blocks/2'"
    assert "a loss scale" in cause.remedy
    assert causes(model, x, loss=lambda out: (out.astype(jnp.float32) ** 2).sum()) == ()


# ---------------------------------------------------------------- causes that are none


class PreNorm(nnx.Module):
    def __init__(self, rngs, norm=nnx.LayerNorm):
        self.norm = norm(32, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    def __init__(self, norm=nnx.LayerNorm):
        self.blocks = nnx.List([PreNorm(nnx.Rngs(i), norm) for i in range(4)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm])
@pytest.mark.parametrize("level", ["block", "layer"])
def test_a_variance_that_a_norm_keeps_positive_is_no_relu(norm, level):
    padded = noise(8, 10, 32).at[:, 6:].set(0.0)
    profile = spp.propagate(Transformer(norm), padded, level=level)
    assert np.isnan(profile.dead).all()
    assert "ReLU" not in told(profile.diagnose().causes)
    assert "dead" not in told(profile.diagnose().causes)


def test_images_of_noise_are_alike_behind_their_mean():
    class Pooled(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, 32, (3, 3), kernel_init=HE, rngs=rngs)
            self.heads = nnx.List([nnx.Linear(32, 32, kernel_init=HE, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            x = nnx.relu(self.conv(x)).mean(axis=(1, 2))
            for head in self.heads:
                x = head(x)
            return x

    profile = spp.propagate(Pooled(), noise(16, 32, 32, 3), level="layer")
    assert (profile.similarity[1:] > 0.99).all()
    assert "the same" not in told(profile.diagnose().causes)


def test_kernels_of_the_stem_explain_nothing():
    class Stemmed(nnx.Module):
        def __init__(self):
            self.stem = nnx.Linear(4, 64, kernel_init=HE, rngs=nnx.Rngs(9))
            self.body = Stack(8, width=64)

        def __call__(self, x):
            return self.body(self.stem(x))

    assert told(causes(Stemmed(), noise(64, 4))) == (
        "an identity shortcut adds the variance of the branch at every block"
    )


def test_kernels_behind_norms_are_blamed_for_nothing():
    class Normed(nnx.Module):
        def __init__(self):
            widths = [8, 16, 32, 64, 128, 256, 512]
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(a, b, kernel_init=HE, rngs=rngs) for a, b in itertools.pairwise(widths)])
            self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for b in widths[1:]])

        def __call__(self, x):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = nnx.relu(norm(layer(x)))
            return x

    profile = spp.propagate(Normed(), noise(64, 8), level="layer")
    assert len(profile.norms) == 6
    assert "kernels" not in told(profile.diagnose().causes)


def test_pooling_is_no_stride():
    class Pooled(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.blocks = nnx.List([PooledBlock(8 if i else 4, rngs) for i in range(4)])

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class PooledBlock(nnx.Module):
        def __init__(self, c_in, rngs):
            self.conv = nnx.Conv(c_in, 8, (3, 3), kernel_init=HE, rngs=rngs)

        def __call__(self, x):
            return nnx.max_pool(self.conv(nnx.relu(x)), (2, 2), (2, 2))

    found = causes(Pooled(), noise(8, 32, 32, 4), where=PooledBlock)
    assert "stride" not in told(found)


def test_a_shortcut_that_adds_little_is_not_what_explodes():
    model = Stack(8, init=jax.nn.initializers.variance_scaling(0.3, "fan_in", "normal"))
    model.blocks[7].layer.kernel[...] *= 1e4
    profile = spp.propagate(model, noise(64, 32))
    assert profile.diagnose().forward.verdict == "exploding"
    assert "shortcut" not in told(profile.diagnose().causes)


def test_layers_of_a_network_that_begins_as_the_identity_are_healthy():
    model = resnet.PreActResNet(10, "skipinit", width=8, image_size=16, rngs=nnx.Rngs(0))
    profile = spp.propagate(model, noise(8, 16, 16, 3), level="layer")
    profile.assert_healthy()


def test_activations_that_are_not_finite():
    model = Stack(4, scale=0.5**0.5)
    model.blocks[2].layer.bias[...] = jnp.full((32,), jnp.inf)
    found = causes(model, noise(64, 32))
    assert found[0].what == "the activations of 'blocks/2' are not finite"
    assert "everything before it is finite" in found[0].evidence
    nan = causes(Stack(4, scale=0.5**0.5), noise(64, 32).at[0, 0].set(jnp.nan))
    assert nan[0].evidence == "it is the first that is measured"


def test_a_gradient_that_is_not_finite():
    class Root(nnx.Module):
        def __init__(self):
            self.inner = Stack(3, scale=0.5**0.5)
            self.last = Block(32, 9, scale=0.5**0.5)

        def __call__(self, x):
            x = self.inner(x)
            return self.last(x + jnp.sqrt(0.0 * x))  # the root of 0 has no derivative

    found = causes(Root(), noise(64, 32), where=Block)
    assert found[0].what == "the gradient at the output of 'inner/blocks/2' is not finite, while all activations are"
    assert found[0].fatal


def test_a_zero_head_is_a_cause_that_a_note_tells():
    model = Stack(4, scale=0.5**0.5)

    class Headed(nnx.Module):
        def __init__(self):
            self.body = model
            self.head = nnx.Linear(32, 10, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(self.body(x))

    diagnosis = spp.propagate(Headed(), noise(64, 32), loss="cross_entropy").diagnose()
    (cause,) = [cause for cause in diagnosis.causes if cause.what.startswith("no gradient")]
    assert cause.what == "no gradient comes back through 'head/kernel'"
    assert cause.in_notes
    assert str(diagnosis).count("'head/kernel'") == 1


def test_norms_on_initial_statistics_are_a_cause_where_the_signal_is_lost():
    model = resnet.PreActResNet(18, "identity", "batch", width=8, image_size=16, rngs=nnx.Rngs(0))
    model.eval()
    diagnosis = spp.propagate(model, 10 * noise(8, 16, 16, 3)).diagnose(tolerance=1.2)
    (cause,) = [cause for cause in diagnosis.causes if cause.what == "norms that normalize nothing"]
    assert "still initial" in cause.evidence
    assert "model.train()" in cause.remedy
    model.train()
    trains = spp.propagate(model, 10 * noise(8, 16, 16, 3)).diagnose(tolerance=1.2)
    assert "norms" not in told(trains.causes)


def test_a_test_of_ones_own_model_fails_with_the_cause():
    profile = spp.propagate(Stack(12), noise(64, 32))
    with pytest.raises(AssertionError) as caught:
        profile.assert_healthy()
    message = str(caught.value)
    assert message.startswith("the network is not healthy\nactivation variance grows 1.9")
    assert "cause: an identity shortcut" in message
    assert "    because " in message
    assert "    try " in message
    profile.assert_healthy(tolerance=1e5)
    with pytest.raises(ValueError, match="must be more than 1"):
        profile.assert_healthy(tolerance=1.0)


def test_what_is_fatal_is_not_healthy_though_the_variance_is_preserved():
    rng = np.random.default_rng(0)
    model = Stack(2, skip=False, activation=jnp.tanh)
    for block in model.blocks:
        block.layer.kernel[...] = jnp.asarray(rng.normal(size=(32, 32)), jnp.float32) * 4
    profile = spp.propagate(model, 4 * noise(64, 32))
    assert profile.diagnose(tolerance=1e6).forward.verdict == "preserved"
    with pytest.raises(AssertionError, match="saturated"):
        profile.assert_healthy(tolerance=1e6)
