"""The learning-rate finder: what it reads from a curve, and that it leaves nothing behind."""

import math
import os

import matplotlib.image
import numpy as np
import pytest

from nfjax import cli
from nfjax.training import rate_finder

STEPS = 400
RATES = np.geomspace(rate_finder.LEAST, rate_finder.MOST, STEPS)


def curve(noise=0.0, steepest=1e-2, explodes=0.3):
    """A loss that falls by 2 around the rate `steepest`, and rises behind `explodes`."""
    losses = 2.3 - 2 / (1 + (steepest / RATES) ** 3) + (RATES / explodes) ** 2
    return losses + noise * np.random.default_rng(0).normal(size=STEPS)


def test_the_rates_rise_evenly_on_a_logarithmic_scale():
    made = [float(rate_finder.ramp(number, STEPS)) for number in (0, 1, 100, STEPS - 1)]
    np.testing.assert_allclose(made, RATES[[0, 1, 100, STEPS - 1]], rtol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_finds_where_the_loss_falls_fastest_and_turns(noise):
    found = rate_finder.judge(RATES, curve(noise))
    assert abs(math.log10(found.steepest / 1e-2)) < 0.1
    assert 2e-2 < found.lowest < 0.15
    assert found.diverged == pytest.approx(10)
    assert rate_finder.judge(RATES[:300], curve(noise)[:300]).diverged is None


def test_what_falls_again_after_the_turn_is_luck():
    losses = curve()
    losses[RATES > 1] = 0.01
    assert rate_finder.judge(RATES, losses).steepest == rate_finder.judge(RATES, curve()).steepest


def test_divergence_is_told_from_noise():
    rng = np.random.default_rng(0)
    steady = (2.3 + 0.3 * rng.normal(size=200)).tolist()
    assert not any(rate_finder.has_diverged(steady[:n]) for n in range(1, 201))
    assert rate_finder.has_diverged([2.3, float("nan")])
    assert rate_finder.has_diverged([2.3, float("inf")])
    assert not rate_finder.has_diverged([1.0, 10.0])  # one batch
    assert rate_finder.has_diverged([1.0, 10.0, 10.0, 10.0])


def test_a_loss_that_is_not_finite_ends_the_curve():
    losses = curve()[:330]
    losses[-1] = np.nan
    found = rate_finder.judge(RATES[:330], losses)
    assert np.isfinite(found.smoothed).all()
    assert len(found.losses) == 329
    assert found.diverged == pytest.approx(RATES[329])


@pytest.mark.parametrize("losses", [np.full(STEPS, 2.3), np.linspace(2, 3, STEPS), np.full(STEPS, np.nan)])
def test_a_loss_that_does_not_fall_gives_no_suggestion(losses):
    with pytest.raises(ValueError, match=r"no learning rate from 1e-06 to .* makes the loss fall.*more --steps"):
        rate_finder.judge(RATES, losses)


def test_the_suggestion_is_for_the_batch_size_that_the_rate_is_set_for(tiny_config):
    found = rate_finder.judge(RATES, curve())
    alone = rate_finder.suggestion(found, tiny_config)
    assert alone == pytest.approx(found.steepest, rel=0.05)
    tiny_config.optim.reference_batch_size = 256  # of batches of 64
    assert rate_finder.suggestion(found, tiny_config) == pytest.approx(4 * alone, rel=0.05)
    assert "(for optim.reference_batch_size=256)" in rate_finder.explain(found, tiny_config)


def test_the_command_suggests_a_rate_draws_it_and_leaves_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [
        "--config.model.stage_sizes=(1,)", "--config.model.block=basic", "--config.model.width=4",
        "--config.train.onednn=False", "--config.train.keep_memory=False", "--config.model.norm=batch",
    ]  # fmt: skip
    command = ["train", "--config=digits_convshort", "--find-learning-rate", "--steps=150", "--out=curve.png"]
    assert cli.run([*command, *settings]) == 0
    out = capsys.readouterr().out
    assert "150 steps of 32 images, rates 1e-06 to 10" in out
    suggested = float(out.split("--config.optim.learning_rate=")[1].split()[0])
    assert 1e-4 < suggested < 10
    assert f"falls fastest at {suggested:.2g}, from 2." in out
    assert os.listdir(tmp_path) == ["curve.png"]
    assert matplotlib.image.imread("curve.png").std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--find-learning-rate", "--workdir=run"], "keeps nothing and runs in one process: expected neither", 2),
        (["--workdir=run", "--out=curve.png"], "--out and --steps go with --find-learning-rate", 2),
        (["--workdir=run", "--steps=3"], "--out and --steps go with --find-learning-rate", 2),
        (["--find-learning-rate", "--steps=3"], "steps=3: expected 50 or more", 1),
        (["--find-learning-rate", "--config.batch_size=5000"], "batch_size=5000 is more than the 1", 1),
    ],
)
def test_what_it_does_not_take(tmp_path, monkeypatch, capsys, arguments, message, code):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "--config=digits_convshort", *arguments]) == code
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
