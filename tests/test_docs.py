"""The pages of docs/: their code runs, their commands exist, their settings are those of the config."""

import pathlib
import re
import shlex
import sys

import matplotlib
import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "docs"))
import config_reference

from nfjax import cli, config

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts and page.name != "config.md")
CODE = [
    pytest.param(code, id=f"{page.relative_to(DOCS)}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    assert "savefig" not in code or (tmp_path / "signal.png").stat().st_size > 10_000


def test_commands_exist():
    console = "".join(re.findall(r"```console\n(.*?)```", "".join(page.read_text() for page in PAGES), re.S))
    commands = [shlex.split(line, comments=True) for line in console.replace("\\\n", " ").splitlines() if line]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert len(commands) > 10
    for words in commands:
        if words[0] == "make":
            assert words[1] in targets
        elif words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), words
        elif words[0] == "nfjax":
            assert words[1] in cli.COMMANDS, words
        for word in words:
            path = word.removeprefix("--config=").removeprefix("--file=").partition(":")[0]
            if path.startswith(("launch/", "configs/", "benchmarks/")):
                assert (ROOT / path).exists(), words


def test_every_setting_is_described_with_its_default():
    page = config_reference.markdown()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| .*[a-z]{2}.* \|$", page, re.M))
    defaults = dict(config_reference.leaves(config.base()))
    assert rows.keys() == defaults.keys()
    assert (rows["model.depth"], rows["data.resize"], rows["data.dir"]) == ("18", "none", '""')
    assert rows["data.mean"] == str(defaults["data.mean"])
    assert re.search(r"`optim\.learning_rate` \| `0\.01` \| Paper, section 4 \|", page)


def test_every_page_can_be_reached():
    """Sphinx takes a page outside of every table of contents for an error; here, without Sphinx, for those to come."""
    listed = re.findall(
        r"^(?:.*<)?([\w/]+)>?$",
        "".join(re.findall(r"```\{toctree\}(.*?)```", (DOCS / "index.md").read_text(), re.S)),
        re.M,
    )
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"} <= set(listed)
