"""nfjax spp: the table, the verdict, the files, and what a user may type wrong."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from nfjax import cli
from nfjax.cli import spp as command
from tests.conftest import TINY

MODULE = """
import jax
from flax import linen, nnx

class Block(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.b(jax.nn.relu(self.a(x)))

class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + linen.Dense(8)(jax.nn.relu(linen.Dense(8)(x)))

def model(seed=0):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(*(Block(rngs) for _ in range(3)))

def model_and_input():
    return model(), jax.random.normal(jax.random.key(0), (4, 8))

def linen_model():
    return linen.Sequential([LinenBlock() for _ in range(3)]), jax.random.normal(jax.random.key(0), (4, 8))

def needs_more(width):
    return model()

def two_classes(seed=0, width=8, name="plain"):
    rngs = nnx.Rngs(seed)
    assert name in ("plain", "fancy"), name
    return Switched([Block(rngs), Other(rngs), Block(rngs), Other(rngs)]), jax.numpy.ones((4, width))

class Other(Block):
    pass

class Switched(nnx.Module):
    def __init__(self, blocks):
        self.blocks = nnx.List(blocks)

    def __call__(self, x, scale=1.0, skip=(), mode=None):
        for i, block in enumerate(self.blocks):
            if i not in skip:
                x = block(x)
        return x * scale

class Wide(nnx.Module):
    def __init__(self, width, rngs):
        self.stem, self.head = nnx.Linear(3, width, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)
        self.blocks = nnx.List([Layers(width, rngs), Layers(width, rngs)])

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

class Layers(nnx.Module):
    def __init__(self, width, rngs):
        self.a = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.a(x)

def wide(width, seed=0):
    return Wide(width, nnx.Rngs(seed)), jax.random.normal(jax.random.key(0), (4, 3))

def deep(number, scale=1.0):
    rngs = nnx.Rngs(0)
    blocks = Switched([Block(rngs) for _ in range(number)])
    return blocks, scale * jax.random.normal(jax.random.key(0), (4, 8))

CONSTANT = 3
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        code = cli.run(["spp", *arguments])
        shown = capsys.readouterr()
        assert code in ((1, 2) if shown.err else (0,))
        return shown.err or shown.out

    yield run
    sys.modules.pop("my_models", None)


SMALL = (f"--depth={TINY}", "--width=4", "--image-size=8", "--batch=4")


def test_layers_and_singular_values(run, tmp_path):
    shown = run(*SMALL, "--jacobians", "--level=layer", f"--out={tmp_path / 'layers.csv'}")
    assert "Profile of 13 layers" in shown
    assert "Singular values of the Jacobians of 4 blocks" in shown
    assert len((tmp_path / "layers.csv").read_text().splitlines()) == 1 + 13


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--jacobians", "--jacobians does not go with --sweep"),
        ("--level=layer", "--level does not go with --sweep"),
        ("--out=x.html", "a report is of one network, not of a sweep"),
    ],
)
def test_what_a_sweep_does_not_have(run, flag, message):
    assert message in run(f"--depth={TINY}", "--sweep=width:4,8", flag)


def test_a_network_of_the_paper(run, tmp_path):
    shown = run(*SMALL, "--residual=convshort", "--init=brock", "--seeds=2", "--out=plots/a.png", "--out=plots/a.csv")
    assert "convshort, brock" in shown
    assert "median of 2 seeds" in shown
    assert "blocks/3" in shown
    assert "gradient variance" in shown
    with Image.open(tmp_path / "plots/a.png") as picture:
        assert picture.size[0] > 1000
    assert len(list(csv.DictReader((tmp_path / "plots/a.csv").read_text().splitlines()))) == 2 * 4


def test_other_files_and_batch_norm(run, tmp_path):
    run(*SMALL, "--norm=batch", "--loss=cross_entropy", "--out=a.svg", "--out=a.json")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert "backward_var" in (tmp_path / "a.json").read_text()


def test_a_folder_of_images(run, tmp_path):
    for i in range(6):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (12, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    assert "blocks/3" in run(*SMALL, "--input=images")
    images = command.load_images(tmp_path / "images", 4, 8)
    assert images.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(images.std(axis=(0, 1, 2)), 1.0, rtol=1e-5)
    assert "6 images, fewer than the batch of 32; pass --batch=6" in run(f"--depth={TINY}", "--input=images")
    (tmp_path / "images" / "broken.png").write_text("no image")
    assert "broken.png cannot be read as an image" in run(*SMALL[:-1], "--batch=7", "--input=images")
    (tmp_path / "empty").mkdir()
    assert "no images in it" in run(*SMALL, "--input=empty")
    assert "there is no such folder" in run(*SMALL, "--input=nowhere")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--module=my_models:model", "--input-shape=4,8", "--seeds=2"], "Profile of 3 blocks, float32, median of 2"),
        (["--module=my_models:model_and_input"], "layers/2"),
        (["--module=my_models:linen_model", "--seeds=2", "--where=LinenBlock"], "layers_2"),
        (["--module=my_models:model_and_input", "--where=Linear"], "layers/2/b"),
    ],
)
def test_a_model_of_the_users_own(run, arguments, expected):
    assert expected in run(*arguments)


SWEEP = "--module=my_models:wide"


def test_a_sweep_of_the_users_own(run, tmp_path):
    shown = run(SWEEP, "--sweep=width:4,8,16", "--steps=1", "--seeds=2", "--out=a.png", "--out=a.csv", "--out=a.json")
    assert "Wide\n\nSweep over width 4, 8, 16, 2 seeds: 1 step of sgd, learning rate 0.1, cross_entropy" in shown
    assert "the output at the start" in shown
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert {row["width"] for row in rows} == {"4", "8", "16"}
    assert {row["path"] for row in rows if row["quantity"] == "activation"} == {"blocks/0", "blocks/1"}
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["diagnosis"] in shown
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 1000


def test_a_sweep_of_another_argument_without_a_seed(run):
    shown = run(
        "--module=my_models:deep", "--sweep=number:2,3,5", "--steps=0", "--optimizer=adam", "--learning-rate=0.01",
        "--tolerance=9", "--make=scale=0.5",
    )  # fmt: skip
    assert "Sweep over number 2, 3, 5: 0 steps of adam, learning rate 0.01" in shown
    assert "independent of number" in shown


def test_a_sweep_of_the_papers_networks(run):
    shown = run(f"--sweep=depth:{TINY},18", *SMALL[1:], "--residual=convshort", "--steps=0", "--seeds=1")
    assert "ResNet convshort, he_fan_out\n\nSweep over depth 10, 18:" in shown
    shown = run("--sweep=width:2,4", SMALL[0], *SMALL[2:], "--steps=0", "--seeds=1", "--where=BasicBlock")
    assert "--input-shape and --where go with --module" in shown


TWO = "--module=my_models:two_classes"


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        ([TWO], 4),
        ([TWO, "--where=Other"], 2),
        ([TWO, "--where=Other,Linear"], 2 + 8),
        ([TWO, "--where=Other", "--where=Linear"], 2 + 8),
        ([TWO, "--arg=skip=(1, 3)", "--arg=scale=0.5", "--arg=mode=None"], 2),
        ([TWO, "--make=name='fancy'", "--make=width=8", "--seeds=2"], 4),
        ([TWO, "--branch=b"], 4),
        (["--module=my_models:needs_more", "--make=width=3", "--input-shape=4,8"], 3),
    ],
)
def test_arguments_and_classes(run, arguments, blocks):
    assert f"Profile of {blocks} blocks" in run(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--depth is missing"),
        (["--depth=19"], "invalid choice: 19"),
        ([*SMALL, "--residual=idshrt"], "idshort"),
        ([*SMALL, "--init=xavier"], "he_effective_fan_out"),
        ([*SMALL, "--out=plot.jpeg"], "unknown kind of file; expected .png, .svg, .pdf, .csv or .json"),
        ([*SMALL, "--seeds=0"], "0 is not positive"),
        ([*SMALL, "--tolerance=1"], "--tolerance must be more than 1"),
        ([*SMALL, "--where=Block"], "--input-shape and --where go with --module"),
        (["--module=my_models:model", "--depth=18"], "--depth describes one of the paper's networks"),
        (["--module=my_models"], "expected package.module:function"),
        (["--module=my_model:model"], "there is no module 'my_model'"),
        (
            ["--module=my_models:modell"],
            "has no function 'modell'; it has Block, LinenBlock, model, model_and_input, linen_model",
        ),
        (["--module=my_models:CONSTANT"], "has no function 'CONSTANT'"),
        (["--module=my_models:needs_more"], "the function needs width"),
        (["--module=my_models:model"], "returns no input"),
        (["--module=my_models:model", "--input-shape=4,x"], "expected positive integers and commas"),
        (["--module=my_models:model_and_input", "--seeds=2"], "takes no `seed`"),
        (["--module=my_models:model", "--input-shape=4,9"], "is its input what it expects?"),
        (["--module=my_models:model_and_input", "--where=Blok"], "it calls Block (3), Linear (6)"),
        (["--module=my_models:model_and_input", "--where=Block,Blok"], "'Blok' selects no module"),
        (["--module=my_models:model_and_input", "--where=Block,"], "--where has an empty name"),
        (["--module=my_models:model_and_input", "--where=layers/1"], "'layers/1' is the path of a Block"),
        (["--module=my_models:model_and_input", "--branch=brnch"], "in the blocks are 'a' (Linear), 'b' (Linear)"),
        ([*SMALL, "--branch=brnch"], "in the blocks are "),
        ([*SMALL, "--arg=train=False"], "--make, --arg, --input-shape and --where go with --module"),
        ([TWO, "--arg=train"], "'train': expected NAME=VALUE, such as train=False"),
        ([TWO, "--arg=mode=eval"], "'eval' is no Python literal; expected a number"),
        ([TWO, "--arg=scale=2.0", "--arg=scale=3.0"], "--arg=scale=... is given more than once"),
        ([TWO, "--arg=seeds=2"], "seeds is an argument of nfjax.spp.propagate_seeds"),
        ([TWO, "--arg=scael=2.0"], "scael"),
        ([TWO, "--make=wdth=2"], "has no such parameter; it has seed, width, name"),
        ([TWO, "--make=seed=2"], "--seeds says how many"),
        ([SWEEP, "--sweep=width"], "'width': expected NAME:V,V,V with numbers, such as width:16,32,64"),
        ([SWEEP, "--sweep=width:8,x"], "'width:8,x': expected NAME:V,V,V with numbers"),
        ([SWEEP, "--sweep=width:8"], "width 8: expected two or more different numbers"),
        ([SWEEP, "--sweep=wdth:8,16"], "--sweep=wdth:...: my_models:wide has no such parameter to sweep; it has width"),
        ([SWEEP, "--sweep=seed:1,2"], "--sweep=seed:...: my_models:wide has no such parameter to sweep; it has width"),
        (["--module=my_modls:wide", "--sweep=width:4,8"], "there is no module 'my_modls'"),
        ([SWEEP, "--sweep=width:4,8", "--make=width=8"], "--make=width=... and --sweep=width:... give the same"),
        ([SWEEP, "--sweep=width:4,8", "--steps=-1"], "-1 is negative"),
        ([SWEEP, "--sweep=width:4,8", "--branch=b"], "--branch does not go with --sweep"),
        ([SWEEP, "--sweep=width:4,8", "--tolerance=0"], "of a sweep, it is an exponent"),
        ([SWEEP, "--sweep=width:4,8", "--learning-rate=nan"], "--learning-rate=nan: expected a finite number"),
        ([SWEEP, "--sweep=width:4,8", "--arg=steps=2"], "steps is an argument of nfjax.spp.sweep"),
        ([TWO, "--sweep=width:4,8"], "returns an input of shape [(4, 4)] for width=4 and [(4, 8)] for width=8"),
        (["--module=my_models:deep", "--sweep=number:2,3", "--seeds=2"], "takes no `seed`, so that --seeds=2"),
        ([*SMALL, "--steps=2"], "--steps goes with --sweep=NAME:VALUES"),
        ([*SMALL, "--sweep=depth:10,18"], "--depth and --sweep=depth:... both say what the depth is"),
        ([*SMALL[1:], "--sweep=depth:10,19"], "--sweep=depth:...: 19 is no depth; there are"),
        ([SMALL[0], "--sweep=width:4,8.5"], "8.5 is no width; expected positive integers"),
        (["--sweep=heads:4,8"], "of the paper's networks depth and width can be swept"),
    ],
)
def test_wrong_input_gets_a_clear_error(run, arguments, message):
    shown = run(*arguments)
    assert message in shown
    assert "Traceback" not in shown
