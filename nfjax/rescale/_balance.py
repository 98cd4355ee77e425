"""Balance: one factor for each kernel, such that the signal's variances are as flat as factors can make them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from nfjax._flax import ABSENT, runnable
from nfjax.rescale import _models
from nfjax.rescale._passes import Signal
from nfjax.rescale._report import Reader, Report, Row
from nfjax.spp._measuring import Choice
from nfjax.spp._monitor import COTANGENT, stream
from nfjax.spp._outputs import Output
from nfjax.spp._selection import Where
from nfjax.spp._statistics import IDENTITY

DIRECTIONS = {"forward": (1.0, 0.0), "backward": (0.0, 1.0), "both": (1.0, 1.0)}  # name -> weights of the two
ROUNDS = 20  # of Gauss and Newton's method, at most
STEP = 0.05  # in a factor's logarithm, by which its effect is measured
LONGEST = 1.5  # in a factor's logarithm, in one round
HALVINGS = 6  # of a step that makes nothing better
SETTLED = 1e-8  # a sum of squares below which all is flat
PROGRESS = 0.01  # relative, of the sum of squares in one round, below which there is no more to be had
HOLD = 0.02  # by which a factor's logarithm must move some variance's, to have a hold of the signal
HELD = 100.0  # weight of the shares' logarithms' squares against the variances', in the choice of a step's length
TINY = 1e-30  # in place of a share of zero, of which there is no logarithm
SMALLEST = 1e-2  # singular values below this share of the largest are left out: what they would move is noise


def balance(
    model: Any,
    *inputs: Any,
    direction: str = "both",
    hold_shares: bool = False,
    variables: Mapping[str, Any] | None = None,
    kernels: Callable[[str], bool] | None = None,
    where: Where | None = None,
    output: Output | None = None,
    seed: int = 0,
    rngs: Any = ABSENT,
    mutable: Any = None,
    report: Reader | None = None,
    **kwargs: Any,
) -> Any:
    """One positive factor for each kernel, such that the variances that `spp.propagate` measures are as flat as can be.

    Minimized is the sum, over the blocks and the directions, of the squared deviation of a variance's logarithm from
    its mean over the blocks: by Gauss and Newton's method, with the effect of each factor measured. Of all factors that
    do equally well, those closest to 1 are taken. What factors cannot reach stays; the report has the variances before
    and after.

    An identity shortcut adds up what its branches add, and only branches that add next to nothing leave it flat: by
    small factors for their kernels, or, where they begin with a norm, by a large one for what comes before all blocks.
    (SkipInit, ReZero and Fixup begin so, too.) The report says where it came to that; `hold_shares` rules it out.

    Args:
        model: Any `nnx.Module`, called as `model(*inputs, **kwargs)`, or any Linen module. It is left as it was.
        *inputs: A batch, as the model is called with it.
        direction: "forward", of activations; "backward", of gradients; or "both".
        hold_shares: Keep Var[x_l - x] / Var[x_l] of every residual block what it was, x its input; of those, at least,
            that are not the identity to begin with.
        variables: Of a Linen module; drawn by `model.init` from `seed` if left out.
        kernels: Which of them may be changed, `path -> bool`; all if left out. An NNX variable that is no `nnx.Param`
            is frozen, and left.
        where: The blocks between which the signal is measured, as for `spp.propagate`.
        output: Which array of a block that returns several, likewise.
        seed: Of the gradient at the last block, and of what else is drawn.
        rngs: Of the model's call.
        mutable: Collections that a Linen module may write; left out, all but the parameters if it writes any.
        report: Called with the `Report`, such as `print`.
        **kwargs: Of the model's call.

    Returns:
        The model with other kernels: an `nnx.Module`, or the variables of a Linen module.

    Raises:
        ValueError: There is no such direction, no kernel, no block, the batch is empty or constant, or a variance is
            zero or not finite; nothing is changed.
        TypeError: It is no Flax model, or variables, arrays are none. An error from inside the model passes through.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
    begin, passes = time.perf_counter(), 0
    called = runnable(model, inputs, kwargs, variables, rngs, mutable, jax.random.key(seed))
    _models.refuse_empty(inputs, kwargs)
    network = _models.open_passes(called, Choice(where=where, output=output))
    left = _models.leave(network, kernels)
    may = np.flatnonzero([not reason for reason in left])
    weights, key = DIRECTIONS[direction], stream(seed, COTANGENT)

    def measure(logs: np.ndarray) -> Signal:
        nonlocal passes
        passes += 1
        return _models.positive(network, network.blocks(np.exp(logs), key))

    def deviations(found: Signal) -> np.ndarray:
        logs = [weight * np.log(values) for weight, values in zip(weights, found[:2], strict=True)]
        return np.concatenate([values - values.mean() for values in logs])

    start = measure(np.zeros(len(network.units)))
    cautions = _models.examine(inputs, kwargs, report)
    residual = np.flatnonzero((start.shares > IDENTITY) & (start.shares < 1) & bool(hold_shares))

    def changes(found: Signal) -> np.ndarray:
        return np.log(np.maximum(found.shares[residual], TINY) / start.shares[residual])

    logs, now, hold = _flatten(start, measure, deviations, changes, may, len(network.units))
    if report is not None:
        ones = np.ones(len(network.units))
        before, after = network.products(ones), network.products(np.exp(logs))
        notes = {unit: "has no hold of the signal between the blocks" for unit in may if hold[unit] < HOLD}
        notes |= {unit: reason for unit, reason in enumerate(left) if reason}
        rows = [
            Row(unit.path, float(np.exp(logs[i])), float(before[i]), float(after[i]), notes.get(i, ""))
            for i, unit in enumerate(network.units)
        ]
        signal = {name: (start[i], now[i]) for i, name in enumerate(("forward", "backward"))}
        seconds, shares = time.perf_counter() - begin, (start.shares, now.shares)
        report(
            Report(
                f"balance, {direction}", rows, signal, network.paths, network.others, passes, seconds, shares,
                cautions=cautions, quantized=network.quantized,
            )
        )  # fmt: skip
    return _models.rebuild(model, called, network.multiplied(np.exp(logs)))


def _flatten(
    start: Signal,
    measure: Callable[[np.ndarray], Signal],
    deviations: Callable[[Signal], np.ndarray],
    changes: Callable[[Signal], np.ndarray],
    may: np.ndarray,
    count: int,
) -> tuple[np.ndarray, Signal, np.ndarray]:
    """Gauss and Newton's method, from factors of 1.

    Args:
        start: What is measured there.
        measure: From logarithms of factors to the signal.
        deviations: Of a signal, whose squares are to be small.
        changes: Of a signal, which are to be zero.
        may: Which factors may change.
        count: Of all factors.

    Returns:
        The logarithms of the factors, the signal with them, and how far each of them moves a variance's logarithm.
    """
    logs, now, hold = np.zeros(count), start, np.zeros(count)

    def cost(found: Signal) -> float:
        return float((deviations(found) ** 2).sum()) + HELD * float((changes(found) ** 2).sum())

    def effects(at: np.ndarray, found: Signal, nudge: float) -> tuple[np.ndarray, np.ndarray]:
        """Of each factor on the deviations and on the changes, by the difference that a nudge makes."""
        error, change = deviations(found), changes(found)
        jacobian, constraint = np.zeros((len(error), count)), np.zeros((len(change), count))
        for unit in may:
            nudged = at.copy()
            nudged[unit] += nudge
            there = measure(nudged)
            jacobian[:, unit] = (deviations(there) - error) / nudge
            constraint[:, unit] = (changes(there) - change) / nudge
        return jacobian, constraint

    def better(jacobian: np.ndarray, constraint: np.ndarray) -> tuple[np.ndarray, Signal, float]:
        """(where it leads, what is measured there, how much of the cost is gained) of the longest step that helps."""
        step = _step(jacobian, deviations(now), constraint, changes(now))
        step[hold < HOLD] = 0.0
        step *= min(1.0, LONGEST / max(float(np.abs(step).max()), LONGEST))
        for halvings in range(HALVINGS):
            there = logs + step / 2**halvings
            found = measure(there)
            if (gained := 1 - cost(found) / cost(now)) > 0:
                return there, found, gained
        return logs, now, 0.0

    for _ in range(ROUNDS):
        if cost(now) < SETTLED:
            break
        sides = [effects(logs, now, STEP)]
        hold = np.maximum(hold, np.abs(sides[0][0]).max(axis=0))
        for effect in sides[0]:
            effect[:, hold < HOLD] = 0.0
        there, found, gained = better(*sides[0])
        if gained < PROGRESS:
            # A few examples and many ReLUs answer a nudge to one side otherwise than one to the other: by their mean.
            sides.append(effects(logs, now, -STEP))
            mean = [(one + other) / 2 for one, other in zip(*sides, strict=True)]
            for effect in mean:
                effect[:, hold < HOLD] = 0.0
            there, found, gained = max((there, found, gained), better(*mean), key=lambda step: step[2])
        logs, now = there, found
        if gained < PROGRESS:
            break
    return logs, now, hold


def _step(jacobian: np.ndarray, error: np.ndarray, constraint: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The smallest step that makes the error least among those that undo the change."""
    if not len(change):
        return -np.linalg.lstsq(jacobian, error, rcond=SMALLEST)[0]
    back = -np.linalg.lstsq(constraint, change, rcond=SMALLEST)[0]
    _, singular, right = np.linalg.svd(constraint)
    free = right[int((singular > SMALLEST * singular.max()).sum()) :].T
    along = np.linalg.lstsq(jacobian @ free, -(error + jacobian @ back), rcond=SMALLEST)[0]
    return back + free @ along
