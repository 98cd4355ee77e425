"""Closed-form variances against what is measured."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfjax import residual, resnet, spp
from tests.conftest import TINY

SEEDS = 16
SIZE, WIDTH = 16, 32


def compare(depth, rule, norm, init):
    """Measured / predicted, forward and backward, [seeds, blocks]."""

    def make(seed):
        return resnet.PreActResNet(depth, rule, norm, init, width=WIDTH, image_size=SIZE, rngs=nnx.Rngs(seed))

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
def test_agrees_within_sampling_error_in_a_stage_of_bottlenecks(monkeypatch, rule, init):
    monkeypatch.setitem(resnet.STAGES, TINY, (resnet.BottleneckBlock, (3,)))
    forward, backward = compare(TINY, rule, None, init)
    for ratios in (backward, forward if init != "brock" else backward):
        error = ratios.std(axis=0, ddof=1) / SEEDS**0.5
        assert (np.abs(ratios.mean(axis=0) - 1) < 4 * error + 0.003).all()
    # Zero padding breaks the zero sum of Brock's weights at the border, which the closed form does not see.
    np.testing.assert_allclose(forward.mean(axis=0), 1.0, atol=0.1 if init == "brock" else 0.3)


@pytest.mark.parametrize(("rule", "init"), SCHEMES)
def test_transitions_strides_and_borders(monkeypatch, rule, init):
    """Through three transitions down to 2x2 pixels: the closed form stays within a quarter."""
    monkeypatch.setitem(resnet.STAGES, TINY, (resnet.BasicBlock, (1, 1, 1, 1)))
    forward, backward = compare(TINY, rule, None, init)
    np.testing.assert_allclose(np.median(backward, axis=0), 1.0, atol=0.1)
    np.testing.assert_allclose(np.median(forward, axis=0), 1.0, atol=0.25)


def test_batch_norm(monkeypatch):
    monkeypatch.setitem(resnet.STAGES, TINY, (resnet.BottleneckBlock, (3,)))
    forward, backward = compare(TINY, "identity", "batch", "he_fan_out")
    np.testing.assert_allclose(np.median(forward, axis=0), 1.0, atol=0.05)
    np.testing.assert_allclose(np.median(backward, axis=0), 1.0, atol=0.05)


def network(**settings):
    return resnet.PreActResNet(**{"depth": 18, "width": 4} | settings, rngs=nnx.Rngs(0))


def test_the_papers_rules_by_hand(monkeypatch):
    """Within a stage of 1x1 convolutions nothing is lost at borders, and the three rules stand alone."""

    class Pointwise(resnet.BasicBlock):
        @classmethod
        def layout(cls, position):
            c_in, c_out = position.in_features, position.out_features
            return [(c_in, c_out, 1, position.stride), (c_out, c_out, 1, 1)]

    monkeypatch.setitem(resnet.STAGES, TINY, (Pointwise, (4,)))
    shape = (8, 8, 3)
    conserved = spp.predict(network(depth=TINY, residual="idshort"), shape)
    np.testing.assert_allclose(conserved.backward_var, 1.0, rtol=1e-5)  # rules 2 and 3
    doubled = spp.predict(network(depth=TINY, residual="identity"), shape)
    np.testing.assert_allclose(doubled.backward_var, [8, 4, 2, 1], rtol=1e-5)
    np.testing.assert_allclose(doubled.forward_var / doubled.forward_var[0], [1, 2, 4, 8], rtol=1e-5)  # rule 1
    brock = spp.predict(network(depth=TINY, residual="idshort", init="brock"), shape)
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


def test_what_has_no_closed_form_is_refused():
    class Halved(residual.Residual):
        def __call__(self, x, activate, branch):
            return x + branch(activate(x)) / 2

    with pytest.raises(NotImplementedError, match="residual rule Halved"):
        spp.predict(network(residual=Halved), (32, 32, 3))
    with pytest.raises(NotImplementedError, match="norm LayerNorm"):
        spp.predict(network(norm=lambda features, dtype, rngs: nnx.LayerNorm(features, rngs=rngs)), (32, 32, 3))
    with pytest.raises(TypeError, match=r"networks of nfjax\.resnet only, not Linear"):
        spp.predict(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), (32, 32, 3))
    with pytest.raises(ValueError, match=r"input_shape=\(32, 32\)"):
        spp.predict(network(), (32, 32))
