"""What is compiled is kept, by default, where the user's caches lie, and where the user says otherwise, there."""

import os
import subprocess
import sys

import jax
import pytest

from nfjax import compilation

CODE = """
import jax
from nfjax import compilation
compilation.keep()
jax.jit(lambda x: jax.numpy.sin(x) @ x)(jax.numpy.ones((8, 8))).block_until_ready()
"""

SET_BY_THE_TESTS = ("NFJAX_CACHE", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES")


@pytest.fixture
def run(tmp_path):
    """Runs CODE with the user's cache directory in `tmp_path`; returns what it wrote to its standard error."""

    def run(**changes):
        environment = {k: v for k, v in os.environ.items() if k not in SET_BY_THE_TESTS}
        environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | changes
        return subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True).stderr

    return run


def kept(folder):
    return sorted(path.name for path in folder.glob("*-cache"))


def test_programs_are_kept_in_the_cache_directory(run, tmp_path):
    run()
    first = kept(tmp_path / "nfjax" / "compiled")
    assert first
    run()
    assert kept(tmp_path / "nfjax" / "compiled") == first  # found again


def test_the_user_may_choose_another_place_or_none(run, tmp_path):
    run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert kept(tmp_path / "mine")
    assert not (tmp_path / "nfjax").exists()
    run(JAX_ENABLE_COMPILATION_CACHE="false")
    assert not kept(tmp_path / "nfjax" / "compiled")


def test_a_cache_that_was_moved_is_used(run, tmp_path):
    run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "here"))
    first = kept(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "there"))
    assert kept(tmp_path / "there") == first


def test_short_programs_are_kept_in_a_chosen_place_too(monkeypatch):
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    monkeypatch.delenv(name.upper())
    try:
        compilation.keep()  # the tests have chosen a place
        assert getattr(jax.config, name) == compilation.SHORTEST
    finally:
        jax.config.update(name, before)


def test_a_cache_that_cannot_be_made_is_only_a_warning(run, tmp_path):
    (tmp_path / "file").touch()
    assert b"cannot be kept" in run(NFJAX_CACHE=str(tmp_path / "file"))


def test_equal_programs_of_a_process_are_compiled_once(monkeypatch):
    monkeypatch.setattr(compilation, "_programs", type(compilation._programs)())

    def lowered(factor):
        return jax.jit(lambda x: factor * x).lower(jax.ShapeDtypeStruct((2,), "float32"))

    first = compilation.compile_once(lowered(2.0))
    assert compilation.compile_once(lowered(2.0)) is first
    assert compilation.compile_once(lowered(3.0)) is not first
    assert compilation.compile_once(lowered(2.0), {"xla_cpu_enable_fast_math": True}) is not first
    assert compilation.compile_once(lowered(2.0), placed=["elsewhere"]) is not first
    monkeypatch.setattr(compilation, "_MOST_PROGRAMS", 1)
    compilation.compile_once(lowered(4.0))
    assert len(compilation._programs) == 4  # one came, one went


MANY = """
import jax
from nfjax import compilation

def maps():
    return sum(1 for _ in open("/proc/self/maps"))

before, held = maps(), []
for i in range(40):
    jitted = jax.jit(lambda x, i=i: jax.numpy.sort(x + i) @ x)
    held.append(jitted)
    jitted(jax.numpy.ones(8))
    compilation.compile_once(jitted.lower(jax.numpy.ones(9)))
taken = maps()
compilation.forget()
print(before, taken, maps())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_what_is_forgotten_gives_back_its_memory_maps():
    done = subprocess.run([sys.executable, "-c", MANY], stdout=subprocess.PIPE, text=True, check=True)
    before, taken, after = map(int, done.stdout.split())
    assert taken > before + 80  # at least one for each program
    assert after < before + (taken - before) / 4
