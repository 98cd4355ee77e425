"""The notebooks run, on small settings, and are small; their outputs are kept."""

import json
import pathlib
import re

import jax
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALL = {"DEPTH": 18, "WIDTH": 4, "IMAGE_SIZE": 8, "BATCH": 2, "SEEDS": 2}
MAGIC = re.compile(r"^(\s*)[%!].*$", re.M)


def cells(path):
    content = json.loads(path.read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_small_settings(path, capsys):
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for cell in cells(path):
            exec(MAGIC.sub(r"\1pass", "".join(cell["source"])), names)
            names |= {name: value for name, value in SMALL.items() if name in names}
    assert "gradient variance" in capsys.readouterr().out
    assert names["DEPTH"] == SMALL["DEPTH"]
    assert len(names["figure"].axes) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path):
    assert path.stat().st_size < 300_000
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


def test_only_public_names_are_used():
    for path in NOTEBOOKS:
        source = "".join("".join(cell["source"]) for cell in cells(path))
        assert set(re.findall(r"from (nfjax\S*) import", source)) == {"nfjax"}
        assert not re.search(r"\b(spp|resnet)\._", source)
