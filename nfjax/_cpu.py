"""How programs are compiled and memory is kept on a CPU, each with its reason.

What is part of a network is in `_convolution` and `layers`, and chosen by the platform that it is lowered for.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from platform import libc_ver, machine
from typing import Any

import jax
from jax.sharding import Mesh

# Parameters of glibc's mallopt (malloc.h): M_ARENA_MAX, one heap for all threads, as those of a thread are of 64 MB at
# most; M_MMAP_MAX, no block outside of it; M_TRIM_THRESHOLD, nothing is given back; M_TOP_PAD, it grows by 1 GB at a
# time.
GLIBC = {-8: 1, -4: 0, -1: -1, -2: 10**9}
# Where the drivers of NVIDIA's and AMD's GPUs and of TPUs show their devices.
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")

# Options of a compilation with which XLA takes oneDNN's convolutions and products, which jaxlib 0.11 brought: half the
# time or less. YNNPACK's would go before them, and are left the sums alone, with which batch norm is 1.6 times as fast.
# Before 0.11 the first option makes convolutions slower.
ONEDNN: dict[str, Any] = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


def has_onednn() -> bool:
    """Whether XLA's programs for this machine's CPU can call oneDNN."""
    return jax.__version_info__ >= (0, 11) and machine() in ("x86_64", "AMD64")


def compiler_options(platform: str, onednn: bool = True) -> dict[str, Any]:
    """How a program for this platform is compiled.

    Args:
        platform: On all but a CPU as XLA does by itself.
        onednn: Whether oneDNN is wanted.
    """
    return ONEDNN if platform == "cpu" and onednn and has_onednn() else {}


def keep_memory() -> None:
    """Has memory that was freed stay with this process, on Linux with glibc, unless JAX may run on an accelerator.

    XLA takes its buffers anew for every step, hundreds of megabytes that the system has to find and to clear again page
    by page: a tenth of a ResNet's step. Only threads that begin later are affected by all of it, so call this before
    JAX begins its own.
    """
    if sys.platform != "linux" or libc_ver()[0] != "glibc":
        return
    found = any(next(pathlib.Path("/dev").glob(name), None) for name in ACCELERATORS)
    if found and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in GLIBC.items():
        mallopt(option, value)


def platform_of(mesh: Mesh) -> str:
    """The platform that a program over these devices is lowered for."""
    return mesh.devices.flat[0].platform
