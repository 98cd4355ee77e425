"""A run that begins with the weights of another: what is taken, what stays as it is, and how fast the rest learns."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_train import assert_equal, final_state, interrupt_at, records

import nfjax
from nfjax import config as configs
from nfjax import data, evaluate, inference, preemption
from nfjax.runs import checkpoint, files
from nfjax.training import checks, networks, optimizers, patterns, pretrained, rates, transfer
from nfjax.training import loop as train

FEW = 5  # classes of the data set that is tuned on, of the ten of the source


def small():
    """Two blocks with batch norm, and a batch norm before the head: every kind of array."""
    config = configs.base()
    config.batch_size, config.epochs, config.log.every_steps = 128, 1, 2
    config.model.update({"stage_sizes": (1, 1), "block": "basic", "width": 4, "norm": "batch"})
    config.data.source, config.data.image_size = "synthetic", 8
    config.augment.update({"crop_padding": 1, "rand_operations": 0})
    config.train.onednn = False
    return config


def few(directory="", image_size=8):
    """The made-up images of the first classes."""
    whole = data.load("synthetic", directory, image_size)

    def part(split):
        return split.part(np.flatnonzero(split.labels < FEW))

    return dataclasses.replace(whole, train=part(whole.train), test=part(whole.test), class_names=tuple("abcde"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run whose images were normalized in a way of their own."""
    folder, config = tmp_path_factory.mktemp("source"), small()
    config.data.mean, config.data.resize = (0.3, 0.4, 0.5), 9
    train.train(config, str(folder))
    return folder


@pytest.fixture
def tuned(source, monkeypatch):
    """The config of a run on other classes that begins there."""
    monkeypatch.setitem(data.DATASETS, "few", few)
    config = small()
    config.data.source, config.init_from, config.epochs = "few", str(source), 2
    config.data.image_size = 8
    return config


def arrays(folder, step=None):
    """{"params", "batch_stats", "opt", "ema"} of a checkpoint, each by path."""
    reader = checkpoint.Checkpoints(folder, read_only=True)
    state = reader.restore_untyped(reader.best_step() if step is None else step)["state"]
    reader.close()
    return {name: patterns.by_path(tree) for name, tree in state.items()}


def same_bits(left, right):
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


# ---------------------------------------------------------------- what a run begins with


def test_frozen_parts_keep_every_bit_and_the_rest_learns(source, tuned, tmp_path, capsys):
    tuned.optim.update({"freeze": "stem, blocks/0", "weight_decay": 0.1, "momentum": 0.9, "ema_decay": 0.9})
    train.train(tuned, str(tmp_path))
    before, after = arrays(source), arrays(tmp_path)
    for part in ("params", "batch_stats"):
        for path, theirs in before[part].items():
            frozen = path.startswith(("stem", "blocks/0"))
            assert same_bits(theirs, after[part][path]) == frozen, path
            assert same_bits(theirs, after["ema"][f"{part}/{path}"]) == frozen, path
    traces = [path for path in after["opt"] if "trace" in path]
    assert len(traces) == sum(not path.startswith(("stem", "blocks/0")) for path in before["params"])
    out = capsys.readouterr().out
    assert "init    data.mean=(0.3, 0.4, 0.5), as the source has it" in out
    assert "init    data.resize=9, as the source has it" in out
    assert "anew classifier/kernel [8, 5], of other classes than the source's [8, 10]" in out
    assert "other classes, so the head is drawn anew" in out
    held = [leaf.size for path, leaf in before["params"].items() if path.startswith(("stem", "blocks/0"))]
    assert f"frozen  {len(held)} of {len(before['params'])} arrays, {sum(held):,} of 1,409 parameters" in out
    kept = files.read_config(tmp_path)
    assert (kept.data.mean, kept.data.resize) == ((0.3, 0.4, 0.5), 9)
    record = json.loads((tmp_path / "init_from.json").read_text())
    assert (record["path"], record["step"], len(record["digest"])) == (str(source), 8, 16)
    assert set(record["taken"]) == {*before["params"], *before["batch_stats"]} - set(record["anew"])
    assert set(record["anew"]) == {"classifier/kernel", "classifier/bias"}
    assert record["left"] == {}
    newest = max(line["test_accuracy"] for line in records(tmp_path) if line["kind"] == "epoch")
    assert evaluate.evaluate(str(tmp_path))["accuracy"] == newest


def test_a_run_that_goes_on_never_needs_its_source_again(source, tuned, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    tuned.init_from = str(copy)
    tuned.optim.layer_decay = 0.5
    train.train(tuned, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(preemption.TrainingInterruptedError):
            train.train(tuned, str(tmp_path / "stopped"))
    shutil.rmtree(copy)
    train.train(tuned, str(tmp_path / "stopped"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert_equal(final_state(tuned, tmp_path / "stopped"), final_state(tuned, tmp_path / "whole"))
    tuned.init_from = str(source)
    with pytest.raises(ValueError, match=r"init_from: '.*copy' there, '.*source.*' now"):
        train.train(tuned, str(tmp_path / "stopped"))


def test_an_export_is_a_source_like_its_run(source, tmp_path):
    inference.export(nfjax.load(source), tmp_path / "exported", ["safetensors"])
    run, exported = pretrained.find(str(source)), pretrained.find(str(tmp_path / "exported"))
    assert exported.read().digest() == run.read().digest()
    assert (exported.step, exported.class_names) == (run.step, run.class_names)
    own = {
        name: tuple(value) if isinstance(value, list | tuple) else value for name, value in run.preprocessing.items()
    }
    assert exported.preprocessing == own | {"resize": None}  # its images are arrays, which nothing resizes
    assert exported.settings["width"] == 4
    weights = tmp_path / "exported" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="is not the file that"):
        exported.read()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="was exported without --format=safetensors"):
        exported.read()


@pytest.mark.parametrize("resize", [None, 12])
def test_of_an_export_images_are_resized_as_of_its_run(source, tmp_path, resize):
    run, folder = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(source, run)
    config, described = (json.loads((run / name).read_text()) for name in ("config.json", "data.json"))
    config["data"]["resize"] = resize
    (run / "config.json").write_text(json.dumps(config))
    (run / "data.json").write_text(json.dumps(described | {"identity": {}}))  # as of files, which are resized
    inference.export(nfjax.load(run), folder, ["safetensors"])
    assert nfjax.load(folder).preprocessing.resize == (resize or 8)
    assert pretrained.find(str(folder)).preprocessing["resize"] == resize
    for size in (6, 10):
        resolved = []
        for path in (run, folder):
            config = small()
            config.init_from, config.data.image_size = str(path), size
            resolved.append(pretrained.resolve(config).data)
        assert resolved[0].resize == resolved[1].resize == resize
        assert resolved[0] == resolved[1]


def test_what_is_set_wins_over_the_source_and_is_told(tuned, capsys):
    tuned.data.std = (0.5, 0.5, 0.5)
    resolved = pretrained.resolve(tuned)
    assert (resolved.data.mean, resolved.data.std, resolved.data.image_size) == ((0.3, 0.4, 0.5), (0.5,) * 3, 8)
    assert tuned.data.mean == configs.base().data.mean  # which is not changed
    assert "data.std=(0.5, 0.5, 0.5), as set; the source has (0.247, 0.2435, 0.2616)" in capsys.readouterr().out
    tuned.data.image_size = configs.base().data.image_size
    assert pretrained.resolve(tuned).data.image_size == 8
    tuned.init_from = None
    assert pretrained.resolve(tuned) is tuned


def begun(config, class_names, folder=None):
    """What a network of a config begins with, and what its initializer drew."""
    model = networks.build(config, len(class_names), jax.random.key(3))
    _, params, batch_stats = networks.as_functions(model)
    return patterns.by_path(transfer.begin(config, class_names, folder, params, batch_stats)[0]), params


def test_the_head_is_taken_where_the_classes_are_the_same(source, tuned, capsys):
    theirs = arrays(source)["params"]
    names = tuple(files.read_data(source).class_names)
    for class_names, taken in ((names, True), (names[::-1], False), (tuple("abcdefghij"), False)):
        made, drawn = begun(tuned, class_names)
        assert same_bits(theirs["classifier/kernel"], np.asarray(made["classifier/kernel"])) == taken
        assert same_bits(np.asarray(drawn["classifier"]["kernel"]), np.asarray(made["classifier/kernel"])) != taken
        assert same_bits(theirs["stem/conv/kernel"], np.asarray(made["stem/conv/kernel"]))
        assert ("the same classes, so the head is taken" in capsys.readouterr().out) == taken


def test_what_does_not_fit_is_listed_on_both_sides(source, tuned, tmp_path, capsys):
    tuned.model.stage_sizes, tuned.model.norm = (2,), None
    made, _ = begun(tuned, tuple("abcde"), tmp_path)
    out = capsys.readouterr().out
    record = pretrained.read_record(tmp_path)
    assert record.anew["blocks/1/branch/convolutions/0/kernel"] == "[3, 3, 4, 4], the source's is [3, 3, 4, 8]"
    assert record.anew["classifier/kernel"] == "[4, 5], of other classes than the source's [8, 10]"
    assert record.left["activation/norm/scale"] == "[8]"
    assert "blocks/0/branch/convolutions/0/kernel" in record.taken
    assert len(record.taken) + len(record.anew) == len(made)
    assert "anew blocks/1/branch/convolutions/0/kernel [3, 3, 4, 4], the source's is [3, 3, 4, 8]" in out
    assert f"and {len(record.anew) + len(record.left) - transfer.SHOWN} more: init_from.json names all" in out


def test_another_source_than_before_is_noticed(source, tuned, tmp_path, caplog):
    begun(tuned, tuple("abcde"), tmp_path)
    with caplog.at_level(logging.WARNING):
        begun(tuned, tuple("abcde"), tmp_path)
        assert "began with other weights" not in caplog.text
        record = json.loads((tmp_path / "init_from.json").read_text())
        (tmp_path / "init_from.json").write_text(json.dumps(record | {"digest": "0" * 16}))
        begun(tuned, tuple("abcde"), tmp_path)
        assert "began with other weights before: step 8" in caplog.text
    assert pretrained.read_record(tmp_path).digest == record["digest"]
    pretrained.remove_record(tmp_path)
    assert pretrained.read_record(tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.width": 8}, r"shares no weights with this one.*model\.width=4 there, 8 here.*Set --config\.model"),
        ({"model.rescale": "lsuv"}, r"model\.rescale=lsuv would change the trained kernels.*\.rescale=no"),
        ({"init_from": "nowhere"}, r"init_from=nowhere: there is no trained network; expected the --workdir of a trai"),
        ({"init_from": ""}, "init_from='' is empty: expected a name"),
    ],
)  # fmt: skip
def test_a_source_that_is_of_no_use(tuned, tmp_path, settings, message):
    tuned.update_from_flattened_dict(settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(tuned, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_source_without_a_checkpoint(source, tuned, tmp_path):
    shutil.copytree(source, tmp_path / "stopped", ignore=lambda folder, names: {"checkpoints"} & {*names})
    tuned.init_from = str(tmp_path / "stopped")
    with pytest.raises(ValueError, match="stopped before its first checkpoint; start it again first"):
        train.train(tuned, str(tmp_path / "run"))


# ---------------------------------------------------------------- parameters by their paths


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("stem", "stem/conv/kernel", True),
        ("blocks/1", "blocks/1/alpha", True),
        ("blocks/1", "blocks/10/alpha", False),
        ("blocks/?", "blocks/10/alpha", False),
        ("blocks/*/alpha", "blocks/10/alpha", True),
        ("blocks/*/alpha", "blocks/10/branch/alpha", False),
        ("**/bias", "classifier/bias", True),
        ("**/bias", "bias", True),
        ("blocks/**/kernel", "blocks/1/branch/0/kernel", True),
        ("blocks/**/kernel", "classifier/kernel", False),
        ("**", "stem/conv/kernel", True),
        ("a.b", "axb", False),
        ("kernel", "stem/conv/kernel", False),
    ],
)
def test_patterns(pattern, path, expected):
    assert patterns.matches((pattern,), path) == expected
    assert patterns.matches((), path) is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "sten"}, r"optim\.freeze=sten: no parameter matches 'sten'.*There are activation, blocks/0, block"),
        ({"freeze": "stem,blocks/7"}, "no parameter matches 'blocks/7'"),
        ({"freeze": ","}, r"optim\.freeze=',' has no pattern: expected some, such as"),
        ({"freeze": "**"}, r"optim\.freeze=\*\* freezes every parameter: expected one at least that learns"),
        ({"rate_by_pattern": "tail=2"}, r"optim\.rate_by_pattern=tail=2: no parameter matches 'tail'"),
        ({"rate_by_pattern": "head"}, "rate_by_pattern='head' has 'head': expected pattern=factor.*'head=10,blocks=1'"),
        ({"rate_by_pattern": "head=0"}, "expected pattern=factor, positive numbers"),
        ({"rate_by_pattern": "head=nan"}, "expected pattern=factor, positive numbers"),
        ({"rate_by_pattern": "head=1,head=2"}, "has 'head' twice"),
        ({"layer_decay": 1.5}, r"optim\.layer_decay=1\.5 must be more than 0, and at most 1"),
    ],
)
def test_wrong_patterns(settings, message):
    config = small()
    config.optim.update(settings)
    with pytest.raises(ValueError, match=message):
        checks.check(config)


def factors(config):
    """The factor of each part of the network, by the first of its parameters."""
    rate, found = rates.build(config), {}
    _, params, _ = networks.as_functions(networks.shapes(config))
    for path in patterns.by_path(params):
        found.setdefault(patterns.block_of(path), rate(path))
    return found


@pytest.mark.parametrize("remat", [False, True])
def test_layers_learn_slower_the_further_they_are_from_the_head(remat):
    config = small()
    config.optim.layer_decay, config.model.stage_sizes, config.model.remat = 0.5, (1, 1, 1), remat
    expected = {"stem": 1 / 16, "blocks/0": 1 / 8, "blocks/1": 1 / 4, "blocks/2": 1 / 2, "activation": 1}
    assert factors(config) == expected | {"classifier": 1}
    config.optim.rate_by_pattern = "blocks=3, blocks/1=5, head=10"
    assert factors(config) == {
        "stem": 1 / 16, "blocks/0": 3 / 8, "blocks/1": 5 / 4, "blocks/2": 3 / 2, "activation": 1, "classifier": 10,
    }  # fmt: skip


def test_depth_follows_the_image_and_no_name():
    """Of a model whose names are in another order than its layers."""

    class Reversed(nnx.Module):
        def __init__(self, rngs):
            self.zeroth, self.middle, self.a_last = (nnx.Linear(3, 3, rngs=rngs) for _ in range(3))

        def __call__(self, x):
            return self.a_last(self.middle(nnx.jit(lambda layer, x: layer(x))(self.zeroth, x)))

    network, params, batch_stats = networks.as_functions(Reversed(nnx.Rngs(0)))
    used = rates.first_uses(network.predict, params, batch_stats, jnp.ones((1, 3)))
    order = list(dict.fromkeys(path.partition("/")[0] for path in sorted(used, key=used.__getitem__)))
    assert order == ["zeroth", "middle", "a_last"]


PARAMS = {"stem": {"kernel": jnp.array([[-0.0, 1.5]])}, "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_frozen_parameters_have_no_state_and_keep_their_bits(name):
    optimizer = optimizers.make(
        name, lambda step: 0.1, momentum=0.9, weight_decay=0.1, mask="all", clip_norm=1.0, frozen=("stem",)
    )
    state, params = optimizer.init(PARAMS), PARAMS
    assert not [path for path in patterns.by_path(state) if "stem" in path]
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert same_bits(np.asarray(params["stem"]["kernel"]), np.asarray(PARAMS["stem"]["kernel"]))
    assert all((np.asarray(params["head"][k]) < 1).all() for k in ("kernel", "bias"))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_factor_of_the_rate_is_one_of_the_step_and_its_decay(name):
    settings = {"momentum": 0.9, "weight_decay": 0.1, "mask": "all"}
    grads = jax.tree.map(jnp.ones_like, PARAMS)

    def update(peak, **more):
        optimizer = optimizers.make(name, lambda step: peak, **settings, **more)
        return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]

    usual, slower = update(0.1), update(0.01)
    mixed = update(0.1, rate=lambda path: 0.1 if path.startswith("stem") else 1.0)
    np.testing.assert_allclose(mixed["stem"]["kernel"], slower["stem"]["kernel"], rtol=1e-6)
    for own, other in zip(jax.tree.leaves(mixed["head"]), jax.tree.leaves(usual["head"]), strict=True):
        np.testing.assert_array_equal(own, other)


def test_frozen_batch_norm_takes_its_running_statistics_and_sends_no_gradient():
    model = networks.build(small(), 3, jax.random.key(0))
    network, params, batch_stats = networks.as_functions(model, frozen=("stem", "blocks/0"))
    batch_stats = jax.tree.map(lambda leaf: leaf + 0.5, batch_stats)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

    def loss(params):
        logits, kept = network.train(params, batch_stats, images)
        return (logits**2).sum(), kept

    grads, kept = jax.jit(jax.grad(loss, has_aux=True))(params)
    for tree, moved in ((grads, 0.0), (kept, None)):
        for path, leaf in patterns.by_path(tree).items():
            still = patterns.by_path(batch_stats)[path] if moved is None else jnp.zeros_like(leaf)
            assert bool((leaf == still).all()) == path.startswith(("stem", "blocks/0")), path
    # Its running statistics: one image comes out as it does among others.
    alone, _ = network.model(params, batch_stats), None
    block = lambda x: alone.blocks[0](alone.stem(x))  # noqa: E731
    np.testing.assert_allclose(block(images[:1]), block(images)[:1], rtol=1e-5, atol=1e-6)
    assert alone.blocks[1].activation.norm.use_running_average is False


def test_batch_norm_of_linen_is_not_half_frozen():
    config = small()
    config.model.name, config.model.norm = "toys:LinenNetwork", None
    model = networks.build(config, 3, jax.random.key(0))
    with pytest.raises(ValueError, match=r"optim\.freeze=network/BatchNorm_0 has network/BatchNorm_0/.* of a Linen mo"):
        networks.as_functions(model, frozen=("network/BatchNorm_0",))
    network, params, batch_stats = networks.as_functions(model, frozen=("**/kernel", "**/scale"))
    _, kept = network.train(params, batch_stats, jnp.ones((2, 8, 8, 3)), jax.random.key(0))
    before = patterns.by_path(batch_stats)
    assert any(bool((leaf != before[path]).any()) for path, leaf in patterns.by_path(kept).items())
