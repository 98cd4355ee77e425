"""Strict numerics for every test, and a tiny network and config for those that train."""

import gc
import importlib.metadata
import inspect
import os
import threading

# The tests compile far more than they compute: the same passes over fewer and larger modules, and fewer of them over
# loops. Loops are vectorized, and products are added up in one rounding, as everywhere. A flag that XLA does not know
# ends the process, and the last one is a debugging aid that newer versions may have dropped.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=8"
    " --xla_backend_extra_options=-disable-lsr,-unroll-threshold=0"
    f"{' --xla_cpu_use_fusion_emitters=false' if importlib.metadata.version('jaxlib').startswith('0.10.') else ''}"
)

import jax
import pytest
from jax._src.interpreters import mlir

from nfjax import config as configs

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

gc.set_threshold(100_000, 20, 100)  # what JAX and Flax hold is large, lasts, and need not be walked again and again


def _no_sharding(tracer):
    raise AttributeError(f"{type(tracer).__name__} has no attribute 'sharding'")


# Flax asks each value that it assigns to a variable for its sharding. A tracer has none, and before JAX 0.12 it says
# so in a message that goes through all that was traced: two thirds of the time that 50 layers with batch norm take.
if jax.__version_info__ < (0, 12):
    jax.core.Tracer.sharding = property(_no_sharding)


class _Context(threading.local):
    """What MLIR knows of its dialects, for some programs of a thread. Making it anew, as JAX does for every program
    before 0.12, takes a fifth of the time of a small one, and the memory of all of them until it is collected.
    """

    made, programs = None, 0

    def __call__(self, make=mlir.make_ir_context):
        if self.made is None or self.programs == 50:  # it grows with what it has seen
            self.made, self.programs = make(), 0
        self.programs += 1
        return self.made


# This file is imported by two names, and one of them is enough.
if jax.__version_info__ < (0, 12) and inspect.isfunction(mlir.make_ir_context):
    mlir.make_ir_context = _Context()

TINY = 10  # the depth of the smallest network, one basic block per stage
# Of `nfjax reproduce`: a run that takes a second, on made-up images.
TINY_FLAGS = [
    "--epochs=1", "--config.batch_size=64", "--config.model.width=2", "--config.data.image_size=8",
    "--config.data.source=synthetic", "--config.augment.crop_padding=1", "--config.augment.rand_operations=0",
    "--config.data.share=0.25", "--config.train.onednn=False", "--data=made-up",
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """The same program is compiled once per test session, in its processes and in those that they start: small ones,
    of a single operation, as well, since they are most of all.
    """
    base = tmp_path_factory.getbasetemp()
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # as `nfjax.compilation` may: it is in the keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
        patch.setenv("NFJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny_config(monkeypatch):
    """Two epochs of 16 steps on made-up images, with a network that compiles in a second or two."""
    config = configs.base()
    config.batch_size = 64
    config.epochs = 2
    # A block without and a block with a stride, which is less to compile than the smallest depth that has a name.
    config.model.stage_sizes, config.model.block = (1, 1), "basic"
    config.model.width = 4
    config.data.source = "synthetic"
    config.data.image_size = 8
    config.augment.crop_padding = 1
    config.augment.rand_operations = 0  # it compiles longer than all the rest
    config.log.every_steps = 5
    config.train.onednn = False  # whose programs are not kept: each test would compile them anew
    return config
