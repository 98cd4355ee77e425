"""Compiled programs are kept from one run to the next: a program that was compiled once is read from the disk.

The commands turn this on. A library that changes settings of JAX when it is imported would do so for its user's whole
program, so `import nfjax` leaves it alone; call `keep` for the same.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from nfjax import _cache

PLACE = "JAX_COMPILATION_CACHE_DIR"
SHORTEST = 0.2  # seconds of compilation from which on a program is kept; JAX's own 1.0 leaves out half of a start


def keep() -> None:
    """Keeps what is compiled from here on under `_cache.cache_directory()`, or where $JAX_COMPILATION_CACHE_DIR says.
    $JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

    The folder may be moved, and copied to another machine; a program is used there where all that it was compiled for
    is the same, and compiled anew where not.
    """
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = _cache.cache_folder("compiled")
        except OSError as error:
            reason = error.strerror or error
            logging.warning("what is compiled cannot be kept, and is compiled at every start: %s", reason)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    elif PLACE not in os.environ:
        return  # the program that calls has chosen for itself
    _prefer("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    if jax.__version_info__ < (0, 11):
        # XLA's notes on the kernels that it measured on a GPU would lie in the folder, and its path would be part of
        # what a program is found by: after a move, none would be.
        _prefer("jax_persistent_cache_enable_xla_caches", "none")


_programs: collections.OrderedDict[str, Any] = collections.OrderedDict()
_programs_lock = threading.Lock()
_MOST_PROGRAMS = 16  # of the last ones that are held in the process


def compile_once(lowered: Any, options: Mapping[str, Any] | None = None, placed: Sequence[str] = ()) -> Any:
    """The executable of a lowered program, the same one for equal programs of this process, wherever they come from:
    another seed, or another initialization of the same network, is the same program.

    Args:
        lowered: Of `jax.jit(...).lower`.
        options: Of the compiler.
        placed: What else tells programs apart, such as where their arguments lie.
    """
    text = lowered.as_text()
    if "callback" in text:  # which Python function it calls does not stand in the text
        return lowered.compile(options)
    exact = "\n".join([text, repr(sorted((options or {}).items())), *placed])
    name = hashlib.sha256(exact.encode()).hexdigest()
    with _programs_lock:
        if name not in _programs:
            _programs[name] = lowered.compile(options)
            if len(_programs) > _MOST_PROGRAMS:
                _programs.popitem(last=False)
        _programs.move_to_end(name)
        return _programs[name]


def forget() -> None:
    """Lets go of all programs of this process, JAX's own included; what is kept on the disk stays.

    A program of a deep network on a CPU takes some thousand memory maps, of which Linux allows a process 65,530: after
    some dozens of networks, LLVM could compile no more.
    """
    with _programs_lock:
        _programs.clear()
    jax.clear_caches()
    gc.collect()


@contextlib.contextmanager
def not_kept(options: dict[str, Any]) -> Iterator[None]:
    """No warning that a program is not kept, where it is compiled with options of which that is known: those with
    oneDNN's convolutions cannot be written (jaxlib 0.12).
    """
    with warnings.catch_warnings():
        if options:
            warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry.*bad_alloc")
        yield


def _prefer(option: str, value: Any) -> None:
    """Sets an option of JAX, unless the environment does."""
    if option.upper() not in os.environ:
        jax.config.update(option, value)
