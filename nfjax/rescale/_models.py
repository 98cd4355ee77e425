"""What both methods do with a model: its passes, other kernels, the model again, and what it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfjax._flax import Runnable
from nfjax.initializers import Initializer
from nfjax.rescale._passes import Passes, Signal
from nfjax.rescale._report import listed
from nfjax.spp._measuring import Choice
from nfjax.spp._products import Kernel


def refuse_empty(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """ValueError where an array of the batch has no values."""
    for array in _arrays(inputs, kwargs):
        if not np.size(array):
            raise ValueError(f"an input of shape {np.shape(array)} is empty: expected a batch of examples")


def examine(inputs: Sequence[Any], kwargs: Mapping[str, Any], report: Any) -> tuple[str, ...]:
    """What a batch cannot tell, although variances can be measured with it; a sentence for each reservation, which is a
    warning where there is no report to tell it.

    Raises:
        ValueError: It tells nothing: all of its values are equal.
    """
    arrays = [array for array in _arrays(inputs, kwargs) if np.size(array) != 1]
    # An input with a mask or a number beside it varies if one of them does.
    if arrays and all(bool(jnp.all(array == array[(0,) * array.ndim])) for array in arrays):
        value = np.asarray(arrays[0]).flat[0]
        raise ValueError(
            f"every value of the batch is {value}: what a constant does to the kernels says nothing about data; "
            "expected a batch of the examples that the model is trained on, or noise in place of them"
        )
    cautions, batches = [], [array for array in arrays if array.ndim > 1]
    if batches and all(len(array) == 1 for array in batches):
        cautions.append("the batch is a single example: the variances are its own, and others may differ; take 32")
    elif batches and all(bool(jnp.all(array == array[:1])) for array in batches):
        cautions.append(f"the {len(batches[0])} examples of the batch are all the same: they count as one; take others")
    if any(array.dtype == np.uint8 for array in batches):
        cautions.append("an input is uint8, such as pixels from 0 to 255: is the model trained on these, as they are?")
    for caution in cautions if report is None else ():
        warnings.warn(caution, UserWarning, stacklevel=3)
    return tuple(cautions)


def _arrays(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Those of numbers."""
    leaves = jax.tree.leaves((tuple(inputs), dict(kwargs)))
    return [leaf for leaf in leaves if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.number)]


def open_passes(called: Runnable, choice: Choice | None = None) -> Passes:
    """The passes of a model; ValueError where it has no kernel, and as `spp.propagate` where there is a choice."""
    passes = Passes(called, choice)
    if not passes.kernels:
        named = listed([f"{path} ({dtype})" for path, dtype in passes.quantized])
        quantized = f"; quantized, which has to come after rescaling: {named}" if named else ""
        raise ValueError(
            f"{called.name} has no kernel that could be rescaled: no parameter of two or more axes multiplies by "
            f"itself what comes from its inputs{quantized}"
        )
    return passes


def redraw(passes: Passes, arrays: Any, left: Sequence[str], init: Initializer, key: jax.Array) -> Any:
    """The arrays of a model with new kernels, each slice of one that a loop goes through drawn by itself."""
    leaves, tree = jax.tree.flatten(arrays)
    for number, kernel in enumerate(passes.kernels):
        if all(left[i] for i, unit in enumerate(passes.units) if unit.kernel == number):
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


def leave(passes: Passes, kernels: Callable[[str], bool] | None) -> list[str]:
    """Why each unit is left as it is, empty where it may be changed; ValueError where none may."""

    def reason(kernel: Kernel) -> str:
        if kernel.variable:
            return f"is a {kernel.variable}, no nnx.Param: frozen"
        return "" if kernels is None or kernels(kernel.path) else "left out"

    left = [reason(passes.kernels[unit.kernel]) for unit in passes.units]
    if all(left):
        why = "no kernel may be changed" if kernels is None else "kernels= leaves no kernel to be changed"
        frozen = [f": {reason(kernel)}" if kernel.variable else "" for kernel in passes.kernels]
        paths = "\n  ".join(kernel.path + note for kernel, note in zip(passes.kernels, frozen, strict=True))
        raise ValueError(f"{why}; there are\n  {paths}")
    return left


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
