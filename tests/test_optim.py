import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfjax import data
from nfjax.training import optimizers as optim
from nfjax.training import schedules


def test_cosine_by_epoch_steps_exactly_at_the_end_of_each_epoch():
    size, batch, epochs = 50_000, 128, 200
    ends = [data.epoch_end(epoch, size, batch) for epoch in range(1, epochs + 1)]
    schedule = schedules.cosine_by_epoch(0.01, ends)
    steps = np.arange(ends[-1])
    epoch = np.searchsorted(ends, steps, side="right")
    np.testing.assert_allclose(
        jax.vmap(schedule)(steps), 0.005 * (1 + np.cos(math.pi * epoch / epochs)), rtol=1e-4, atol=1e-9
    )
    assert float(schedule(ends[0] - 1)) == pytest.approx(0.01)
    assert float(schedule(3125)) < float(schedule(3124))  # epoch 8 ends exactly there: 8 * 50 000 = 3 125 * 128


def test_cosine_by_step():
    schedule = schedules.cosine(0.1, [10])
    assert [float(schedule(step)) for step in (0, 5, 10)] == pytest.approx([0.1, 0.05, 0.0], abs=1e-8)


def test_warm_up_rises_linearly_to_the_schedule():
    schedule = schedules.warmed_up(lambda step: jnp.float32(0.1), 5)
    assert [float(schedule(step)) for step in range(7)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    plain = schedules.cosine(0.1, [10])
    assert schedules.warmed_up(plain, 0) is plain


PARAMS = {
    "blocks": {0: {"kernel": jnp.full((3, 3, 2, 4), 2.0), "alpha": jnp.array(3.0), "scale": jnp.full((4,), 5.0)}},
    "classifier": {"kernel": jnp.full((4, 5), 7.0), "bias": jnp.full((5,), 11.0)},
}


def updates(grads, steps=1, **settings):
    optimizer = optim.make("sgd", lambda step: 0.1, **settings)
    state = optimizer.init(PARAMS)
    for _ in range(steps):
        out, state = optimizer.update(grads, state, PARAMS)
    return out


def test_momentum_is_heavy_ball():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    for leaf in jax.tree.leaves(updates(ones, steps=3, momentum=0.9)):
        np.testing.assert_allclose(leaf, -0.1 * (1 + 0.9 + 0.81), rtol=1e-6)


def test_weight_decay_spares_biases_and_scalars():
    out = updates(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.5)
    np.testing.assert_allclose(out["blocks"][0]["kernel"], -0.1 * 0.5 * 2.0)
    np.testing.assert_allclose(out["classifier"]["kernel"], -0.1 * 0.5 * 7.0, rtol=1e-6)
    for spared in (out["blocks"][0]["alpha"], out["blocks"][0]["scale"], out["classifier"]["bias"]):
        np.testing.assert_array_equal(spared, jnp.zeros_like(spared))


def test_clipping_by_the_global_norm():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    norm = math.sqrt(sum(leaf.size for leaf in jax.tree.leaves(grads)))
    for leaf in jax.tree.leaves(updates(grads, clip_norm=0.5)):
        np.testing.assert_allclose(leaf, -0.1 * 0.5 / norm, rtol=1e-5)
    np.testing.assert_allclose(updates(grads, clip_norm=2 * norm)["blocks"][0]["alpha"], -0.1, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"weight_decay": 0.5, "mask": "all"}])
def test_single_numbers_may_have_a_rate_of_their_own(settings):
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    usual, slower = (updates(grads, steps=2, scalar_rate=rate, **settings) for rate in (1.0, 0.1))
    np.testing.assert_allclose(slower["blocks"][0].pop("alpha"), 0.1 * usual["blocks"][0].pop("alpha"), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(slower), jax.tree.leaves(usual), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adaptive_clipping_exempts_the_classifier():
    grads = jax.tree.map(lambda leaf: 100 * jnp.ones_like(leaf), PARAMS)
    out = updates(grads, adaptive_clip=0.01)
    # per output channel: 18 weights of 2, so |w| = 2 sqrt(18); the gradient is scaled to 0.01 |w|, 0.02 per entry
    np.testing.assert_allclose(out["blocks"][0]["kernel"], -0.1 * 0.02, rtol=1e-4)
    np.testing.assert_allclose(out["classifier"]["kernel"], -0.1 * 100, rtol=1e-6)
    np.testing.assert_allclose(out["classifier"]["bias"], -0.1 * 100, rtol=1e-6)
