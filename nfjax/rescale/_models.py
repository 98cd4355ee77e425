"""A model that is rescaled: opened as a function of arrays, and closed again with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfjax._flax import Runnable, runnable
from nfjax.initializers import Initializer
from nfjax.rescale._passes import Passes
from nfjax.spp._measuring import Choice


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with its inputs.

    Attributes:
        model: As it was given.
        called: As a function of arrays.
    """

    model: Any
    called: Runnable

    def passes(self, choice: Choice | None = None) -> Passes:
        """Its passes; ValueError where it has no kernel, otherwise as `spp.propagate` where there is a choice."""
        passes = Passes(self.called, choice)
        if not passes.kernels:
            raise ValueError(
                f"{self.called.name} has no kernel that could be rescaled: no parameter of two or more axes multiplies "
                "by itself what comes from its inputs"
            )
        return passes

    def redrawn(self, passes: Passes, may: Sequence[bool], init: Initializer, key: jax.Array) -> Opened:
        """With new kernels, each slice of one that a loop goes through by itself."""
        leaves, tree = jax.tree.flatten(self.called.arrays)
        for number, kernel in enumerate(passes.kernels):
            if not any(may[i] for i, unit in enumerate(passes.units) if unit.kernel == number):
                continue
            leaf, own = leaves[kernel.leaf], jax.random.fold_in(key, number)
            if kernel.rounds is None:
                leaves[kernel.leaf] = init(own, leaf.shape, leaf.dtype)
            else:
                slices = [init(jax.random.fold_in(own, i), leaf.shape[1:], leaf.dtype) for i in range(kernel.rounds)]
                leaves[kernel.leaf] = jnp.stack(slices)
        return dataclasses.replace(
            self, called=dataclasses.replace(self.called, arrays=jax.tree.unflatten(tree, leaves))
        )

    def rebuilt(self, arrays: Any) -> Any:
        """A model of the same kind: an NNX module with these arrays, or the variables of a Linen module."""
        return nnx.merge(self.called.network, arrays[0]) if isinstance(self.model, nnx.Module) else arrays[0]


def open_model(
    model: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    variables: Mapping[str, Any] | None,
    rngs: Any,
    mutable: Any,
    seed: int,
) -> Opened:
    """As `_flax.runnable` does; an NNX model is copied, so that what comes back shares no array that could be written.

    Raises:
        TypeError: As `_flax.runnable`.
    """
    return Opened(model, runnable(model, inputs, kwargs, variables, rngs, mutable, jax.random.key(seed)))


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


def positive(passes: Passes, signal: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The variances at the blocks, if all of them are finite and none is zero.

    Raises:
        ValueError: One is; the message names the first.
    """
    for direction, variances in zip(("activations", "gradient"), signal, strict=True):
        for path, variance in zip(passes.paths, variances, strict=True):
            if not (np.isfinite(variance) and variance > 0):
                raise ValueError(
                    f"the variance of the {direction} at {path} is {variance}: the batch is constant or not finite, or "
                    "the signal ends or overflows before it; factors cannot mend that"
                )
    return signal
