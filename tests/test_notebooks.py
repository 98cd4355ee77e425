"""The notebooks run, on small settings, and are small; their outputs are kept."""

import json
import pathlib
import re

import jax
import matplotlib
import numpy as np
import pytest
from absl import logging

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALL = {"DEPTH": 10, "WIDTH": 4, "IMAGE_SIZE": 8, "BATCH": 2, "SEEDS": 2}
MAGIC = re.compile(r"^(\s*)[%!].*$", re.M)


def cells(path):
    content = json.loads(path.read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def run(stem, settings=()):
    """The variables that a notebook leaves; `settings` replace those that a cell has set."""
    names, settings = {}, dict(settings)
    (path,) = (path for path in NOTEBOOKS if path.stem == stem)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for cell in cells(path):
            exec(MAGIC.sub(r"\1pass", "".join(cell["source"])), names)
            names |= {name: value for name, value in settings.items() if name in names}
    return names


def labelled(figure):
    """Whether every panel has a title and names its axes; a colour bar names its one."""
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    return all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in panels)


@pytest.fixture
def settings_of_libraries():
    """A notebook may change them for itself, not for the tests after it."""
    verbosity = logging.get_verbosity()
    with matplotlib.rc_context():
        yield
    logging.set_verbosity(verbosity)


def test_every_notebook_is_run_below():
    assert [path.stem for path in NOTEBOOKS] == ["signal_propagation", "train_cifar10"]


def test_signal_propagation(capsys):
    names = run("signal_propagation", SMALL)
    assert "gradient variance" in capsys.readouterr().out
    assert names["DEPTH"] == SMALL["DEPTH"]
    assert len(names["figure"].axes) == 2


@pytest.mark.usefixtures("settings_of_libraries")
def test_train_cifar10(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NFJAX_NOTEBOOK_SMALL", "1")
    monkeypatch.chdir(tmp_path)  # the run is written below the working directory
    names = run("train_cifar10")
    confusion, score, summary = names["confusion"], names["score"], names["summary"]
    assert confusion.sum() == score["images"] == 360
    assert (confusion.sum(axis=1) == np.bincount(names["labels"])).all()
    assert confusion.trace() / confusion.sum() == pytest.approx(score["accuracy"])
    assert score["accuracy"] == pytest.approx(summary["best_test_accuracy"])
    assert score["accuracy"] > 0.2, "it has learned nothing; one in ten is right by chance"
    assert len(names["wrong"]) == confusion.sum() - confusion.trace()
    assert [record["epoch"] for record in names["records"] if record["kind"] == "epoch"] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("gradient variance") == len(names["profiles"]) == 2
    assert all(labelled(names[name]) for name in ("curves", "figure", "signal"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path):
    assert path.stat().st_size < 300_000
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


def test_only_public_names_are_used():
    for path in NOTEBOOKS:
        source = "".join("".join(cell["source"]) for cell in cells(path))
        assert "nfjax" in re.findall(r"from (nfjax\S*) import", source)
        assert not re.search(r"from nfjax\S*\._|import _|\b(spp|resnet|loader|networks|metrics)\._", source)
