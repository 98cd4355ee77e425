"""XLA's compiler for GPUs takes our training steps. No GPU is needed, but jax's plugin for one, and some minutes:

    pip install "jax[cuda13]"
    pytest tests/gpu

On a GPU a program that XLA cannot compile ends the process with a trace of C++ functions. What it does before it tries
kernels out on a device is the same here.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from nfjax.residual import RESIDUALS

NETWORKS = {
    **{rule: {"model.depth": 10, "model.residual": rule} for rule in RESIDUALS},
    "BatchNorm": {"model.depth": 18, "model.residual": "identity", "model.norm": "batch"},
    "IdShort": {"model.depth": 50, "model.residual": "idshort"},
    "ConvShort": {"model.depth": 50, "model.residual": "convshort"},
}
# Stem, pixels and batch: usual ones, odd ones, few and many.
SHAPES = [("cifar", 32, 128), ("cifar", 33, 1), ("cifar", 64, 512), ("imagenet", 224, 64), ("imagenet", 97, 16)]
WITHOUT_DEVICE = "No supported config found for HLO"  # as XLA says where it has to measure kernels: all else is done

needs_plugin = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason='needs jax for GPUs, pip install "jax[cuda13]"',
)


@needs_plugin
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}, {0[1]} pixels, {0[2]} images".format)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_training_step_compiles(network, shape, dtype):
    stem, pixels, batch = shape
    settings = NETWORKS[network] | {"model.stem": stem, "data.image_size": pixels, "batch_size": batch}
    command = [sys.executable, str(pathlib.Path(__file__).with_name("compile_step.py"))]
    command += [f"{name}={value!r}" for name, value in (settings | {"model.dtype": dtype}).items()]
    root = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
    told = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("    @"))  # XLA's own frames
    assert done.returncode == 0 or WITHOUT_DEVICE in told, told[-3000:]
