"""The wheel with what it names as its core, and nothing else, outside of the checkout."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
# By the names that are imported: what training needs and the core does not.
TRAINING = ("array_record", "clu", "cv2", "ml_collections", "msgspec", "simplejpeg", "sklearn", "tensorboardX", "tqdm")
# The environment of the tests would lead back to the checkout and to its packages.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def plain(name):
    """A distribution's name as the registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements, found=None):
    """The names of all distributions that `requirements` bring, without any extra that they do not ask for."""
    found = set() if found is None else found
    for text in requirements:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and plain(requirement.name) not in found:
            found.add(plain(requirement.name))
            closure(importlib.metadata.requires(requirement.name) or (), found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = ("pip", "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(ROOT))
    done = subprocess.run([sys.executable, "-m", *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("nfjax-*.whl")
    return path


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    """An environment of the wheel and of the packages that it cannot do without, as links to those installed here."""
    folder = tmp_path_factory.mktemp("core") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in closure(project["dependencies"]):
        for file in importlib.metadata.files(name):
            link, target = site / file.parts[0], pathlib.Path(file.locate()).parents[len(file.parts) - 1]
            if file.parts[0] not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(pathlib.Path(target) / file.parts[0])
    install = ("--python", folder / "bin/python", "install", "--quiet", "--no-deps", "--no-index", wheel)
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run(core, folder, *command):
    """(exit code, output, errors) of a command of that environment, in a folder outside of the checkout."""
    environment = ENVIRONMENT | {"PATH": f"{core}:/usr/bin:/bin", "NFJAX_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [core / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout, done.stderr


LIBRARY = """
import importlib.util, json, sys
import nfjax
print([name for name in {training} if importlib.util.find_spec(name)], "jax" in sys.modules, nfjax.__file__)

import jax
from flax import nnx
from nfjax import augment, cost, initializers, residual, resnet, spp

draw = initializers.standardize(initializers.he_normal("fan_out"))
kernel = draw(jax.random.key(0), (3, 3, 16, 32), "float32")
model = resnet.PreActResNet(10, "convshort", None, "he_fan_out", width=4, image_size=8, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
profile = spp.propagate(model, x)
spp.plot({{"measured": profile}}, spp.predict(model, x.shape)).savefig("signal.png")
large = nnx.eval_shape(lambda: resnet.PreActResNet(50, "convshort", rngs=nnx.Rngs(0)))
counted = cost.count(large, (1, 32, 32, 3))
print(json.dumps([float(kernel.var() * 9 * 32), len(profile.paths), counted.parameters, model(x).shape]))
"""


def test_the_library_runs_with_the_core_alone(core, tmp_path):
    code, out, errors = run(core, tmp_path, "python", "-c", LIBRARY.format(training=TRAINING))
    assert (code, errors) == (0, ""), errors
    first, second = out.splitlines()
    # Nothing of training can be imported, nothing is imported before it is used, and it is the wheel's.
    assert first.startswith("[] False ")
    assert str(core.parent) in first
    variance, blocks, parameters, shape = json.loads(second)
    assert variance == pytest.approx(2.0, rel=1e-5)
    assert (blocks, shape) == (4, [4, 10])
    assert parameters == 38_016_714
    assert (tmp_path / "signal.png").read_bytes().startswith(b"\x89PNG")


def test_the_wheel_carries_all_of_the_package_and_the_configs(core):
    (installed,) = core.parent.glob("lib/python*/site-packages/nfjax")
    expected = {path.relative_to(ROOT / "nfjax"): path for path in (ROOT / "nfjax").rglob("*.py")}
    expected |= {path.relative_to(ROOT): path for path in (ROOT / "configs").glob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == expected.keys()
    assert all((installed / name).read_bytes() == path.read_bytes() for name, path in expected.items())


def test_the_commands_that_need_the_core_alone(core, tmp_path):
    version = importlib.metadata.metadata("nfjax")["Version"]
    assert run(core, tmp_path, "nfjax", "--version") == (0, f"nfjax {version}\n", "")
    code, out, errors = run(core, tmp_path, "nfjax", "cost", "--depth=50", "--residual=convshort")
    assert (code, errors) == (0, "")
    assert " 38,016,714\n" in out
    small = ("--depth=10", "--width=4", "--image-size=8", "--batch=4", "--norm=none")
    code, out, errors = run(core, tmp_path, "python", "-m", "nfjax.spp", *small, "--out=a.png", "--out=a.csv")
    assert (code, errors) == (0, "")
    assert "gradient variance" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--config=imagenet_convshort", "--workdir=W"),
        ("train", "--help"),
        ("evaluate", "--workdir=W"),
        ("predict", "--model=W", "a.jpg"),
        ("export", "--model=W", "--out=X"),
        ("data", "pack", "--source=digits", "--out=W"),
        ("data", "show", "--config=digits_convshort"),
        ("reproduce", "table1"),
        ("cost", "--config=digits_convshort"),
    ],
    ids=" ".join,
)
def test_the_others_tell_the_way_out(core, tmp_path, command):
    code, out, errors = run(core, tmp_path, "nfjax", *command)
    assert (code, out) == (1, "")
    assert errors.startswith("nfjax: ")
    assert 'is not installed, which this needs: pip install "nfjax[train]"\n' in errors
    assert "Traceback" not in errors


def test_importing_the_core_takes_little_more_than_jax_and_flax(core, tmp_path):
    """Of processor time, which a busy machine changes least; the smallest of three."""

    def seconds(code):
        report = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
        return min(float(run(core, tmp_path, "python", "-c", code + report)[1]) for _ in range(3))

    alone = seconds("import jax, flax.nnx")
    ours = seconds("import jax, flax.nnx; from nfjax import cost, initializers, resnet, spp")
    assert ours < alone + 0.5
