"""What a kernel's own numbers say: its variance, and the initialization that it looks like."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from nfjax.initializers import gain
from nfjax.spp._tracing import Call
from nfjax.spp._variables import PARAMETER, Slot, values_of

ERRORS = 4.0  # standard errors of a sample variance, within which a kernel looks like an initialization
EXACT = 0.02  # of one such error: with a variance that close to its target, and a mean to 0, it is made and not drawn
KERNELS = ("kernel", "embedding")  # Flax's names of what is no vector


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as it is.

    Attributes:
        path: Where it stands in the model.
        layer: The path of the module that holds it.
        shape: Of one layer; a stack of kernels, which a loop goes through, has one shape and one variance.
        fans: (n_in, n_out): inputs and outputs of one unit, windows included.
        variance: Of all its values.
        looks_like: The initializations whose variance it has to within sampling error, such as "He fan-in", the
            closest first; several where n_in = n_out.
        zero: Whether all of it is 0.
        standardized: Whether its mean is 0 and its variance that of an initialization to more digits than a draw would
            give, as after `initializers.standardize`.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    fans: tuple[int, int]
    variance: float
    looks_like: tuple[str, ...] = ()
    zero: bool = False
    standardized: bool = False

    def __str__(self) -> str:
        what = " or ".join(self.looks_like) or "no initialization that is known"
        what = "all zero" if self.zero else f"{what}{', standardized' if self.standardized else ''}"
        return f"{self.path} {'x'.join(map(str, self.shape))}: variance {self.variance:.3g}, {what}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the module at one path holds a kernel.

    Attributes:
        convolution: Whether it is [*window, c_in, c_out].
        outputs: How many of its last axes are outputs: several in a layer that makes attention heads.
        rounds: How often the module runs.
    """

    convolution: bool
    outputs: int
    rounds: int


def layouts(calls: Sequence[Call], runs: Mapping[int, int]) -> dict[str, Layout]:
    """For each path at which a module runs, in the order of the calls.

    Args:
        calls: Of the model's trace.
        runs: How often each of them runs.
    """
    rounds: collections.Counter[str] = collections.Counter()
    for index, count in runs.items():
        rounds[calls[index].path] += count
    found = {}
    for index in sorted(runs):
        path, module = calls[index].path, calls[index].module
        features = [getattr(module, name, None) for name in ("out_features", "features")]
        outputs = next((len(one) for one in features if isinstance(one, tuple | list)), 1)
        found.setdefault(path, Layout(getattr(module, "kernel_size", None) is not None, outputs, rounds[path]))
    return found


def read(known: Mapping[str, Layout], slots: Sequence[Slot], leaves: Sequence[Any]) -> list[Kernel]:
    """The kernels of the modules that a model calls, in the order of their first call.

    Args:
        known: By `layouts`.
        slots: What the model's arrays are.
        leaves: These arrays; what lies on other processes' devices is left out.
    """
    held: dict[str, list[Kernel]] = {path: [] for path in known}
    for slot, leaf in zip(slots, leaves, strict=True):
        if slot.kind != PARAMETER or slot.owner not in known or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        layout, shape = known[slot.owner], np.shape(leaf)
        # A loop's parameters are stacked along their first axis; a kernel has two axes besides.
        stacked = len(shape) > 1 and 1 < layout.rounds == shape[0] and not layout.convolution
        if stacked and (len(shape) > 2 or slot.path[-1] not in KERNELS):
            shape = shape[1:]
        if len(shape) > 1 and (values := values_of(leaf)) is not None:
            held[slot.owner].append(_kernel(slot, layout, shape, values.astype(np.float32, copy=False)))
    return [kernel for kernels in held.values() for kernel in kernels]


def _kernel(slot: Slot, layout: Layout, shape: tuple[int, ...], values: np.ndarray) -> Kernel:
    if layout.convolution or layout.outputs >= len(shape):
        fans = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
    else:
        cut = len(shape) - layout.outputs
        fans = math.prod(shape[:cut]), math.prod(shape[cut:])
    variance, mean = float(values.var(dtype=np.float64)), float(values.mean(dtype=np.float64))
    alike = _alike(variance, fans, values.size)
    exact = bool(alike) and alike[0][1] < EXACT and mean**2 < EXACT**2 * variance / values.size
    names = tuple(name for name, _ in alike)
    return Kernel(slot.name, slot.owner, shape, fans, variance, names, not values.any(), exact)


def expected(fans: tuple[int, int]) -> dict[str, float]:
    """The variances that initializations for layers behind a ReLU, and those without a gain, give a kernel."""
    n_in, n_out = fans
    return {
        "He fan-in": 2 / n_in,
        "He fan-out": 2 / n_out,
        "LeCun": 1 / n_in,
        "Glorot": 2 / (n_in + n_out),
        "Brock": gain("relu").channel / n_in,
        "1 / fan-out": 1 / n_out,
    }


def _alike(variance: float, fans: tuple[int, int], size: int) -> list[tuple[str, float]]:
    """(name, distance in standard errors) of the initializations that may have drawn it, the closest first."""
    error = math.sqrt(2 / size)
    distances = {name: abs(variance / value - 1) / error for name, value in expected(fans).items()}
    near = [(name, distance) for name, distance in distances.items() if distance <= ERRORS]
    return sorted(near, key=lambda item: round(item[1], 2))  # as in `expected` where they are one
