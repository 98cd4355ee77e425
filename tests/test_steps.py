"""The pieces that the loop is wired from, each against a computation by hand."""

import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tensorboardX.proto import event_pb2

from nfjax import augment, data, resnet
from nfjax.runs import checkpoint, metrics
from nfjax.training import checks, loader, networks, optimizers, preprocessing, schedules
from nfjax.training import loop as train
from nfjax.training import sharding as meshes
from nfjax.training import step as steps
from nfjax.training.state import Batch, TrainState


def small_model(norm=None, stage_sizes=(1, 1)):
    stages = {
        "stage_sizes": stage_sizes,
        "block": "basic",
    }  # less to compile
    return resnet.PreActResNet(None, "learnscalar", norm, width=4, num_classes=3, **stages, rngs=nnx.Rngs(0))


def images(count, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def scale(images):
    return images.astype(jnp.float32) / 255


def make_task(network, optimizer, preprocess=lambda key, x: scale(x), **settings):
    return steps.Task(network, optimizer, preprocess, **settings)


def train_step(task, key):
    """The step of a task, which leaves the state that it is given as it was."""
    return jax.jit(lambda state, batch: steps.train_step.__wrapped__(state, batch, key, task=task))


def a_batch(mask=(1.0, 1.0, 1.0, 1.0)):
    return Batch(jnp.asarray(images(4)), jnp.array([0, 1, 2, 0]), jnp.array(mask))


def by_norm():
    return pytest.mark.parametrize("norm", [None, "batch"])


@by_norm()
def test_network_is_the_model_in_both_modes(norm):
    model, x = small_model(norm), jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    network, params, batch_stats = networks.as_functions(model)
    logits, updated = network.train(params, batch_stats, x)
    predicted = network.predict(params, updated, x)
    model.train()
    np.testing.assert_allclose(logits, model(x), rtol=1e-5, atol=1e-6)
    model.eval()
    np.testing.assert_allclose(predicted, model(x), rtol=1e-5, atol=1e-6)
    if norm:
        assert float(jnp.abs(logits - predicted).max()) > 1e-3


def both_loaders(split, batch_size):
    order = (batch_size, 0, meshes.make())
    return loader.DeviceLoader(split, *order), loader.HostLoader(loader.taken(split), len(split), *order)


def test_evaluation_counts_every_example_once():
    """Seven examples in batches of four: equal to a mean over the seven by hand."""
    split = data.Images(images(7), np.array([0, 1, 2, 0, 1, 2, 0], np.int32))
    network, params, batch_stats = networks.as_functions(small_model())
    for batches in both_loaders(split, batch_size=4):
        parts = [
            (1, steps.eval_step(params, batch_stats, batch, network=network, normalize=scale))
            for batch in batches.evaluate()
        ]
        assert len(parts) == 2
        sums = steps.fetch(parts)
        logits = network.predict(params, batch_stats, jnp.asarray(split.images, jnp.float32) / 255)
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        assert sums["count"].sum() == 7
        assert sums["loss"].sum() == pytest.approx(-log_p[np.arange(7), split.labels].sum(), rel=1e-5)
        assert sums["correct"].sum() == (log_p.argmax(1) == split.labels).sum()


@by_norm()
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_training_step_by_hand(norm, smoothing):
    network, params, batch_stats = networks.as_functions(small_model(norm))
    batch = a_batch()

    def preprocess(key, x):
        return scale(x) + jax.random.normal(key, x.shape)

    optimizer, key = optax.sgd(0.1, momentum=0.9), jax.random.key(5)
    step = train_step(make_task(network, optimizer, preprocess, label_smoothing=smoothing), key)
    state = TrainState.start(params, batch_stats, optimizer)
    trace = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_of(params, batch_stats, x):
        logits, stats = network.train(params, batch_stats, x)
        targets = (1 - smoothing) * jax.nn.one_hot(batch.label, 3) + smoothing / 3
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean(), stats

    for number in range(2):
        x = preprocess(jax.random.fold_in(key, number), batch.image)
        (loss, stats), grads = loss_of(params, state.batch_stats, x)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, grads)
        params = jax.tree.map(lambda p, t: p - 0.1 * t, params, trace)
        state, sums = step(state, batch)
        assert float(sums["loss"]) == pytest.approx(4 * float(loss), rel=1e-5)
        assert float(sums["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
        for ours, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
        for ours, expected in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(stats), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert int(state.step) == 2


def test_an_example_that_could_not_be_read_counts_for_nothing():
    network, params, batch_stats = networks.as_functions(small_model())
    optimizer = optax.sgd(0.1)
    step = train_step(make_task(network, optimizer, label_smoothing=0.1), jax.random.key(0))
    state = TrainState.start(params, batch_stats, optimizer)
    batch = a_batch(mask=(1.0, 0.0, 1.0, 1.0))
    masked, sums = step(state, batch)
    without, expected = step(state, jax.tree.map(lambda x: x[jnp.array([0, 2, 3])], batch))
    assert {name: float(x) for name, x in sums.items()} == pytest.approx({n: float(x) for n, x in expected.items()})
    assert float(sums["count"]) == 3
    for ours, theirs in zip(jax.tree.leaves(masked.params), jax.tree.leaves(without.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_mixed_examples_have_the_loss_of_both_labels():
    network, params, batch_stats = networks.as_functions(small_model())
    batch = a_batch(mask=(1.0, 1.0, 0.0, 1.0))
    partner, weights = jnp.array([3, 0, 1, 2]), jnp.array([0.8, 0.3, 0.5, 1.0])

    def mix(key, x, mask):
        expected = jax.random.key_data(jax.random.fold_in(seed, 0))
        weight = jnp.where((jax.random.key_data(key) == expected).all(), weights, jnp.nan)
        share = weight[:, None, None, None]
        return share * x + (1 - share) * x[partner], partner, weight

    seed = jax.random.key(5)
    step = make_task(network, optax.sgd(0.1), mix=mix, label_smoothing=0.1)
    state = TrainState.start(params, batch_stats, optax.sgd(0.1))
    _, sums = train_step(step, seed)(state, batch)
    logits, _ = network.train(params, batch_stats, mix(jax.random.fold_in(seed, 0), scale(batch.image), 0)[0])
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected, correct = 0.0, 0
    for i in (0, 1, 3):
        for label, share in ((batch.label[i], weights[i]), (batch.label[partner[i]], 1 - weights[i])):
            expected -= share * (0.9 * log_p[i, label] + 0.1 * log_p[i].mean())
        correct += log_p[i].argmax() == int(batch.label[i if weights[i] >= 0.5 else partner[i]])
    assert float(sums["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert (float(sums["correct"]), float(sums["count"])) == (correct, 3)


def test_mixing_is_that_of_the_config(tiny_config):
    x, mask, key = jax.random.normal(jax.random.key(0), (8, 4, 4, 3)), jnp.ones(8), jax.random.key(1)
    assert preprocessing.make_mix(tiny_config) is None
    outcomes = {}
    for name, alphas in (("mixup", (0.2, 0.0)), ("cutmix", (0.0, 1.0)), ("both", (0.2, 1.0))):
        tiny_config.augment.mixup_alpha, tiny_config.augment.cutmix_alpha = alphas
        mix = jax.jit(preprocessing.make_mix(tiny_config))
        outcomes[name] = [np.asarray(mix(jax.random.fold_in(key, i), x, mask)[0]) for i in range(8)]
    kinds = [
        [name for name in ("mixup", "cutmix") if np.allclose(outcomes[name][i], outcomes["both"][i], atol=1e-6)]
        for i in range(8)
    ]
    assert sorted(set(map(tuple, kinds))) == [("cutmix",), ("mixup",)]
    pasted = (outcomes["cutmix"][0] == np.roll(x, 1, axis=0)) | (outcomes["cutmix"][0] == x)
    assert pasted.all()
    tiny_config.augment.mixup_alpha = -1.0
    with pytest.raises(ValueError, match=r"alpha=-1\.0: expected 0"):
        checks.check(tiny_config)


def test_erasing_writes_the_mean(tiny_config):
    tiny_config.augment.erasing_probability, tiny_config.data.image_size = 1.0, 16
    batch = jnp.full((64, 16, 16, 3), 255, jnp.uint8)
    tiny_config.augment.crop_padding = 0
    seen = np.asarray(preprocessing.make_preprocess(tiny_config)(jax.random.key(0), batch))
    erased = np.abs(seen).max(-1) < 0.01  # within half a grey level of the mean
    assert (erased | (seen.min(-1) > 1)).all()
    assert 0.02 < erased.mean() < 0.33
    assert erased.any((1, 2)).mean() > 0.9


@by_norm()
def test_parts_of_a_batch_add_up_to_it(norm, tiny_config):
    """The gradient of the whole batch, mixed and with an example that is not there; batch norm sees the parts."""
    network, params, batch_stats = networks.as_functions(small_model(norm, stage_sizes=(1,)))
    batch = Batch(jnp.asarray(images(8)), jnp.arange(8) % 3, jnp.ones(8).at[3].set(0.0))
    tiny_config.augment.mixup_alpha = 0.4
    outcomes = []
    for parts in (1, 2, 4):
        mix = preprocessing.make_mix(tiny_config)
        task = make_task(network, optax.sgd(0.1), mix=mix, label_smoothing=0.1, parts=parts)
        state = TrainState.start(params, batch_stats, optax.sgd(0.1))
        outcomes.append(train_step(task, jax.random.key(0))(state, batch))
    (whole, sums), *rest = outcomes
    for state, others in rest:
        assert float(others["count"]) == float(sums["count"]) == 7
        if norm is None:
            assert float(others["loss"]) == pytest.approx(float(sums["loss"]), rel=1e-6)
            assert float(others["grad_norm"]) == pytest.approx(float(sums["grad_norm"]), rel=1e-5)
            for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        else:
            assert float(others["loss"]) != float(sums["loss"])
            for after, before in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(batch_stats), strict=True):
                assert (np.asarray(after) != np.asarray(before)).any()


@pytest.mark.parametrize("kind", [0, 1], ids=["device", "host"])
def test_training_donates_its_state(kind):
    network, params, batch_stats = networks.as_functions(small_model())
    batches = both_loaders(data.Images(images(8), np.zeros(8, np.int32)), batch_size=4)[kind]
    state = TrainState.start(params, batch_stats, optax.sgd(0.1))
    (batch,) = batches.train(0, 1)
    steps.train_step(state, batch, jax.random.key(0), task=make_task(network, optax.sgd(0.1)))
    assert state.params["classifier"]["kernel"].is_deleted()


def test_many_steps_in_one_dispatch_are_the_steps_one_by_one():
    """Three steps in the shape of five: the same state, and sums of the three."""
    split = data.Images(images(8), (np.arange(8) % 3).astype(np.int32))
    network, params, batch_stats = networks.as_functions(small_model())
    task, key = make_task(network, optax.sgd(0.1)), jax.random.key(1)
    batches, _ = both_loaders(split, batch_size=4)
    start = TrainState.start(params, batch_stats, task.optimizer)
    each, parts = start, []
    for batch in batches.train(1, 4):
        each, sums = train_step(task, key)(each, batch)
        parts.append((1, sums))
    work = batches.train_steps(1, 3, length=5)
    assert work.indices.shape == (5, 4)
    state, sums = steps.train_steps(start, work, key, task=task)
    together, one_by_one = steps.fetch([(3, sums)]), steps.fetch(parts)
    assert int(state.step) == 3
    for name in ("loss", "correct", "count", "grad_norm"):
        assert together[name].shape == (3,)
        np.testing.assert_allclose(together[name], one_by_one[name], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(each.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_preprocessing_crops_then_flips_then_normalizes(tiny_config):
    batch, key = jnp.asarray(images(16)), jax.random.key(2)
    tiny_config.data.mean, tiny_config.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    ours = preprocessing.make_preprocess(tiny_config)(key, batch)
    crop_key, flip_key = jax.random.split(key)
    expected = augment.random_flip(flip_key, augment.random_crop(crop_key, batch, 1))
    np.testing.assert_allclose(
        ours, (np.asarray(expected) / 255 - (0.1, 0.2, 0.3)) / (0.4, 0.5, 0.6), rtol=1e-4, atol=1e-5
    )
    plain = preprocessing.make_normalize(tiny_config)(batch)
    np.testing.assert_allclose(
        plain, (np.asarray(batch) / 255 - (0.1, 0.2, 0.3)) / (0.4, 0.5, 0.6), rtol=1e-4, atol=1e-5
    )
    assert (np.asarray(ours) != np.asarray(plain)).any()


def scalars(folder):
    """Every (tag, step, value) of the TensorBoard events in a folder, in file order."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value


def test_the_config_reaches_the_run(tiny_config, tmp_path):
    """Learning rates, seeds, what is saved and what TensorBoard sees."""
    tiny_config.epochs, tiny_config.checkpoint.every_epochs, tiny_config.checkpoint.keep = 3, 2, 1
    train.train(tiny_config, str(tmp_path / "a"))
    records = metrics.read(tmp_path / "a")
    for record in records:
        if record["kind"] == "train":
            epoch = (record["step"] - 1) // 16  # of the last step: 16 steps an epoch
            assert record["learning_rate"] == pytest.approx(0.005 * (1 + np.cos(np.pi * epoch / 3)), rel=1e-5)
    reader = checkpoint.Checkpoints(tmp_path / "a", read_only=True)
    saved = reader.steps()
    reader.close()
    second, third = (record["test_accuracy"] for record in records if record["kind"] == "epoch" and record["epoch"] > 1)
    assert saved == ([32, 48] if second > third else [48])
    seen = {(tag, step): value for tag, step, value in scalars(tmp_path / "a")}
    for record in records:
        for name in ("loss", "train_loss", "test_accuracy"):
            if name in record:
                assert seen[f"{record['kind']}/{name}", record["step"]] == pytest.approx(record[name], rel=1e-6)

    tiny_config.epochs, tiny_config.seed = 1, 1
    train.train(tiny_config, str(tmp_path / "b"))
    assert metrics.read(tmp_path / "b")[0]["loss"] != records[0]["loss"]


def test_a_seed_draws_initialization_augmentation_and_order(tiny_config):
    def weights(seed):
        tiny_config.seed = seed
        key, _ = jax.random.split(jax.random.key(seed))
        return networks.build(tiny_config, 10, key).stem.conv.kernel[...]

    assert (weights(0) != weights(1)).any()
    assert (data.train_indices(0, 50, 10, 0, 5) != data.train_indices(1, 50, 10, 0, 5)).any()


def test_optimizer_settings_are_those_of_the_config(tiny_config):
    params = {"blocks": {"kernel": jnp.full((2, 2), 3.0)}, "classifier": {"kernel": jnp.full((2, 2), 2.0)}}
    grads = jax.tree.map(lambda p: 10 * jnp.ones_like(p), params)

    def first_update(**settings):
        config = tiny_config.copy_and_resolve_references()
        config.optim.update(settings)
        optimizer = optimizers.build(config, schedules.build(config, [10]))
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        second, _ = optimizer.update(grads, state, params)
        return float(updates["blocks"]["kernel"][0, 0]), float(updates["classifier"]["kernel"][0, 0]), second

    rate = tiny_config.optim.learning_rate
    blocks, classifier, second = first_update()
    assert (blocks, classifier) == pytest.approx((-rate * 10, -rate * 10))
    assert float(second["blocks"]["kernel"][0, 0]) == pytest.approx(-rate * 19)  # momentum 0.9
    blocks, classifier, _ = first_update(weight_decay=0.5)
    assert (blocks, classifier) == pytest.approx((-rate * 11.5, -rate * 11))
    norm = 10 * np.sqrt(8)
    assert first_update(clip_norm=1.0)[:2] == pytest.approx((-rate * 10 / norm, -rate * 10 / norm), rel=1e-5)
    assert first_update(adaptive_clip=0.1)[:2] == pytest.approx((-rate * 0.3, -rate * 10), rel=1e-4)
    assert first_update(momentum=0.0)[2]["blocks"]["kernel"][0, 0] == pytest.approx(-rate * 10)


def test_the_mesh_takes_all_devices():
    mesh = meshes.make()
    assert mesh.devices.size == jax.device_count()
    batches = both_loaders(data.Images(images(4), np.zeros(4, np.int32)), batch_size=4)[1]
    (batch,) = batches.evaluate()
    assert batch.image.sharding.spec == PartitionSpec(("data", "shard"))
