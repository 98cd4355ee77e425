"""What both methods do with a model: its passes, other kernels, the model again, and what it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfjax._flax import Runnable
from nfjax.initializers import Initializer
from nfjax.rescale._passes import Passes, Signal
from nfjax.spp._measuring import Choice


def open_passes(called: Runnable, choice: Choice | None = None) -> Passes:
    """The passes of a model; ValueError where it has no kernel, and as `spp.propagate` where there is a choice."""
    passes = Passes(called, choice)
    if not passes.kernels:
        raise ValueError(
            f"{called.name} has no kernel that could be rescaled: no parameter of two or more axes multiplies by "
            "itself what comes from its inputs"
        )
    return passes


def redraw(passes: Passes, arrays: Any, may: Sequence[bool], init: Initializer, key: jax.Array) -> Any:
    """The arrays of a model with new kernels, each slice of one that a loop goes through drawn by itself."""
    leaves, tree = jax.tree.flatten(arrays)
    for number, kernel in enumerate(passes.kernels):
        if not any(may[i] for i, unit in enumerate(passes.units) if unit.kernel == number):
            continue
        leaf, own = leaves[kernel.leaf], jax.random.fold_in(key, number)
        if kernel.rounds is None:
            leaves[kernel.leaf] = init(own, leaf.shape, leaf.dtype)
        else:
            slices = [init(jax.random.fold_in(own, i), leaf.shape[1:], leaf.dtype) for i in range(kernel.rounds)]
            leaves[kernel.leaf] = jnp.stack(slices)
    return jax.tree.unflatten(tree, leaves)


def rebuild(model: Any, called: Runnable, arrays: Any) -> Any:
    """A model of the same kind: an NNX module with these arrays, or the variables of a Linen module."""
    return nnx.merge(called.network, arrays[0]) if isinstance(model, nnx.Module) else arrays[0]


def choose(passes: Passes, kernels: Callable[[str], bool] | None) -> list[bool]:
    """Whether each unit may be changed; ValueError where none may."""
    may = [kernels is None or bool(kernels(passes.kernels[unit.kernel].path)) for unit in passes.units]
    if not any(may):
        paths = "\n  ".join(kernel.path for kernel in passes.kernels)
        raise ValueError(f"kernels= leaves no kernel to be changed; there are\n  {paths}")
    return may


def finite(passes: Passes, variances: np.ndarray) -> np.ndarray:
    """The variances, if all of them are finite.

    Raises:
        ValueError: One is not; the message names the first.
    """
    for unit, variance in zip(passes.units, variances, strict=True):
        if not np.isfinite(variance):
            raise ValueError(
                f"what {unit.path} returns has the variance {variance}: the batch or a parameter before it is not "
                "finite, or overflows"
            )
    return variances


def positive(passes: Passes, signal: Signal) -> Signal:
    """The variances at the blocks, if all of them are finite and none is zero.

    Raises:
        ValueError: One is; the message names the first.
    """
    for direction, variances in zip(("activations", "gradient"), signal[:2], strict=True):
        for path, variance in zip(passes.paths, variances, strict=True):
            if not (np.isfinite(variance) and variance > 0):
                raise ValueError(
                    f"the variance of the {direction} at {path} is {variance}: the batch is constant or not finite, or "
                    "the signal ends or overflows before it; factors cannot mend that"
                )
    return signal
