"""Weights from PyTorch: timm's networks, whose outputs are kept in a file, are the same functions here.

`python -m benchmarks.timm_weights --small=tests/timm_weights.npz` wrote that file.
"""

import functools
import json
import pathlib
import pickle
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nfjax
from nfjax import cli, layers, resnet
from nfjax.cli import _parser, settings
from nfjax.inference import _safetensors, torch_weights
from nfjax.training import patterns, pretrained, train
from tests import photographs

KEPT = pathlib.Path(__file__).parent / "timm_weights.npz"
NETWORKS = {
    "small_basic": {"block": "basic", "norm": "batch", "width": 8, "stage_sizes": (1, 2), "residual": "identity"},
    "small_bottleneck": {"block": "bottleneck", "norm": "batch", "width": 8, "stage_sizes": (1, 2)},
    "small_bit": {"block": "bottleneck", "norm": "group", "width": 32, "stage_sizes": (2,)},
    "small_nf": {"block": "bottleneck", "residual": "nf", "width": 8, "stage_sizes": (1, 2), "num_classes": 5},
}


@functools.cache
def kept(name):
    """(weights by PyTorch's names, images [B, 3, H, W], logits)."""
    with np.load(KEPT) as file:
        found = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    weights = {key.removeprefix("weights/"): value for key, value in found.items() if key.startswith("weights/")}
    return weights, found["images"], found["logits"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_is_the_same_function(name):
    weights, images, logits = kept(name)
    model, settings = torch_weights.convert({f"module.{key}": value for key, value in weights.items()})
    assert settings.items() >= NETWORKS[name].items()
    found = jax.jit(lambda state, x: nnx.merge(nnx.graphdef(model), state)(x))(
        nnx.state(model), images.transpose(0, 2, 3, 1)
    )
    assert np.abs(found - logits).max() < 1e-5 * logits.std()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))


def test_every_value_counts():
    """Each array of ours follows from theirs: with other values there, it is another."""
    weights, *_ = kept("small_nf")
    model, _ = torch_weights.convert(weights)
    other, _ = torch_weights.convert({name: value + 0.1 * value**2 + 0.1 for name, value in weights.items()})
    pairs = zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(other)), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)


def test_what_does_not_fit_is_listed():
    weights, *_ = kept("small_basic")

    def told(**changes):
        with pytest.raises(ValueError, match="the weights are of no network that is known here: ") as caught:
            torch_weights.convert({name: value for name, value in (weights | changes).items() if value is not None})
        return str(caught.value)

    assert "stages.1.blocks.1.conv2.weight is missing" in told(**{"stages.1.blocks.1.conv2.weight": None})
    wider = np.zeros((16, 16, 5, 5), np.float32)
    assert (
        "stages.1.blocks.1.conv2. has [5, 5, 16, 16] where blocks/2/branch/convolutions/1/kernel has [3, 3, 16, 16]"
        in told(**{"stages.1.blocks.1.conv2.weight": wider})
    )
    assert "stages.0.blocks.0.se.fc1.weight [8] is left over" in told(
        **{"stages.0.blocks.0.se.fc1.weight": np.zeros(8, np.float32)}
    )
    with pytest.raises(ValueError, match=r"found layer1.0.conv1.weight; ResNets of torchvision activate behind"):
        torch_weights.convert({"layer1.0.conv1.weight": np.zeros((1, 1, 1, 1))})
    with pytest.raises(ValueError, match="found nothing"):
        torch_weights.convert({})
    with pytest.raises(ValueError, match=r"no head\.fc\.weight: the number of classes is unknown"):
        torch_weights.convert({name: value for name, value in weights.items() if not name.startswith("head")})


def test_batch_norm_without_its_statistics_is_not_taken_for_bit():
    weights = {name: value for name, value in kept("small_basic")[0].items() if "running" not in name}
    with pytest.raises(ValueError, match=r"norm.running_mean is missing, .*save model.state_dict\(\)"):
        torch_weights.convert(weights)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
    weights = dict(kept("small_nf")[0])
    weights["stem.conv.weight"] = np.full_like(weights["stem.conv.weight"], value)
    with pytest.raises(ValueError, match=r"stem.conv.weight has values that are not finite"):
        torch_weights.convert(weights)


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        torch_weights.read(str(tmp_path / "none.pth"))
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a name that ends with \.safetensors, \.pth"):
        torch_weights.read(str(tmp_path / "weights.h5"))
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises((ImportError, ValueError), match=r"PyTorch alone reads safely|holds more than weights"):
        torch_weights.read(str(tmp_path / "model.pth"))


def test_mean_pooled_shortcuts():
    """Against the mean of the pixels that there are, by hand."""
    make = functools.partial(
        layers.with_mean_pooled_shortcuts,
        init=jax.nn.initializers.ones,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
        conv=layers.convolution,
    )
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    found = make(1, 1, 1, 2, (3, 5))(x)
    expected = [[(0 + 1 + 5 + 6) / 4, (2 + 3 + 7 + 8) / 4, (4 + 9) / 2], [10.5, 12.5, 14.0]]
    np.testing.assert_allclose(found[0, :, :, 0], expected)
    assert isinstance(make(1, 1, 1, 1, (3, 5)), nnx.Conv)
    assert isinstance(make(1, 1, 3, 2, (3, 5)), nnx.Conv)


def test_the_stem_of_bit_sees_zeros_around():
    """Of a negative input the largest value at the border is that of the padding."""
    stem = torch_weights.BitStem(
        1,
        (8, 8),
        functools.partial(layers.convolution, init=jax.nn.initializers.ones, dtype=jnp.float32),
        rngs=nnx.Rngs(0),
    )
    y = stem(-jnp.ones((1, 8, 8, 3)))
    assert float(y[0, 0, 0, 0]) == 0.0
    assert float(y[0, 1, 1, 0]) < 0
    assert y.shape == (1, *stem.spatial_size, 1)
    plain = resnet.ImageNetStem(
        1,
        (8, 8),
        functools.partial(layers.convolution, init=jax.nn.initializers.ones, dtype=jnp.float32),
        rngs=nnx.Rngs(0),
    )
    assert float(plain(-jnp.ones((1, 8, 8, 3))).max()) < 0


def test_the_command_makes_a_model(tmp_path, capsys):
    weights, images, logits = kept("small_nf")
    file, out, names = tmp_path / "theirs.safetensors", tmp_path / "model", tmp_path / "names.txt"
    file.write_bytes(_safetensors.encode(weights))
    names.write_text("ant\nbee\ncow\ndog\neel\n")
    command = ["import", f"--weights={file}", f"--out={out}", f"--class-names={names}", "--image-size=33"]
    assert cli.run(command) == 0
    told = capsys.readouterr().out
    assert "residual nf, stem imagenet" in told
    assert "short side 38, middle 33x33, mean (0.485, 0.456, 0.406)" in told
    assert "as timm has it" in told
    line = told.splitlines()[-1]
    assert line.startswith("to fine-tune it: nfjax train --config=CONFIG ")
    source, flags = pretrained.find(str(out)), shlex.split(line)[7:]
    assert all(flag.startswith("--config.model.") for flag in flags)
    assert (
        cli.run(["cost", "--config=cifar10_convshort", "--num-classes=5", "--config.data.image_size=33", *flags]) == 0
    )
    count = sum(leaf.size for leaf in source.read().params.values())
    assert re.search(rf"^parameters +{count:,}$", capsys.readouterr().out, re.M)
    assert source.class_names == ("ant", "bee", "cow", "dog", "eel")
    predictor = nfjax.load(out)  # nfjax's own functions need no trust
    assert predictor.class_names == ("ant", "bee", "cow", "dog", "eel")
    normalized = predictor.network.predict(predictor.params, predictor.batch_stats, images.transpose(0, 2, 3, 1))
    assert np.abs(normalized - logits).max() < 1e-5 * logits.std()
    assert "Exported by nfjax" in (out / "README.md").read_text()

    def refused(*arguments):
        code = cli.run([*command, *arguments])
        return code, capsys.readouterr().err

    assert "is an export already" in refused()[1]
    names.write_text("ant\nbee\n")
    assert refused("--overwrite") == (2, f"nfjax: --class-names={names} has 2 names: expected 5, one for each logit\n")
    names.write_text("ant\nbee\nant\ndog\neel\n")
    assert "has 'ant' more than once" in refused("--overwrite")[1]
    assert "'0.5': expected three numbers, such as 0.485,0.456,0.406" in refused("--mean=0.5")[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}" in refused("--overwrite")[1]
    assert "follow the header" in refused("--overwrite")[1]


def test_what_was_imported_is_fine_tuned(tmp_path, capsys):
    """By the flags that the command prints: every weight but the head's is PyTorch's, and the frozen ones stay it."""
    photographs.write(tmp_path / "set")
    weights, _, _ = kept("small_basic")
    (tmp_path / "theirs.safetensors").write_bytes(_safetensors.encode(weights))
    out = tmp_path / "model"
    assert cli.run(["import", f"--weights={tmp_path / 'theirs.safetensors'}", f"--out={out}", "--image-size=33"]) == 0
    flags = shlex.split(capsys.readouterr().out.splitlines()[-1])[6:]
    assert flags[0] == f"--config.init_from={out}"
    own = ["batch_size=8", "epochs=1", f"data.dir={tmp_path / 'set'}", "optim.freeze=stem,blocks/0,blocks/1"]
    quick = ["augment.rand_operations=0", "train.onednn=false", "data.keep=host"]
    settled, _ = _parser.separate([*flags, *(f"--config.{setting}" for setting in [*own, *quick])])
    config = settings.load("cifar10_convshort")
    config.update_from_flattened_dict(settings.values(config, settled))
    train(config, tmp_path / "run")

    before, after = (patterns.by_path(nfjax.load(path).params) for path in (out, tmp_path / "run"))
    assert before.keys() == after.keys()
    frozen = [name for name in before if name.startswith(("stem/", "blocks/0/", "blocks/1/"))]
    assert len(frozen) > 10
    for name in frozen:
        np.testing.assert_array_equal(before[name], after[name])
    moved = [name for name in before if name.startswith("blocks/2/") and (before[name] != after[name]).any()]
    assert len(moved) > 3
    assert (before["classifier/kernel"].shape, after["classifier/kernel"].shape) == ((16, 5), (16, 2))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["data"]["image_size"] == 33
    assert written["data"]["mean"] == list(torch_weights.COLOURS["identity"][0])
