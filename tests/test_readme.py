"""The README shows what the committed results say, and its code runs as it stands."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from benchmarks import tables
from nfjax import cli

ROOT = pathlib.Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
README = (ROOT / "README.md").read_text()
CONSOLE = "".join(re.findall(r"```console\n(.*?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = [line for line in CONSOLE.splitlines() if line]
INCLUDED = [(path, text) for _, path, text, _ in tables.MARKED.findall(README)]


@pytest.mark.parametrize(("path", "text"), INCLUDED, ids=[path for path, _ in INCLUDED])
def test_what_is_shown_is_the_committed_result(path, text):
    assert text == tables.shown(ROOT / path)


def test_pictures_and_links_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(README.splitlines()) <= 200


def test_python_code_runs(tmp_path):
    first, second = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Cost(parameters=38016714" in done.stdout
    done = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "signal.png").exists()
    # The diagnosis shown is the one printed, but for digits that another machine may round otherwise.
    (shown,) = re.findall(r"```\n(activation variance .*?)```", README, re.S)
    printed = done.stdout[done.stdout.index("\nactivation variance") :]
    number = re.compile(r"\d[\d.e+]*")
    assert number.sub("", shown).strip() == number.sub("", printed).strip()


def test_every_command_is_known():
    assert COMMANDS[:2] == ["make train", "make test"]
    for line in COMMANDS:
        words = shlex.split(line)
        if "=" in words[0]:
            continue  # sets a variable
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        elif words[0].startswith("launch/") or words[0] == "sbatch":
            scripts = [word for word in words if word.startswith("launch/")]
            assert [(ROOT / script).exists() for script in scripts] == [True]
        elif words[0] in ("kubectl", "docker"):
            assert all((ROOT / word.partition("=")[2]).exists() for word in words if word.startswith("--file="))
        elif words[0] == "pip":
            assert words[1] == "install"
            assert words[2].removeprefix(".").strip("[]") in ("", *EXTRAS)
        elif words[0] == "nfjax":
            assert words[1] in cli.COMMANDS
        elif words[1] == "-m":
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        else:
            assert (ROOT / words[1]).exists()


def test_make_train_is_the_first_config():
    makefile = (ROOT / "Makefile").read_text()
    assert "-m nfjax.main --config=configs/digits_convshort.py --workdir=$(WORKDIR)" in makefile


def test_training_command_of_the_readme(tmp_path):
    """As it stands, but for a data folder that is made here, a small network, one epoch and another workdir."""
    from test_data import make_folder

    make_folder(tmp_path / "data", per_class=70, size=(32, 32))
    line = next(line for line in COMMANDS if "nfjax.main" in line)
    words = [word.replace("=DIR", f"={tmp_path}/data").replace("=runs/", f"={tmp_path}/") for word in shlex.split(line)]
    words += ["--config.model.depth=10", "--config.model.width=4", "--config.epochs=1"]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in COMMANDS if "nfjax.evaluate" in line)
    words = [word.replace("=runs/", f"={tmp_path}/") for word in shlex.split(line)]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 140 images" in done.stdout


def test_a_second_make_does_not_install(tmp_path):
    """With the stamp newer than the two files that it depends on, make goes straight to the command."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    first = subprocess.run(["make", "-n", "train"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "pip install" in first
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    for target in ("train", "test"):
        done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "pip" not in done.stdout


def test_the_first_run_reaches_98_percent():
    records = [json.loads(line) for line in (ROOT / "results/digits_convshort/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["kind"] == "epoch"
    assert records[-1]["test_accuracy"] >= 0.98
