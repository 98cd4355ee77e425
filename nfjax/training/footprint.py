"""How much memory a compiled program takes on each device, against how much there is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from nfjax import compilation


def of(compiled: jax.stages.Compiled) -> int | None:
    """Bytes on each device while the program runs: arguments, results and temporaries; None where the compiler does not
    tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes


def available(device: jax.Device) -> int | None:
    """Bytes that a program may use on this device; on CPU its share of the machine's. None where nobody tells."""
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    statistics: dict[str, Any] | None = device.memory_stats()
    return (statistics or {}).get("bytes_limit")


HINT = (
    "smaller parts with --config.train.accumulate_steps=2 (or more), --config.model.dtype=bfloat16, "
    "--config.model.remat=True, a smaller --config.batch_size, or more devices"
)


def described(needed: int | None, there: int | None) -> str:
    """A line for the person who starts a run, with what helps where it will not fit."""
    if needed is None:
        return "memory  unknown: the compiler does not tell"
    line = f"memory  {needed / 2**30:.2f} GiB for a step on each device"
    if there is None:
        return line
    line += f", of {there / 2**30:.1f} GiB"
    return f"{line}: this will not fit; what helps: {HINT}" if needed > there else line


class Compiled:
    """A jitted function, compiled for the shapes of its first call; before it runs, a line says what memory it takes.

    Args:
        jitted: The function.
        say: Gets the line.
        options: Of the compiler.
        **static: Its static arguments.
    """

    def __init__(self, jitted: Any, say: Callable[[str], None], options: dict[str, Any], **static: Any):
        self._jitted, self._say, self._options, self._static = jitted, say, options, static
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            with compilation.not_kept(self._options):
                lowered = self._jitted.lower(*arguments, **self._static)
                self._compiled = compilation.compile_once(lowered, self._options)
            self._say(described(of(self._compiled), available(jax.local_devices()[0])))
        return self._compiled(*arguments)
