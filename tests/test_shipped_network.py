"""The network in results/nf_resnet14_cifar10: small, whole, what its card says, and the same in every version."""

import json
import pathlib

import jax
import numpy as np
import pytest
from sklearn import datasets

import nfjax
from nfjax.cli import settings
from nfjax.training import networks

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ROOT / "results" / "nf_resnet14_cifar10"
LABELS, PROBABILITIES = ["ship", "bird"], [0.97150, 0.94444]  # of scikit-learn's two photographs, when it was made


@pytest.fixture(scope="module")
def predictor():
    return nfjax.load(MODEL)


def test_it_is_small_and_whole(predictor):
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sizes.keys() == {"README.md", "config.json", "model.safetensors"}
    assert sum(sizes.values()) < 2**20
    assert sum(leaf.size for leaf in jax.tree.leaves(predictor.params)) == 175_258
    assert predictor.class_names[:4] == ("airplane", "automobile", "bird", "cat")


def test_it_is_the_network_of_its_config(predictor):
    config = settings.load("nf_resnet14_cifar10")
    assert predictor.architecture == networks.architecture(config)
    assert (predictor.origin.ema, predictor.origin.step) == (True, config.epochs * 50_000 // config.batch_size + 1)
    for section in ("optim", "augment"):
        told = predictor.origin.settings[section]
        assert told == json.loads(json.dumps({name: config[section][name] for name in told}))


def test_its_card_tells_its_accuracy(predictor):
    card = (MODEL / "README.md").read_text()
    origin = predictor.origin
    assert f"{origin.accuracy:.2%} of n = 10,000 test images of CIFAR-10 (JPEG copy)" in card
    guide = (ROOT / "docs" / "guides" / "using.md").read_text()
    assert f"right in {origin.accuracy:.1%} of the cases".replace("%", " %") in " ".join(guide.split())


def test_it_says_the_same_of_two_photographs_as_when_it_was_made(predictor):
    found = predictor(datasets.load_sample_images().images)
    assert found.labels == LABELS
    np.testing.assert_allclose(found.probabilities.max(axis=1), PROBABILITIES, atol=1e-4)
