"""How often a run is killed, and where the table of it goes."""

import pathlib
import random

import pytest


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=6, help="of each setting")
    parser.addoption("--seed", type=int, default=0, help="of the moments")
    parser.addoption("--results", type=pathlib.Path, help="folder for kills.jsonl and kills.md; written by none if not")


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture
def rng(request):
    """Another one for every test, the same for every run of it."""
    return random.Random(f"{request.config.getoption('seed')} {request.node.name}")


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """What is compiled is kept, so that starts are quick."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
