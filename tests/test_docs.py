"""The pages of docs/: their code runs, their commands exist, their settings are those of the config."""

import ast
import importlib
import pathlib
import re
import shlex
import sys

import matplotlib
import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "docs"))
import command_reference
import config_reference
import name_reference

from nfjax import cli, config

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = {DOCS / "reference" / name for name in ("commands.md", "config.md", "names.md")}
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts and page not in GENERATED)
NETWORK = "results/nf_resnet14_cifar10"  # which some of the code uses
CODE = [
    pytest.param(code, id=f"{page.relative_to(DOCS)}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / NETWORK).symlink_to(ROOT / NETWORK)
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


def test_every_command_is_described():
    page = command_reference.markdown()
    sections = re.findall(r"^## (nfjax .*)$", page, re.M)
    assert sections == ["nfjax train", "nfjax evaluate", "nfjax data pack", "nfjax data show", *sections[4:]]
    assert {name.split()[1] for name in sections} == set(cli.COMMANDS)
    assert [int(code) for code in re.findall(r"^\| (\d+) \| \w", page, re.M)] == [0, 1, 2, 75, 130]
    for option in ("--workdir DIR", "--step N", "--short-side PIXELS", "--seeds N", "--num-classes N", "--data-name"):
        assert f"  {option} " in page or f"  {option}\n" in page
    assert "optim.momentum" not in page  # settings have a page of their own


@pytest.mark.parametrize("table", name_reference.TABLES, ids=lambda table: table.name)
def test_every_name_is_described(table):
    (section,) = (part for part in name_reference.markdown().split("## ") if part.startswith(f"{table.title}\n"))
    names = getattr(importlib.import_module(table.module), table.name)
    assert len(names) >= 1
    assert all(f"`{name}`" in section for name in names)


def test_examples_take_as_many_lines_as_told():
    """Without blank lines and docstrings."""
    nodes = {}
    for page in PAGES:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            tree = ast.parse(code)
            nodes |= {node.name: (code, node) for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    rows = re.findall(r"^\| an? .*?, (`.*`) \| (\d+) \|", (DOCS / "guides" / "extending.md").read_text(), re.M)
    assert len(rows) == 6
    for names, told in rows:
        assert sum(code_lines(*nodes[name]) for name in re.findall(r"`(\w+)`", names)) == int(told), names


def code_lines(code, node):
    lines = ast.get_source_segment(code, node).splitlines()
    return sum(bool(line.strip()) for line in lines) - len((ast.get_docstring(node) or "").splitlines())


def test_every_page_can_be_reached():
    """Sphinx takes a page outside of every table of contents for an error; here, without Sphinx, for those to come."""
    listed = set()
    for page in PAGES:
        tables = re.findall(r"```\{toctree\}(.*?)```", page.read_text(), re.S)
        entries = re.findall(r"^(?:.*<)?([\w/]+)>?$", "".join(tables), re.M)
        listed |= {page.parent / f"{entry}.md" for entry in entries}
    assert {*PAGES, *GENERATED} - {DOCS / "index.md"} <= listed
