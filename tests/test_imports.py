"""The modules import each other in one direction, and those that users take into their own projects stay light."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import nfjax

ROOT = pathlib.Path(__file__).parent.parent / "nfjax"
LIGHT = ("initializers", "layers", "residual", "resnet", "models", "spp", "rescale", "cost", "augment")


def module_name(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_form_a_dag():
    # A package's __init__ stands above its modules; importing a module through its package is no cycle.
    graph = {
        name: {other for other in imports(path) & MODULES.keys() if other != name} for name, path in MODULES.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("nfjax.training.loop") > order.index("nfjax.resnet") > order.index("nfjax.residual")


def test_only_the_loop_and_what_surrounds_it_know_the_config():
    # Neither a flag that a message names, --config.x.y, nor a setting of JAX is a reading of the config.
    reading = re.compile(r"ml_collections|(?<!--)(?<!jax\.)\bconfig\.[a-z]")
    readers = {name for name, path in MODULES.items() if reading.search(path.read_text())}
    rooms = ("nfjax.training", "nfjax.runs", "nfjax.cli")
    assert {name for name in readers if not name.startswith(rooms)} <= {
        "nfjax.config",
        "nfjax.evaluate",
        "nfjax.reproduce._pace",
        "nfjax.reproduce._runs",
    }
    # A step knows no settings, nor do the state, the losses and the random streams.
    assert not readers & {f"nfjax.training.{name}" for name in ("step", "state", "losses", "rng", "evaluation")}
    data_modules = [path for name, path in MODULES.items() if name.startswith("nfjax.data")]
    assert all("nfjax.config" not in imports(path) for path in data_modules)


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_do_not_import_the_trainer(name):
    code = (
        f"import sys, nfjax.{name}\n"
        "heavy = {'ml_collections', 'orbax', 'clu', 'matplotlib', 'sklearn', 'tensorflow', 'nfjax.training.loop'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    # flax itself imports orbax; everything else would be ours.
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded in ("[]", "['orbax']")


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_add_nothing_to_jax_and_flax(name):
    """Beside what these import themselves, and absl, for warnings."""
    code = (
        "import sys, jax, flax.linen, flax.nnx\n"
        "def packages(): return {module.partition('.')[0] for module in sys.modules}\n"
        "before = packages()\n"
        f"import nfjax.{name}\n"
        "print(*sorted(packages() - before - sys.stdlib_module_names))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= {"nfjax", "absl"}


def test_public_names_are_what_dir_shows():
    for package in (nfjax, nfjax.augment, nfjax.initializers, nfjax.spp):
        assert set(package.__all__) <= set(dir(package))
        assert not [name for name in dir(package) if name.startswith("_") and not name.startswith("__")]
        for name in package.__all__:
            assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'modles'"):
        _ = nfjax.modles
