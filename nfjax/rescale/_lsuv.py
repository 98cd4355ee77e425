"""LSUV: every layer's output has variance 1 (Mishkin and Matas 2016)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from nfjax import initializers
from nfjax._flax import ABSENT, runnable
from nfjax.rescale import _models
from nfjax.rescale._report import Reader, Report, Row

TRIES = 10  # of a kernel, as the authors'
SWEEPS = 5  # over all kernels
FIXED = "its output does not follow its factor (it is standardized)"
FOLLOWS = 0.5  # of the change that a factor should make to the logarithm of the variance: by less, it has no hold of it


def lsuv(
    model: Any,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    init: str | initializers.Initializer | None = "orthogonal",
    kernels: Callable[[str], bool] | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
    rngs: Any = ABSENT,
    mutable: Any = None,
    report: Reader | None = None,
    **kwargs: Any,
) -> Any:
    """Layer-sequential unit-variance initialization.

    Layer by layer, in the order in which they are computed, the kernel is divided by the standard deviation of what it
    returns for this batch, before anything is added to it. The authors draw the kernels orthogonal first. Where a later
    kernel changes what an earlier one reads, as in a recurrent network, all are gone through again.

    Args:
        model: Any `nnx.Module`, called as `model(*inputs, **kwargs)`, or any Linen module. It is left as it was.
        *inputs: A batch, as the model is called with it.
        variables: Of a Linen module; drawn by `model.init` from `seed` if left out.
        init: Draws the kernels anew: a name in `initializers.INITIALIZERS` or `OF_JAX`, or `(key, shape, dtype) ->
            kernel`. None keeps those that the model has.
        kernels: Which of them may be changed, `path -> bool`; all if left out. An NNX variable that is no `nnx.Param`
            is frozen, and left.
        tolerance: By how much a variance may differ from 1.
        seed: Of what is drawn.
        rngs: Of the model's call.
        mutable: Collections that a Linen module may write; left out, all but the parameters if it writes any.
        report: Called with the `Report`, such as `print`.
        **kwargs: Of the model's call.

    Returns:
        The model with other kernels: an `nnx.Module`, or the variables of a Linen module.

    Raises:
        ValueError: There is no kernel that multiplies the signal, the batch is empty or constant, or a variance is not
            finite; nothing is changed.
        TypeError: It is no Flax model, or variables, arrays are none. An error from inside the model passes through.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be positive")
    begin = time.perf_counter()
    key = jax.random.key(seed)
    called = runnable(model, inputs, kwargs, variables, rngs, mutable, key)
    _models.refuse_empty(inputs, kwargs)
    network = _models.open_passes(called)
    left = _models.leave(network, kernels)
    before = _models.finite(network, network.products(np.ones(len(network.units))))
    cautions = _models.examine(inputs, kwargs, report)
    if init is not None:
        drawn = _models.redraw(network, called.arrays, left, initializers.get(init), key)
        network = network.with_arrays(drawn)
    factors, notes, passes = np.ones(len(network.units)), [""] * len(network.units), 1

    def measure() -> np.ndarray:
        nonlocal passes
        passes += 1
        return _models.finite(network, network.products(factors))

    found = measure()
    for _ in range(SWEEPS):
        swept = factors.copy()
        for number in range(len(network.units)):
            if left[number]:
                notes[number] = left[number]
                continue
            if notes[number] == FIXED:
                continue
            notes[number] = ""
            for _ in range(TRIES):
                was = found[number]
                if was == 0:
                    notes[number] = "what it returns does not vary: the kernel is zero, or the signal is constant"
                    break
                if abs(was - 1) <= tolerance:
                    break
                factors[number] *= was**-0.5
                found = measure()
                if abs(np.log(found[number] / was)) < FOLLOWS * abs(np.log(was)):
                    factors[number], notes[number] = 1.0, FIXED
                    found = measure()
                    break
        # In a loop a later kernel changes what an earlier one reads: once more, until none is changed any more.
        if np.array_equal(swept, factors):
            break
    for number, variance in enumerate(found):
        if not notes[number] and abs(variance - 1) > tolerance:
            notes[number] = f"still {variance:.3g} after {SWEEPS} rounds over all kernels"
    if report is not None:
        rows = [
            Row(unit.path, float(factor), float(old), float(new), note)
            for unit, factor, old, new, note in zip(network.units, factors, before, found, notes, strict=True)
        ]
        report(
            Report(
                "lsuv", rows, {}, (), network.others, passes, time.perf_counter() - begin,
                cautions=cautions, quantized=network.quantized,
            )
        )  # fmt: skip
    return _models.rebuild(model, called, network.multiplied(factors))
