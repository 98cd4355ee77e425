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
VECTORS = ("bias", "scale")  # Flax's names of what is a vector, of several heads or layers a stack of them
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
        strides: Of a convolution, the largest.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    fans: tuple[int, int]
    variance: float
    looks_like: tuple[str, ...] = ()
    zero: bool = False
    standardized: bool = False
    strides: int = 1

    def __str__(self) -> str:
        what = " or ".join(self.looks_like) or "no initialization that is known"
        what = "all zero" if self.zero else f"{what}{', standardized' if self.standardized else ''}"
        return f"{self.path} {'x'.join(map(str, self.shape))}: variance {self.variance:.3g}, {what}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the module at one path holds a kernel.

    Attributes:
        window: The number of its axes that are a convolution's window; None where it is none.
        inputs: The number of its axes that are summed over, None where that is not known.
        outputs: Likewise of those that are outputs: several in a layer that makes attention heads.
        groups: Of a convolution.
        strides: Likewise.
        rounds: How often the module runs.
    """

    window: int | None
    inputs: int | None
    outputs: int
    groups: int
    strides: int
    rounds: int

    def shape(self, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """That of one kernel: without the axes along which loops and vmap stack them, which come first; empty for what
        is no kernel.
        """
        if name in VECTORS:
            return ()
        own = self.window + 2 if self.window is not None else self.inputs and self.inputs + self.outputs
        if own:
            return shape[-own:] if len(shape) >= own else ()
        if 1 < self.rounds == shape[0] and (len(shape) > 2 or name not in KERNELS):
            shape = shape[1:]
        return shape if len(shape) > 1 else ()

    def fans(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(n_in, n_out) of a kernel of that shape."""
        if self.window is not None or self.outputs >= len(shape):
            return math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1] // self.groups
        cut = len(shape) - self.outputs
        return math.prod(shape[:cut]), math.prod(shape[cut:])


def layouts(calls: Sequence[Call], runs: Mapping[int, int], chosen: Sequence[int]) -> dict[str, Layout]:
    """For each path of a layer that runs, in the order of the calls.

    Args:
        calls: Of the model's trace.
        runs: How often each of them runs.
        chosen: Those of layers.
    """
    rounds: collections.Counter[str] = collections.Counter()
    for index, count in runs.items():
        rounds[calls[index].path] += count
    found = {}
    for index in chosen:
        path, module = calls[index].path, calls[index].module
        found.setdefault(path, _layout(module, rounds[path]))
    return found


def _layout(module: Any, rounds: int) -> Layout:
    window, groups = getattr(module, "kernel_size", None), getattr(module, "feature_group_count", 1)
    strides = getattr(module, "strides", None) or 1
    features = [getattr(module, name, None) for name in ("out_features", "features")]
    several = next((one for one in features if isinstance(one, tuple | list)), None)
    axis = getattr(module, "axis", None)
    inputs = (len(axis) if isinstance(axis, tuple | list) else 1) if any(one is not None for one in features) else None
    return Layout(
        window=None if window is None else len(window) if isinstance(window, tuple | list) else 1,
        inputs=inputs,
        outputs=1 if several is None else len(several),
        groups=groups if isinstance(groups, int) else 1,
        strides=max(strides) if isinstance(strides, tuple | list) else strides,
        rounds=rounds,
    )


def read(known: Mapping[str, Layout], slots: Sequence[Slot], leaves: Sequence[Any]) -> list[Kernel]:
    """The kernels of a model's layers, in the order of their first call.

    Args:
        known: By `layouts`.
        slots: What the model's arrays are.
        leaves: These arrays; what lies on other processes' devices is left out.
    """
    held: dict[str, list[Kernel]] = {path: [] for path in known}
    for slot, leaf in zip(slots, leaves, strict=True):
        if slot.kind != PARAMETER or slot.owner not in known or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        layout = known[slot.owner]
        shape = layout.shape(np.shape(leaf), slot.path[-1]) if np.size(leaf) and np.ndim(leaf) > 1 else ()
        if shape and (values := values_of(leaf)) is not None:
            held[slot.owner].append(_kernel(slot, layout, shape, values.astype(np.float32, copy=False)))
    return [kernel for kernels in held.values() for kernel in kernels]


def _kernel(slot: Slot, layout: Layout, shape: tuple[int, ...], values: np.ndarray) -> Kernel:
    fans = layout.fans(shape)
    variance, mean = float(values.var(dtype=np.float64)), float(values.mean(dtype=np.float64))
    alike = _alike(variance, fans, values.size)
    exact = bool(alike) and alike[0][1] < EXACT and mean**2 < EXACT**2 * variance / values.size
    names = tuple(name for name, _ in alike)
    return Kernel(slot.name, slot.owner, shape, fans, variance, names, not values.any(), exact, layout.strides)


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
