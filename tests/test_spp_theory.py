"""Closed-form variances against what is measured."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import residual, resnet, spp

SEEDS = 16
SIZE, WIDTH = 16, 32


def compare(block, stage_sizes, rule, norm, init, activation="relu"):
    """Measured / predicted, forward and backward, [seeds, blocks]."""

    def make(seed):
        return resnet.PreActResNet(
            None,
            rule,
            norm,
            init,
            width=WIDTH,
            image_size=SIZE,
            block=block,
            stage_sizes=stage_sizes,
            activation=activation,
            rngs=nnx.Rngs(seed),
        )

    profile = spp.propagate_seeds(make, spp.noise((16, SIZE, SIZE, 3)), seeds=SEEDS)
    prediction = spp.predict(make(0), (SIZE, SIZE, 3))
    assert prediction.paths == profile.paths
    return profile.samples["forward_var"] / prediction.forward_var, (
        profile.samples["backward_var"] / prediction.backward_var
    )


SCHEMES = [
    ("identity", "he_fan_in"),
    ("convshort", "he_fan_out"),
    ("idshort", "brock"),
    ("convshort", "brock"),
    ("idshort", "he_effective_fan_out"),
]


@pytest.mark.parametrize(("rule", "init"), SCHEMES)
def test_agrees_within_sampling_error_in_a_stage_of_bottlenecks(rule, init):
    forward, backward = compare("bottleneck", (3,), rule, None, init)
    for ratios in (backward, forward if init != "brock" else backward):
        error = ratios.std(axis=0, ddof=1) / SEEDS**0.5
        assert (np.abs(ratios.mean(axis=0) - 1) < 4 * error + 0.003).all()
    # Zero padding breaks the zero sum of Brock's weights at the border, which the closed form does not see.
    np.testing.assert_allclose(forward.mean(axis=0), 1.0, atol=0.1 if init == "brock" else 0.3)


@pytest.mark.parametrize(("rule", "init"), SCHEMES)
def test_transitions_strides_and_borders(rule, init):
    """Through three transitions down to 2x2 pixels: the closed form stays within a quarter."""
    forward, backward = compare("basic", (1, 1, 1, 1), rule, None, init)
    np.testing.assert_allclose(np.median(backward, axis=0), 1.0, atol=0.1)
    np.testing.assert_allclose(np.median(forward, axis=0), 1.0, atol=0.25)


def test_batch_norm():
    forward, backward = compare("bottleneck", (3,), "identity", "batch", "he_fan_out")
    np.testing.assert_allclose(np.median(forward, axis=0), 1.0, atol=0.05)
    np.testing.assert_allclose(np.median(backward, axis=0), 1.0, atol=0.05)


@pytest.mark.parametrize(
    ("norm", "activation"), [(None, "silu"), (None, "gelu"), ("group", "relu"), ("dyt", "relu"), ("derf", "relu")]
)
def test_other_activations_and_norms(norm, activation):
    forward, backward = compare("bottleneck", (3,), "identity", norm, "he_fan_out", activation)
    np.testing.assert_allclose(np.median(forward, axis=0), 1.0, atol=0.15)
    np.testing.assert_allclose(np.median(backward, axis=0), 1.0, atol=0.1)


def network(**settings):
    depth = None if "stage_sizes" in settings else 18
    return resnet.PreActResNet(**{"depth": depth, "width": 4} | settings, rngs=nnx.Rngs(0))


class Pointwise(resnet.BasicBlock):
    """Of 1x1 convolutions: nothing is lost at borders, and the paper's three rules stand alone."""

    @classmethod
    def layout(cls, position):
        c_in, c_out = position.in_features, position.out_features
        return [(c_in, c_out, 1, position.stride), (c_out, c_out, 1, 1)]


def test_the_papers_rules_by_hand():
    four = {"block": Pointwise, "stage_sizes": (4,)}
    shape = (8, 8, 3)
    conserved = spp.predict(network(**four, residual="idshort"), shape)
    np.testing.assert_allclose(conserved.backward_var, 1.0, rtol=1e-5)  # rules 2 and 3
    doubled = spp.predict(network(**four, residual="identity"), shape)
    np.testing.assert_allclose(doubled.backward_var, [8, 4, 2, 1], rtol=1e-5)
    np.testing.assert_allclose(doubled.forward_var / doubled.forward_var[0], [1, 2, 4, 8], rtol=1e-5)  # rule 1
    brock = spp.predict(network(**four, residual="idshort", init="brock"), shape)
    np.testing.assert_allclose(brock.forward_var / brock.forward_var[0], 1.0, rtol=1e-5)
    growth = (1 + (1 / (1 - 1 / np.pi)) ** 2) / 2
    np.testing.assert_allclose(brock.backward_var, growth ** np.arange(3, -1, -1), rtol=1e-5)


def test_effective_fan_out_is_flat_at_every_depth():
    for depth in resnet.STAGES:
        for rule in ("idshort", "convshort"):
            prediction = spp.predict(network(depth=depth, residual=rule, init="he_effective_fan_out"), (32, 32, 3))
            np.testing.assert_allclose(prediction.backward_var, 1.0, rtol=1e-4)


def test_learned_scalars_count():
    model = network(residual="learnscalar")
    before = spp.predict(model, (32, 32, 3))
    model.blocks[0].residual.alpha[...] = jnp.float32(2.0)
    after = spp.predict(model, (32, 32, 3))
    assert after.forward_var[0] == pytest.approx(before.forward_var[0] * 5 / 2, rel=0.1)


def test_max_pooling_has_no_closed_form_forward():
    prediction = spp.predict(network(stem="imagenet", image_size=64), (1, 64, 64, 3))
    assert np.isnan(prediction.forward_var).all()
    assert np.isfinite(prediction.backward_var).all()


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_coefficients_by_hand(beta):
    """a^2 of the shortcut's, b^2 / beta^2 of the branch's: 0.25 + 0.64 / beta^2 both ways, within a stage."""

    def rule(position):
        return residual.Rule(residual.Learned("skip", 1.0, 0.5), 0.8, beta)

    four = {"block": Pointwise, "stage_sizes": (4,)}
    model = network(**four, residual=rule, init="he_fan_in")
    prediction = spp.predict(model, (8, 8, 3))
    gain = 0.25 + 0.64 / beta**2
    np.testing.assert_allclose(prediction.backward_var, gain ** np.arange(3.0, -1.0, -1.0), rtol=1e-5)
    np.testing.assert_allclose(prediction.forward_var / prediction.forward_var[0], gain ** np.arange(4.0), rtol=1e-5)
    model.blocks[1].residual.skip[...] = jnp.float32(0.0)  # a = 0: only the branch is left of that block
    after = spp.predict(model, (8, 8, 3))
    assert after.backward_var[0] / after.backward_var[1] == pytest.approx(0.64 / beta**2, rel=1e-5)


class Halved(resnet.BasicBlock):
    """A block of another form than the sum."""

    def __call__(self, x):
        z = self.activation(x)
        h = x if self.residual.shortcut is None else self.residual.shortcut(z)
        return h + self.branch(z) / 2


@pytest.mark.parametrize(
    "settings",
    [
        {"block": Halved},
        {"norm": lambda features, dtype, rngs: nnx.LayerNorm(features, rngs=rngs)},
    ],
    ids=["block", "norm"],
)
def test_what_has_no_closed_form_has_no_prediction(settings):
    model = network(**settings)
    assert spp.predict(model, (32, 32, 3)) is None
    profile = spp.propagate(model, jnp.ones((2, 8, 8, 3)))
    assert len(profile) == 8
    assert spp.plot({"own": profile}, None).axes
    assert spp.plot({"own": profile}, {"own": None}).axes


def test_trained_scales_of_dynamic_tanh_have_no_prediction():
    model = network(norm="dyt")
    assert spp.predict(model, (32, 32, 3)) is not None
    model.blocks[0].activation.norm.scale[...] *= 2.0
    assert spp.predict(model, (32, 32, 3)) is None


def test_what_is_no_network_of_ours_is_refused():
    with pytest.raises(TypeError, match=r"networks of nfjax\.resnet only, not Linear"):
        spp.predict(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), (32, 32, 3))
    with pytest.raises(ValueError, match=r"input_shape=\(32, 32\)"):
        spp.predict(network(), (32, 32))
