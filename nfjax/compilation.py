"""Compiled programs are kept from one run to the next: a program that was compiled once is read from the disk.

The commands turn this on. A library that changes settings of JAX when it is imported would do so for its user's whole
program, so `import nfjax` leaves it alone; call `keep` for the same.
"""

from __future__ import annotations

import os

from absl import logging
from jax import config as jax_config

from nfjax import _cache

SHORTEST = 0.2  # seconds of compilation from which on a program is kept; JAX's own 1.0 leaves out half of a start


def keep() -> None:
    """Keeps what is compiled from here on under `_cache.cache_directory()`, or where $JAX_COMPILATION_CACHE_DIR says.
    $JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if jax_config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = _cache.cache_folder("compiled")
    except OSError as error:
        logging.warning("what is compiled cannot be kept, and is compiled at every start: %s", error.strerror or error)
        return
    jax_config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax_config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
