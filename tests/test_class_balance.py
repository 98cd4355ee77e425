"""Classes of unequal size: epochs that draw them equally, and weights of the loss."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_steps import a_batch, make_task, small_model
from test_train import assert_resumes_exactly

from nfjax import data
from nfjax.data.loading import labels, order
from nfjax.training import balance, checks, loader, losses, networks, rng, setup, sharding
from nfjax.training import loop as train
from nfjax.training import step as steps

# Of 103 examples 80 are of class 0, 19 of class 1, 3 of class 3, and one is of none.
LABELS = np.repeat([0, 1, 3, -1], [80, 19, 3, 1]).astype(np.int32)
SIZE = len(LABELS)


def epochs(count, seed=7):
    classes = order.Classes.of(LABELS)
    return [classes.epoch(seed, epoch, SIZE) for epoch in range(count)]


def test_every_epoch_has_as_many_of_each_class():
    for drawn in epochs(9):
        counts = np.bincount(LABELS[drawn], minlength=4)
        assert counts.sum() == SIZE
        assert counts[2] == 0
        assert sorted(counts)[1:] == [34, 34, 35]
    totals = np.bincount(LABELS[np.concatenate(epochs(9))], minlength=4)
    assert list(totals) == [309, 309, 0, 309]


def test_the_examples_of_a_class_come_equally_often_across_epochs():
    counts = np.bincount(np.concatenate(epochs(7)), minlength=SIZE)
    for label in (0, 1, 3):
        of_class = counts[label == LABELS]
        assert of_class.max() - of_class.min() <= 1
    assert counts[LABELS == -1].sum() == 0
    first = epochs(1)[0]
    assert len(set(first[LABELS[first] == 0])) == (LABELS[first] == 0).sum()  # none of a frequent class comes twice


def test_the_order_is_mixed_and_follows_from_seed_and_step():
    classes = order.Classes.of(LABELS)
    whole = data.train_indices(3, SIZE, 8, 0, 60, classes)
    np.testing.assert_array_equal(data.train_indices(3, SIZE, 8, 17, 5, order.Classes.of(LABELS)), whole[17:22])
    orders = list(data.train_orders(3, SIZE, 8, 17, 22, classes))
    np.testing.assert_array_equal([each.indices for each in orders], whole[17:22])
    np.testing.assert_array_equal(orders[0].positions, np.arange(17 * 8, 18 * 8))
    assert (data.train_indices(4, SIZE, 8, 0, 60, classes) != whole).mean() > 0.5
    runs = LABELS[whole.reshape(-1)[:SIZE]]
    assert 50 < (runs[1:] != runs[:-1]).sum() < 85  # of 102, two thirds by chance
    np.testing.assert_array_equal(data.train_indices(3, SIZE, 8, 17, 5), data.train_indices(3, SIZE, 8, 0, 60)[17:22])


def test_one_class_and_a_class_of_one():
    only = order.Classes.of(np.zeros(5, np.int32))
    assert sorted(only.epoch(0, 3, 5)) == [0, 1, 2, 3, 4]
    lonely = order.Classes.of(np.array([0, 0, 0, 1], np.int32)).epoch(0, 0, 4)
    assert (lonely == 3).sum() == 2
    with pytest.raises(ValueError, match="none of the 2 examples has a class"):
        order.Classes.of(np.array([-1, -1]))


# ---------------------------------------------------------------- from the images to a batch


def unequal(directory="", image_size=8):
    """The made-up images of three classes, of which one has most."""
    whole = data.load("synthetic", directory, image_size)

    def part(split):
        kept = np.concatenate([np.flatnonzero(split.labels == label)[:: 1 + 3 * label] for label in range(3)])
        return split.part(np.sort(kept))

    return dataclasses.replace(whole, train=part(whole.train), test=part(whole.test), class_names=("a", "b", "c"))


@pytest.fixture
def folder(tmp_path):
    """Image files: 9 bees, 3 ants, each of its own colour."""
    from PIL import Image

    for split in ("train", "test"):
        for label, (name, count) in enumerate((("ant", 3), ("bee", 9))):
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8, 3), 100 * label + 10 * i, np.uint8)).save(place / f"{i}.png")
    return tmp_path / "set"


def test_batches_are_the_same_wherever_the_images_are(tiny_config, folder):
    tiny_config.data.update({"source": "folder", "dir": str(folder), "balance_classes": True, "workers": 1})
    tiny_config.batch_size, made = 4, {}
    for keep in ("device", "host", "disk"):
        tiny_config.data.keep = keep
        dataset = loader.open_data(tiny_config, tiny_config.data.dir)
        built = loader.build(tiny_config, dataset, "train", sharding.make(), None)
        batches = list(built.train(2, 8))
        built.close()
        made[keep] = [(np.asarray(batch.image), np.asarray(batch.label)) for batch in batches]
        if keep == "device":
            examples = built.train_steps(2, 6, 6)
            np.testing.assert_array_equal(
                np.asarray(examples.examples.label)[examples.indices], [label for _, label in made[keep]]
            )
        (first,) = loader.train_orders(tiny_config, dataset.train, 2, 3)
        np.testing.assert_array_equal(first.indices, next(data.train_orders(0, 12, 4, 2, 3, built.classes)).indices)
    for images, names in zip(made["host"], made["disk"], strict=True):
        np.testing.assert_array_equal(images[0], names[0])
    for keep in ("host", "disk"):
        np.testing.assert_array_equal([label for _, label in made[keep]], [label for _, label in made["device"]])
    assert np.concatenate([label for _, label in made["disk"]])[4:16].sum() == 6  # positions 12 to 24: an epoch


def test_a_run_that_draws_classes_equally_resumes_bit_for_bit(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.DATASETS, "unequal", unequal)
    tiny_config.model.update({"stage_sizes": (1,), "block": "basic"})
    tiny_config.data.update({"source": "unequal", "balance_classes": True})
    tiny_config.optim.class_weights, tiny_config.batch_size = "1, 2.5, 1", 16
    train.train(tiny_config, str(tmp_path / "whole"))
    assert "weights of classes from 1 (a) to 2.5 (b)" in capsys.readouterr().out
    assert_resumes_exactly(tiny_config, tmp_path, monkeypatch, step=13)


class Unlisted:
    """A split whose labels nobody knows without reading."""

    def __init__(self, bad=()):
        self.bad, self.read = bad, 0

    def __len__(self):
        return 130

    def reference(self, index):
        return index

    def name(self, index):
        return str(index)

    def reader(self, reference):
        self.read += 1
        if reference in self.bad:
            raise ValueError("unreadable")
        return b"", reference % 3


def test_labels_are_read_once_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NFJAX_CACHE", str(tmp_path))
    split, expected = Unlisted(bad=(5,)), np.arange(130) % 3
    expected[5] = labels.UNKNOWN
    for _ in range(2):
        np.testing.assert_array_equal(labels.labels_of(split, lambda: "print"), expected)
    assert split.read == 130
    (kept,) = tmp_path.iterdir()
    again = Unlisted()
    np.testing.assert_array_equal(labels.labels_of(again, lambda: "print"), expected)
    assert again.read == 0
    np.testing.assert_array_equal(labels.labels_of(Unlisted(), lambda: "another"), np.arange(130) % 3)
    kept.write_bytes(kept.read_bytes()[:-8])
    np.testing.assert_array_equal(labels.labels_of(Unlisted(), lambda: "print"), np.arange(130) % 3)
    assert "cannot be read" in caplog.text
    assert len(os.listdir(tmp_path)) == 2


def test_labels_of_arrays_and_of_a_share_of_listed_files(folder):
    dataset = data.load("folder", str(folder), 8)
    np.testing.assert_array_equal(labels.labels_of(dataset.train), [0] * 3 + [1] * 9)
    np.testing.assert_array_equal(labels.labels_of(dataset.thinned(0.5).train), [0, 1, 1, 1, 1, 1])
    images = data.load("synthetic", "", 8).train
    assert labels.labels_of(images) is images.labels


# ---------------------------------------------------------------- weights of the loss


def test_balanced_weights_give_each_class_as_much():
    counts = np.array([80, 20, 0, 100])
    weights = losses.balanced_weights(counts)
    np.testing.assert_allclose(weights, [200 / 240, 200 / 60, 1, 200 / 300], rtol=1e-6)
    np.testing.assert_allclose((weights * counts)[[0, 1, 3]], 200 / 3, rtol=1e-6)
    assert weights.dtype == np.float32


def test_weights_of_a_config(tiny_config, monkeypatch):
    dataset = unequal()
    tiny_config.optim.class_weights = "balanced"
    counts = np.bincount(dataset.train.labels, minlength=3)
    found = balance.class_weights(tiny_config, dataset)
    np.testing.assert_allclose(found, counts.sum() / (3 * counts), rtol=1e-6)
    assert found[0] < found[1] < found[2]
    tiny_config.optim.class_weights = "1,2"
    with pytest.raises(
        ValueError, match=r"has 2 weights: expected one for each of the 3 classes, a, b, c, in this ord"
    ):
        balance.class_weights(tiny_config, dataset)
    tiny_config.optim.class_weights = None
    assert balance.class_weights(tiny_config, dataset) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optim.class_weights": "even"},
            "class_weights='even': expected balanced, or a positive number for each clas",
        ),
        ({"optim.class_weights": "1,0"}, "class_weights='1,0': expected balanced"),
        ({"optim.class_weights": "1,,2"}, "class_weights='1,,2': expected balanced"),
        ({"optim.class_weights": "1,inf"}, "class_weights='1,inf': expected balanced"),
        (
            {"optim.class_weights": "balanced", "data.balance_classes": True},
            "rare classes would count twice too much; expected one of the two",
        ),
    ],
)
def test_weights_that_cannot_be(tiny_config, settings, message):
    tiny_config.update_from_flattened_dict(settings)
    with pytest.raises(ValueError, match=message):
        checks.check(tiny_config)


def test_a_step_weighs_each_example_by_its_class():
    """Two classes mixed: each part of an example has the weight of its own class."""
    network, params, batch_stats = networks.as_functions(small_model(stage_sizes=(1,)))
    smoothing = 0.1
    weights, batch = (0.5, 2.0, 3.0), a_batch((1.0, 1.0, 1.0, 0.0))
    partner, share = jnp.array([1, 2, 0, 3], jnp.int32), jnp.array([0.75, 0.75, 1.0, 1.0])
    mix = lambda key, images, mask: (images, partner, share)  # noqa: E731
    task = make_task(network, optax.sgd(0.1), mix=mix, label_smoothing=smoothing, class_weights=weights)
    examples = steps.make_examples(batch, jax.random.key(0), task)
    logits, _ = jax.jit(network.train)(params, batch_stats, examples["image"])
    each = [np.asarray(losses.cross_entropy(logits, jnp.full(4, label), smoothing)) for label in range(3)]
    own, other = np.array([0, 1, 2, 0]), np.array([1, 2, 0, 0])
    by_hand = [
        share[i] * weights[own[i]] * each[own[i]][i] + (1 - share[i]) * weights[other[i]] * each[other[i]][i]
        for i in range(3)
    ]
    state = setup.TrainState.start(params, batch_stats, task.optimizer)
    differentiate = jax.jit(lambda state, examples, key: steps.differentiate(state, examples, key, task)[1:3])
    loss, sums = differentiate(state, examples, rng.of_step(jax.random.key(0), 0))
    np.testing.assert_allclose(float(loss), np.mean(by_hand), rtol=1e-5)
    np.testing.assert_allclose(float(sums["loss"]), np.sum(by_hand), rtol=1e-5)
