"""An exported network: the same numbers in every format, in later versions, and in a process without nfjax; and what
is no such export, or lies, is refused.
"""

import dataclasses
import errno
import functools
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import nfjax
from nfjax import cli, inference, storage
from nfjax import config as configs
from nfjax.inference import _card, _folder, _onnx, _safetensors, formats, torch_weights
from nfjax.runs import files
from nfjax.training import deployment, loop, networks
from tests import photographs, test_torch_weights, toys
from tests.conftest import TINY
from tests.photographs import SIZE

OLD = pathlib.Path(__file__).parent / "exported"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return photographs.train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def predictor(run):
    return nfjax.load(run[0], batch_size=8)


@pytest.fixture(scope="module")
def exported(predictor, tmp_path_factory):
    """A folder with the weights alone."""
    folder = tmp_path_factory.mktemp("exported") / "weights"
    inference.export(predictor, folder, ["safetensors"], licence="cc-by-4.0")
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of it, to be damaged."""
    return pathlib.Path(shutil.copytree(exported, tmp_path / "copy"))


def images(count=5, size=SIZE):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def arrays(predictor):
    return _folder.arrays_by_name(predictor.params, predictor.batch_stats)


# ---------------------------------------------------------------- the same numbers


def test_weights_and_settings_come_back_bit_for_bit(predictor, exported):
    again = nfjax.load(exported, batch_size=8)
    before, after = arrays(predictor), arrays(again)
    assert list(before) == list(after)
    assert {name.partition("/")[0] for name in before} == {"params", "batch_stats"}
    for name, array in before.items():
        assert array.dtype == after[name].dtype == jnp.float32
        np.testing.assert_array_equal(array, after[name])
    for name in ("preprocessing", "class_names", "architecture", "origin"):
        assert getattr(again, name) == getattr(predictor, name)
    np.testing.assert_array_equal(again(images()).probabilities, predictor(images()).probabilities)
    assert {path.name for path in exported.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert storage.read_json(exported / "config.json", dict, "")["nfjax_format"] == 1


def test_the_program_runs_without_nfjax(predictor, tmp_path):
    pytest.importorskip("flatbuffers")
    (result,) = inference.export(predictor, tmp_path / "program", ["stablehlo"])
    assert (result.file, result.images, result.bound) == ("model.stablehlo", 8, 1e-4)
    assert result.difference <= 1e-6
    np.save(tmp_path / "images.npy", images(3))
    code = (
        "import sys, jax, numpy as np\n"
        "program = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))\n"
        "np.save(sys.argv[2], program.call(np.load(sys.argv[3])))\n"
        "print('nfjax' in sys.modules, 'flax' in sys.modules, *program.platforms, program.in_avals[0])"
    )
    paths = [tmp_path / name for name in ("program/model.stablehlo", "out.npy", "images.npy")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "cpu", "cuda", "tpu", f"uint8[batch,{SIZE},{SIZE},3]"], done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), predictor.of_pixels(images(3)), atol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors: it was exported without --format=safet"):
        nfjax.load(tmp_path / "program")


def test_the_program_of_the_card_is_the_one_that_works(predictor, tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers")
    formats.FORMATS["stablehlo"].write(predictor, tmp_path / "model.stablehlo")
    card = _card.text(predictor, [_card.Compared("stablehlo", "model.stablehlo", 1, 0, 0, 1)], None, ("cpu",))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    space = {}
    exec(code.replace("FOLDER", str(tmp_path)), space)
    assert space["probabilities"].shape == (1, 2)


def test_in_bfloat16_it_differs_by_rounding_only(run, tmp_path):
    half = nfjax.load(run[0], dtype="bfloat16", batch_size=8)
    inference.export(half, tmp_path / "half", ["safetensors"])
    again = nfjax.load(tmp_path / "half", batch_size=8)
    assert again.architecture.dtype == "bfloat16"
    np.testing.assert_array_equal(again(images()).probabilities, half(images()).probabilities)
    whole = nfjax.load(tmp_path / "half", dtype="float32", batch_size=8)
    np.testing.assert_array_equal(arrays(whole)["params/classifier/kernel"], arrays(half)["params/classifier/kernel"])


def rewritten(function, x):
    """(the function in the operations in which ONNX gets it, their names)."""
    traced = jax.make_jaxpr(function)(x)
    again = jax.make_jaxpr(lambda x: tuple(_onnx._run(traced.jaxpr, traced.consts, x)))(x)
    return functools.partial(jax.core.eval_jaxpr, again.jaxpr, again.consts), str(again)


def test_a_choice_between_platforms_is_made_for_onnx():
    def function(x, choose=jax.lax.platform_dependent):
        chosen = choose(x, cuda=lambda x: x * 2, cpu=lambda x: x + 1, default=lambda x: x - 1)
        chosen = choose(chosen, cuda=lambda x: x * 2, cpu=lambda x: x + 3)
        return jax.nn.relu(jax.jit(jnp.sin)(chosen)), jnp.where(x > 0, x, 0.5)

    x = jnp.linspace(-1, 1, 5)
    again, names = rewritten(function, x)
    assert "platform_index" not in names
    assert "cond" not in names
    # The form for all platforms where there is one, that for CPUs where there is none.
    expected = function(x, lambda x, cuda, cpu, default=None: (default or cpu)(x))
    for value, wanted in zip(again(x), expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (0, 1))),
        lambda x: nnx.max_pool(jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0))), (5, 4)),
        lambda x: nnx.avg_pool(x, (2, 2), (2, 2), [(0, 1), (0, 0)], count_include_pad=False),
        lambda x: jnp.pad(x, ((0, 0), (2, 1), (1, 0), (0, 3)), constant_values=-jnp.inf),
        # As they are: these jax2onnx refuses.
        lambda x: jax.lax.pad(x, 0.5, ((0, 0, 0), (-1, 2, 0), (1, 0, 1), (0, 0, 0))),
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=x[0, 0, 0, 0]),
        lambda x: nnx.max_pool(x, (2, 2, 2)),
    ],
)
def test_pooling_and_padding_are_the_same_as_onnx_gets_them(function):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 3)), jnp.float32)
    again, _ = rewritten(function, x)
    np.testing.assert_array_equal(*again(x), function(x))


@pytest.fixture
def in_onnxruntime():
    """Opens an exported folder as the card says, in onnxruntime alone."""
    for package in ("jax2onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install "nfjax[onnx]"')
    import onnxruntime

    def opened(folder):
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
        assert (images.type, probabilities.type) == ("tensor(uint8)", "tensor(float)")
        assert isinstance(images.shape[0], str)  # a batch of any size
        return lambda pixels: session.run(None, {images.name: pixels})[0]

    return opened


def test_onnx_is_the_same(predictor, tmp_path, in_onnxruntime):
    (result,) = inference.export(predictor, tmp_path / "onnx", ["onnx"])
    assert result.difference <= 1e-5
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"README.md", "config.json", "model.onnx"}
    np.testing.assert_allclose(
        in_onnxruntime(tmp_path / "onnx")(images()), predictor.of_pixels(images()), rtol=0, atol=1e-5
    )
    import onnx

    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    assert [(used.domain, used.version) for used in model.opset_import] == [("", _onnx.OPSET)]
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", ["imagenet", "small_bottleneck", "small_bit", "small_nf"])
def test_onnx_pools(name, tmp_path, in_onnxruntime):
    """The ImageNet stem, and networks of timm: max-pooling with a border of nothing and of zeros, mean-pooling."""
    if name == "imagenet":
        arguments, classes = {"depth": TINY, "width": 4, "residual": "convshort", "stem": "imagenet"}, 3
        model = networks.Architecture("preact_resnet", arguments).build(classes, 33, jax.random.key(0))
    else:
        model, arguments = torch_weights.convert(test_torch_weights.kept(name)[0])
        classes = arguments.pop("num_classes")
    pooling = inference.Predictor(
        model,
        inference.Preprocessing(33, 36, (0.5,) * 3, (0.25,) * 3),
        [f"class {label}" for label in range(classes)],
        batch_size=8,
        architecture=networks.Architecture("preact_resnet", arguments),
    )
    (result,) = inference.export(pooling, tmp_path / "onnx", ["onnx"])
    assert result.difference <= 3e-6 < result.bound
    pixels = np.concatenate([images(4, 33), np.arange(33 * 33 * 3, dtype=np.uint8).reshape(1, 33, 33, 3)])
    expected, run = pooling.of_pixels(pixels), in_onnxruntime(tmp_path / "onnx")
    assert np.ptp(expected, axis=0).max() > 1e-3  # what the images differ by is far more than what is allowed
    np.testing.assert_allclose(run(pixels), expected, rtol=0, atol=3e-6)
    np.testing.assert_allclose(run(pixels[:1]), expected[:1], rtol=0, atol=3e-6)


FUNCTIONS = """
import importlib, inspect, pathlib, sys
import jax, jax.numpy as jnp
from nfjax.inference import _onnx

def functions():
    found = {}
    for module in map(importlib.import_module, ("jax", "jax.lax", "jax.nn", "jax.numpy", "flax.nnx", "flax.linen")):
        for name, value in vars(module).items():
            inside = dir(value) if inspect.isclass(value) else ()
            found[module.__name__, name] = {"": value, **{key: inspect.getattr_static(value, key) for key in inside}}
    return found

before = functions()
shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 4), jnp.float32)
for _ in range(2):
    _onnx.write(lambda x: jnp.cumsum(jnp.pad(x, ((0, 0), (1, 1))), 1, jnp.float32), shape, pathlib.Path(sys.argv[1]))
after = functions()
print([(*name, key) for name, now in before.items() for key in now | after[name]
       if callable(after[name].get(key)) and after[name][key] is not now.get(key)])
"""


def test_jax_and_flax_are_afterwards_what_they_were(tmp_path, in_onnxruntime):
    """In a process of its own: jax2onnx replaces some functions once, when it loads its plugins."""
    done = subprocess.run(
        [sys.executable, "-c", FUNCTIONS, tmp_path / "model.onnx"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


def test_what_onnx_cannot_hold_is_told(tmp_path, in_onnxruntime):
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 4), jnp.float32)
    with pytest.raises(
        ValueError, match=r"cannot write .* as ONNX \(NotImplementedError: .*interior.*\); the formats safetensors and"
    ):
        _onnx.write(lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1))), shape, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_needs_float32(run, tmp_path):
    half = nfjax.load(run[0], dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"computes in bfloat16, for which onnxruntime has no convolutions.*--dtype=flo"
    ):
        inference.export(half, tmp_path / "out", ["onnx"])


def test_an_old_export_is_still_read():
    """Made once by `nfjax export`; what it gives is what it gave then."""
    then = json.loads((OLD / "expected.json").read_text())
    predictor = nfjax.load(OLD / "format1")
    found = predictor(np.array(then["images"], np.uint8))
    np.testing.assert_allclose(found.probabilities, then["probabilities"], atol=1e-5)
    assert found.labels == then["labels"]
    assert predictor.origin.step == then["step"]


def test_a_network_of_ones_own(run, tmp_path, monkeypatch):
    architecture = networks.Architecture("tests.toys:network", {"width": 4})
    model = architecture.build(2, SIZE, jax.random.key(0))
    preprocessing = nfjax.load(run[0]).preprocessing
    own = inference.Predictor(model, preprocessing, ("a", "b"), architecture=architecture)
    inference.export(own, tmp_path / "own", ["safetensors"])
    with pytest.raises(ValueError, match=r"config.json names 'tests.toys:network': .*trust=True"):
        nfjax.load(tmp_path / "own")
    again = nfjax.load(tmp_path / "own", trust=True)
    np.testing.assert_array_equal(again(images()).probabilities, own(images()).probabilities)
    with pytest.raises(ValueError, match=r"dtype=bfloat16: the network tests.toys:network has no argument dtype"):
        nfjax.load(tmp_path / "own", trust=True, dtype="bfloat16")
    with pytest.raises(ValueError, match="does not say what that is built from"):
        inference.export(inference.Predictor(model, preprocessing, ("a", "b")), tmp_path / "no")
    odd = networks.Architecture("tests.toys:network", {"width": 4, "odd": 1j})
    odd = inference.Predictor(model, preprocessing, ("a", "b"), architecture=odd)
    with pytest.raises(ValueError, match=r"argument odd=1j cannot be stored"):
        inference.export(odd, tmp_path / "no", ["safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {"own"}
    assert isinstance(model, toys.Network)
    assert isinstance(model, nnx.Module)


# ---------------------------------------------------------------- the card


def test_the_card_tells_what_it_is(predictor, exported):
    card = (exported / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: nfjax\npipeline_tag: image-classification\nlicense: "cc-by-4.0"\n---\n')
    assert f"{predictor.origin.accuracy:.2%} of n = 24 test images" in card
    assert "On 24 images, for 3 steps." in card
    assert "| data.source | folder |" in card
    assert "## What it is not good for" in card
    assert "ant, bee" in card
    assert "short side is resized to 12 pixels" in card
    parameters = sum(leaf.size for leaf in jax.tree.leaves(predictor.params))
    assert f"{parameters:,} parameters" in card
    # It names no folder of the machine on which it was made.
    everything = card + (exported / "config.json").read_text()
    assert str(exported.parent) not in everything
    assert "photographs" not in predictor.origin.settings["data"].values()
    assert "dir" not in predictor.origin.settings["data"]


@pytest.mark.parametrize(
    ("init_from", "shown"),
    [
        ("/home/me/runs/first_1", r"first\_1"),
        ("hf://me/it@main", "hf://me/it@main"),
        ("gs://mine/a/", "a"),
        ("..", ".."),
    ],
)
def test_the_card_tells_with_what_it_began(predictor, run, init_from, shown):
    config = files.read_config(run[0])
    with config.unlocked():
        config.init_from, config.optim.freeze, config.optim.clip_norm = init_from, "stem", 0.5
    told = deployment.settings(config)
    assert told["init_from"] == shown.replace("\\", "")
    for settings in (told, told | {"init_from": init_from}):  # also one that an earlier version has exported
        origin = dataclasses.replace(predictor.origin, settings=settings)
        card = _card._training(origin, "")
        assert f" It began with the weights of {shown}: their license, and that of the images on which they" in card
        assert "| optim.freeze | stem |" in card
        assert "| optim.clip_norm | 0.5 |" in card
        assert "/home" not in card
    assert "It began" not in _card._training(predictor.origin, "")


def test_names_are_no_markup(predictor):
    assert _card._plain("<b>*a*</b>|`x`\x1b") == r"\<b\>\*a\*\</b\>\|\`x\`\\x1b"
    assert _card._code("a=(`x`, *b_c*)\x1b") == "`a=('x', *b_c*)\\x1b`"
    assert "`init=he_fan_out`" in _card.text(predictor, [], None, ())
    named = _card.text(predictor, [], None, (), "my | images")
    assert r"of n = 24 test images of my \| images, for" in named
    assert r"On 24 images of my \| images, for" in named
    assert "| seed | 0 |" in named
    assert "Not stated" in _card.text(predictor, [], None, ())
    assert "license: unknown" in _card.text(predictor, [], None, ())


# ---------------------------------------------------------------- what lies


def rewrite(folder, **changes):
    told = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (told[section] if section else told)[field] = value
    (folder / "config.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nfjax_format": 2}, "is of format 2, and this version of nfjax reads formats up to 1: install a later one"),
        ({"nfjax_format": "1"}, "has nfjax_format='1': expected a whole number from 1"),
        ({"nfjax_format": True}, "has nfjax_format=True: expected a whole number from 1"),
        ({"class_names": ["a", "b", "c"]}, r"safetensors is of another network .* with 3 class names: .*\[2\]? there"),
        ({"class_names": []}, "config.json does not hold what it should"),
        ({"class_names": ["a", 2]}, "config.json does not hold what it should: Expected `str`"),
        ({"network__arguments": {"depth": 10, "width": 4}}, "safetensors is of another network than .*config.json"),
        ({"network__arguments": {"depth": 11}}, "config.json describes no network that can be built: .*depth"),
        ({"network__arguments": {"wdith": 2}}, "config.json describes no network that can be built: .*wdith"),
        ({"network__name": "resnet12"}, "config.json describes no network that can be built: unknown model"),
        (
            {"network__arguments": {"stage_sizes": [2, 10**6], "block": "basic"}},
            "1,000,002 blocks: expected at most 64 fo",
        ),
        (
            {"network__arguments": {"stage_sizes": [1] * 64, "block": "basic", "width": 2}},
            "width=2: no array of model.saf",
        ),
        (
            {"network__arguments": {"stage_sizes": 5, "block": "basic"}},
            "config.json describes no network that can be b",
        ),
        (
            {"network__arguments": {"depth": 10, "width": 10**12}},
            "width=1000000000000: no array of model.safetensors is as",
        ),
        ({"network__arguments": {"depth": 10, "width": 2**80}}, "describes no network that can be built: width="),
        ({"network__arguments": {"depth": 10, "remat": "x"}}, "can be built: remat='x': expected true or false"),
        (
            {"network__arguments": {"depth": 10, "remat": float("nan")}},
            "can be built: remat=nan: expected true or false",
        ),
        ({"network__arguments": {"depth": 10, "remat": None}}, "can be built: remat=None: expected true or false"),
        ({"network__dtype": "float8"}, "config.json describes no network that can be built: unknown model.dtype"),
        ({"network__name": "os:system"}, "names 'os:system': .*to import that module.*--trust"),
        ({"network__arguments": {"residual": "os:system"}}, "names 'os:system': .*to import that module"),
        ({"network__name": "nfjax.evaluate:evaluate"}, "names 'nfjax.evaluate:evaluate': .*to import that module"),
        (
            {"network__arguments": {"depth": 10, "residual": "nfjax.cli:main"}},
            "names 'nfjax.cli:main': .*to import that",
        ),
        ({"network__arguments": {"depth": 10, "residual": "nfjax.layers:nothing"}}, "can be built: .*has no function"),
        ({"preprocessing__resize": 4}, "image_size=8, resize=4: expected 1 <= image_size <= resize"),
        ({"preprocessing__image_size": 10**9}, "config.json does not hold what it should: Expected `int` <="),
        ({"preprocessing__std": [0, 0.1, 0.1]}, "expected three positive numbers"),
        ({"preprocessing__mean": [0.5]}, "config.json does not hold what it should"),
        ({"preprocessing__path": "/etc/passwd"}, "config.json does not hold what it should: .*unknown field"),
        ({"weights": "../../secret"}, "config.json does not hold what it should: .*unknown field"),
        ({"weights_sha256": "0" * 64}, "safetensors is not the file that .*config.json tells of"),
    ],
)
def test_settings_that_are_not_what_they_should_be(copy, changes, message):
    rewrite(copy, **changes)
    with pytest.raises(ValueError, match=message) as found:
        nfjax.load(copy)
    assert str(copy) in str(found.value)


KINDS = ("params", "batch_stats")


def header(**places):
    text = json.dumps(places).encode()
    return struct.pack("<Q", len(text)) + text


def place(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"1234", "a header of .* bytes in a file of 4"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of 9,223,372,036,854,775,808 bytes in a file of 10"),
        (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
        (struct.pack("<Q", 2) + b"{", "a header of 2 bytes in a file of 9"),
        (struct.pack("<Q", 2) + b"\xff\xff", "codec can't decode"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "is damaged: "),
        (struct.pack("<Q", len(TWICE)) + TWICE + b"0", "its header has 'a' twice"),
        (header(a=place(0, 8), b=place(4, 12)) + bytes(12), "'b' begins at byte 4: expected 8"),
        (header(a=place(0, 8), b=place(12, 20)) + bytes(20), "'b' begins at byte 12: expected 8"),
        (header(a=place(0, 8)) + bytes(4), "its arrays take 8 bytes, and 4 follow the header"),
        (header(a=place(0, 8)) + bytes(9), "its arrays take 8 bytes, and 9 follow the header"),
        (header(a=place(8, 0)) + bytes(8), "'a' takes bytes 8 to 0"),
        (header(a=place(0, 8, (3,))) + bytes(8), r"'a' takes bytes 0 to 8, which is not what float32\[3\] takes"),
        (header(a=place(0, 8, (2**40, 2**40))) + bytes(8), "'a' takes bytes 0 to 8"),
        (header(a=place(-8, 0)) + bytes(8), r"'a' has the data_offsets \[-8, 0\]: expected two whole numbers"),
        (header(a=place(0.0, 8)) + bytes(8), r"'a' has the data_offsets \[0.0, 8\]"),
        (header(a=place(0, 8, (-2,))) + bytes(8), r"'a' has the shape \[-2\]"),
        (header(a=place(0, 8, (True, 2))) + bytes(8), r"'a' has the shape \[True, 2\]"),
        (header(a=place(0, 8, dtype="O8")) + bytes(8), "'a' has the dtype 'O8': expected one of BOOL, U8"),
        (header(a=place(0, 8, dtype=["F32"])) + bytes(8), "'a' has the dtype"),
        (header(a={"dtype": "F32", "shape": [2]}) + bytes(8), "'a': expected dtype, shape and data_offsets"),
        (header(a=5) + bytes(8), "'a': expected dtype, shape and data_offsets"),
        (header(a=place(0, 8)) + bytes(8), r"is of another network .*: it has 'a', which the network lacks"),
        (header(), r"is of another network .*: it lacks 'batch_stats/"),
        (header(**{"\x1b[31m": 5}), r"'\\x1b\[31m': expected dtype"),
    ],
)
def test_a_file_of_weights_that_lies(copy, data, message):
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message) as found:
        nfjax.load(copy)
    assert str(copy / "model.safetensors") in str(found.value)


def test_weights_of_another_type_or_missing(copy, exported):
    path = copy / "model.safetensors"
    places = _safetensors.read_places(path)
    found = _safetensors.decode(path.read_bytes(), places)
    name = "params/classifier/kernel"
    path.write_bytes(_safetensors.encode(found | {name: found[name].astype(np.float16)}))
    with pytest.raises(ValueError, match=rf"{name} is float16\[16, 2\] there, and float32\[16, 2\] in the network"):
        nfjax.load(copy)
    path.write_bytes(_safetensors.encode(found | {name: found[name] + 1}))
    with pytest.raises(ValueError, match=r"is not the file that .*remove weights_sha256 there"):
        nfjax.load(copy)
    rewrite(copy, weights_sha256=None)
    np.testing.assert_array_equal(arrays(nfjax.load(copy))[name], found[name] + 1)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="it is no ordinary file"):
        nfjax.load(copy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["params/stem/conv/kernel", "batch_stats/blocks/0/activation/norm/var"])
def test_weights_that_are_not_finite(predictor, copy, tmp_path, name, value):
    """Of which ReLU or a maximum may hide every trace."""
    path = copy / "model.safetensors"
    found = _safetensors.decode(path.read_bytes(), _safetensors.read_places(path))
    found[name] = found[name].copy()
    found[name].flat[1] = value
    path.write_bytes(_safetensors.encode(found))
    rewrite(copy, weights_sha256=None)
    with pytest.raises(
        ValueError, match=rf"safetensors: its weights are damaged: '{name}' holds numbers that are not f"
    ):
        nfjax.load(copy)
    damaged = object.__new__(inference.Predictor)
    damaged.__dict__.update(vars(predictor))
    of_kind = {kind: {part.partition("/")[2]: found[part] for part in found if part.startswith(kind)} for kind in KINDS}
    damaged.params, damaged.batch_stats = (of_kind[kind] for kind in KINDS)
    with pytest.raises(ValueError, match=rf"^{name} holds numbers that are not finite .* weights are damaged.*--step"):
        inference.export(damaged, tmp_path / "out", ["safetensors"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [dtype for dtype in _safetensors.DTYPES.values() if dtype is not np.bool_])
def test_every_type_of_number_may_be_asked_whether_it_is_finite(dtype):
    numbers = np.ones(3, dtype)
    assert _folder.not_finite({"a": numbers}) is None
    if jnp.issubdtype(dtype, jnp.inexact):
        assert _folder.not_finite({"a": numbers, "b": np.full(2, np.nan, dtype), "c": numbers * np.nan}) == "b"


def test_an_export_is_no_workdir(exported, tmp_path, capsys):
    assert cli.run(["evaluate", f"--workdir={exported}"]) == 1
    message = (
        f"{exported} is an export, and not the workdir of a run: nfjax evaluate takes it with --model={exported} --im"
    )
    assert message in capsys.readouterr().err
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    with pytest.raises(ValueError, match=rf"{exported} is an export, .* by --config.init_from={exported}"):
        loop.train(configs.base(), str(exported))
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_what_a_run_has_and_an_export_has_not(exported):
    for given in ({"step": 3}, {"ema": True}):
        with pytest.raises(ValueError, match=r"is an export, which holds one network: .* is for the workdir of a run"):
            nfjax.load(exported, **given)


def test_all_types_of_numbers_go_through_a_file(tmp_path):
    numbers = np.arange(6).reshape(2, 3)
    named = {f"a/{np.dtype(dtype)}": numbers.astype(dtype) for dtype in _safetensors.DTYPES.values()}
    named |= {"scalar": np.float32(3), "empty": np.zeros((0, 4), np.int16), "big": numbers.astype(">f4")}
    path = tmp_path / "a.safetensors"
    path.write_bytes(_safetensors.encode(named))
    found = _safetensors.decode(path.read_bytes(), _safetensors.read_places(path))
    assert found.keys() == named.keys()
    for name, array in named.items():
        assert found[name].dtype == np.asarray(array).dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="b has the dtype int4: safetensors has bool"):
        _safetensors.encode({"b": np.zeros(2, ml_dtypes.int4)})


def test_others_read_it_too(exported):
    torch_free = pytest.importorskip("safetensors.numpy")
    found = torch_free.load_file(exported / "model.safetensors")
    places = _safetensors.read_places(exported / "model.safetensors")
    ours = _safetensors.decode((exported / "model.safetensors").read_bytes(), places)
    assert found.keys() == ours.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, ours[name])


# ---------------------------------------------------------------- nfjax export


def export(run, *arguments):
    return cli.run(["export", f"--model={run[0]}", *map(str, arguments)])


def test_the_command(run, tmp_path, capsys):
    assert export(run, f"--out={tmp_path}/a", "--format=safetensors", "--license=cc0-1.0") == 0
    out = capsys.readouterr().out
    assert re.match(r"model\.safetensors +0\.0\d MB   differs by 0\.0e\+00 at most \(allowed 0e\+00\), on 8 parts", out)
    assert out.endswith(f"{tmp_path}/a: README.md says what it is and how to use it\n")
    before = (tmp_path / "a" / "README.md").read_bytes()
    assert export(run, f"--out={tmp_path}/a", "--format=safetensors") == 1
    assert f"{tmp_path}/a is an export already: choose another folder, or overwrite it" in capsys.readouterr().err
    assert (tmp_path / "a" / "README.md").read_bytes() == before
    assert export(run, f"--out={tmp_path}/a", "--format=safetensors", "--overwrite", "--ema") == 0
    assert nfjax.load(tmp_path / "a").origin.ema
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    assert export(run, f"--out={tmp_path}/mine", "--overwrite") == 1
    assert f"{tmp_path}/mine exists, and is no export: choose another folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "mine"}
    assert cli.run(["predict", f"--model={tmp_path}/a", str(run[1] / "test"), "--top=1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=keras"], "unknown format 'keras': expected one of safetensors, stablehlo, onnx"),
        (["--format="], "there are no formats: expected some of safetensors, stablehlo, onnx"),
        (["--step=5"], "has no checkpoint at step 5"),
    ],
)
def test_what_cannot_be_exported(run, tmp_path, capsys, arguments, message):
    assert export(run, f"--out={tmp_path}/a", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_not_written(predictor, tmp_path, monkeypatch):
    def wrong(predictor, path):
        path.write_bytes(b"")
        return lambda images: predictor.of_pixels(images) + np.float32(0.01)

    monkeypatch.setitem(formats.FORMATS, "wrong", formats.Format("model.wrong", wrong, {"float32": 1e-3}))
    with pytest.raises(ValueError, match=r"model.wrong gives probabilities that differ .* 1.0e-02, more than 1e-03"):
        inference.export(predictor, tmp_path / "a", ["wrong"])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- where it is written


def contents(folder):
    return {str(path.relative_to(folder)): path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


def test_what_no_export_writes_is_never_lost(predictor, copy):
    (copy / ".git").mkdir()
    (copy / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (copy / "notes.txt").write_text("mine")
    before = contents(copy)
    with pytest.raises(
        FileExistsError, match=r"copy is an export, and holds what no export .* lost: \.git, notes\.txt; m"
    ):
        inference.export(predictor, copy, ["safetensors"], overwrite=True)
    assert contents(copy) == before
    shutil.rmtree(copy / ".git")
    (copy / "notes.txt").unlink()
    (copy / "model.onnx").write_text("of an export with other formats")
    inference.export(predictor, copy, ["safetensors"], overwrite=True)
    assert {path.name for path in copy.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    (copy / "model.onnx").mkdir()
    with pytest.raises(FileExistsError, match=r"lost: model\.onnx; m"):
        inference.check_export(copy, overwrite=True)


@pytest.fixture
def meanwhile(monkeypatch):
    """Sets what happens while an export is written."""

    def setter(happens):
        def text(*arguments, _text=_card.text):
            happens()
            return _text(*arguments)

        monkeypatch.setattr(_card, "text", text)

    return setter


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_was_made_meanwhile_stays(predictor, copy, tmp_path, meanwhile, overwrite):
    out = copy if overwrite else tmp_path / "out"

    def happens():
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    meanwhile(happens)
    message = (
        "holds what no export writes, which would be lost: mine.txt" if overwrite else "out exists, and is no export"
    )
    with pytest.raises(FileExistsError, match=message):
        inference.export(predictor, out, ["safetensors"], overwrite=overwrite)
    assert (out / "mine.txt").read_text() == "mine"
    assert (out / "config.json").exists() == overwrite
    assert {path.name for path in tmp_path.iterdir()} == {"copy", out.name}


def test_of_two_exports_at_once_one_is_refused(predictor, exported, tmp_path, meanwhile):
    meanwhile(lambda: shutil.copytree(exported, tmp_path / "out"))
    with pytest.raises(FileExistsError, match="out is an export already"):
        inference.export(predictor, tmp_path / "out", ["safetensors"])
    assert contents(tmp_path / "out") == contents(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_older_export_comes_back_where_the_new_one_cannot_take_its_place(predictor, copy, tmp_path, monkeypatch):
    def rename(path, target, _rename=pathlib.Path.rename):
        if path.suffix == ".part":
            raise OSError(errno.EIO, "odd")
        return _rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    before = contents(copy)
    with pytest.raises(OSError, match=rf"{copy} cannot be written \(Input/output error\)"):
        inference.export(predictor, copy, ["safetensors"], overwrite=True)
    assert contents(copy) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_link_to_an_export_stays_one(predictor, copy, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link"
    link.symlink_to(copy)
    (copy / "model.safetensors").unlink()
    inference.export(predictor, link, ["safetensors"], overwrite=True)
    assert link.is_symlink()
    assert (copy / "model.safetensors").exists()
    assert [path.name for path in link.parent.iterdir()] == ["link"]
    (tmp_path / "links" / "to_nothing").symlink_to(tmp_path / "new")
    inference.export(predictor, tmp_path / "links" / "to_nothing", ["safetensors"])
    assert nfjax.load(tmp_path / "new").class_names == predictor.class_names
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "links", "new"}


@pytest.mark.parametrize("out", ["", ".", "../here", "/"])
def test_folders_that_cannot_be_replaced(run, tmp_path, monkeypatch, capsys, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(inference, "load", None)  # nothing is computed
    assert export(run, f"--out={out}") == 1
    what = "a mount point" if out == "/" else "the one that you are in"
    assert f"the folder {out or '.'!r} is {what}, which cannot be replaced: choose one in it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("writes", ["safetensors", "stablehlo"])
def test_a_full_disk_is_told_by_the_name_that_was_given(predictor, tmp_path, monkeypatch, writes):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match=rf"^\[Errno 28\] {tmp_path}/out cannot be written \(No space left on device\)$"):
        inference.export(predictor, tmp_path / "out", [writes])
    assert not list(tmp_path.iterdir())


def test_weights_of_another_architecture_are_told_by_the_name_that_was_given(predictor, tmp_path):
    other = object.__new__(inference.Predictor)
    other.__dict__.update(vars(predictor))
    other.architecture = dataclasses.replace(predictor.architecture, arguments={"depth": TINY, "width": 4})
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/out/model.safetensors is of another network than {tmp_path}/out/"
    ):
        inference.export(other, tmp_path / "out", ["safetensors"])
    assert not list(tmp_path.iterdir())
