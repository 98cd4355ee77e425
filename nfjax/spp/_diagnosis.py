"""The verdict on a profile: what happens to its variances, and what that rests on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfjax.spp import _causes
from nfjax.spp._causes import Cause, Seen, Verdicts, listed
from nfjax.spp._selection import BLOCKS, LAYERS
from nfjax.spp._statistics import IDENTITY


@dataclasses.dataclass(frozen=True)
class Direction:
    """What happens to a variance along one way through the network.

    Attributes:
        quantity: "activation" (towards the output) or "gradient" (towards the input).
        verdict: "preserved", "vanishing", "exploding" or "non-finite".
        block: The path of the first block, on this way, at which it is no longer preserved; None if it always is.
        total: The variance at the way's end divided by that at its start.
        per_block: `total` to the power of 1 / number of steps.
        extreme: The ratio to the start farthest from 1.
        stages: `per_block` within each stage, in execution order, NaN for a stage of one block.
        transitions: The ratio across each boundary between stages.
        unit: What is called a block here, "block" or "layer"; of layers there are no stages.
    """

    quantity: str
    verdict: str
    block: str | None
    total: float
    per_block: float
    extreme: float
    stages: tuple[float, ...]
    transitions: tuple[float, ...]
    unit: str = BLOCKS

    def __str__(self) -> str:
        way = "towards the output" if self.quantity == "activation" else "towards the input"
        if self.verdict == "non-finite":
            return f"{self.quantity} variance {way}: non-finite from {self.block!r}"
        if self.extreme == 0:
            return f"{self.quantity} variance {way}: vanishing, 0 from {self.block!r}"
        if not math.isfinite(self.per_block):
            change = "changes without bound"
        else:
            verb, factor = ("grows", self.per_block) if self.per_block >= 1 else ("shrinks", 1 / self.per_block)
            change = f"{verb} {factor:.3g}x per {self.unit}"
        line = f"{self.quantity} variance {change} {way}, {self.total:.3g}x in all: {self.verdict}"
        if self.block is not None:
            line += f" from {self.block!r}"
            if abs(math.log(max(self.extreme, 1e-300))) > abs(math.log(max(self.total, 1e-300))) + 1:
                line += f" (at worst {self.extreme:.3g}x)"
        if len(self.stages) > 1:
            shown = ", ".join("-" if math.isnan(x) else f"{x:.3g}" for x in self.stages)
            line += f"\n  per block within stages {shown}; across transitions "
            line += ", ".join(f"{x:.3g}" for x in self.transitions)
        return line


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Verdicts on both directions; `str` of it is what a person reads.

    Attributes:
        forward: Of the activations.
        backward: Of the gradients.
        mode: In which mode the network ran, in words; empty where it has but one.
        notes: What the verdicts rest on, where that is not what one would think: norms on initial statistics, blocks
            that are the identity, parameters that are all zero.
        causes: Why the signal does not survive, or the network will not train for another reason, as far as it can be
            known; each with its evidence and a remedy, what is to be mended first in front.
    """

    forward: Direction
    backward: Direction
    mode: str = ""
    notes: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether both variances are preserved, and no cause is fatal by itself; of layers, whose variances differ by
        nature, whether they are finite.
        """
        ways = (self.forward, self.backward)
        lost = [way for way in ways if way.verdict != "preserved"]
        if self.forward.unit == LAYERS:
            lost = [way for way in lost if way.verdict == "non-finite"]
        return not lost and not any(cause.fatal for cause in self.causes)

    def __str__(self) -> str:
        ran = [f"measured with {self.mode}"] if self.mode else []
        causes = [f"cause: {cause}" for cause in self.causes if not cause.in_notes]
        return "\n".join(
            [str(self.forward), str(self.backward), *ran, *causes, *(f"note: {note}" for note in self.notes)]
        )


def diagnose(profile: Seen, tolerance: float) -> Diagnosis:
    """`Profile.diagnose`."""
    if not tolerance > 1:
        raise ValueError(f"tolerance={tolerance} must be more than 1: it is a factor")
    forward = _direction(profile, profile.forward_var, tolerance, "activation")
    backward = _direction(profile, profile.backward_var, tolerance, "gradient")
    notes = (profile.mode.caveat(), _identities(profile, forward, backward), *_zeros(profile))
    causes = _causes.find(profile, Verdicts(forward.verdict, backward.verdict, forward.total, backward.total))
    return Diagnosis(forward, backward, str(profile.mode), tuple(filter(None, notes)), causes)


def _identities(profile: Seen, forward: Direction, backward: Direction) -> str | None:
    """Where blocks that add nothing preserve a signal."""
    preserved = [way.quantity for way in (forward, backward) if way.verdict == "preserved"]
    number = int((profile.branch_share < IDENTITY).sum())
    if not preserved or 2 * number < len(profile):
        return None
    zero = [name for names in profile.zeros.values() for name in names]
    return (
        f"{number} of {len(profile)} blocks are the identity at these parameters, their branches less than "
        f"{IDENTITY:.1%} of their output's variance (branch_share): that {' and '.join(preserved)} are preserved is "
        f"trivial, and says nothing yet about the branches{f'; all zero: {listed(zero)}' if zero else ''}. Measure "
        "again after some steps of training"
    )


def _zeros(profile: Seen) -> list[str]:
    """Where a variance is zero because a parameter is."""
    notes = []
    still, paths = np.flatnonzero(profile.forward_var == 0), ("", *profile.paths)
    if still.size and (names := profile.zeros.get(paths[still[0]])):
        notes.append(f"no activation comes through {listed(names)}, all zero: it is this that makes it 0, not depth")
    still = np.flatnonzero(profile.backward_var == 0)
    if still.size and (names := profile.zeros.get(profile.paths[still[-1]])):
        way = "; without loss= the gradient starts at the last block" if still[-1] == len(profile) - 1 else ""
        notes.append(
            f"no gradient comes back through {listed(names)}, all zero: it is this that makes it 0, not depth. "
            f"Measure with other values there, as after a step of training{way}"
        )
    return notes


def _direction(profile: Seen, variances: np.ndarray, tolerance: float, quantity: str) -> Direction:
    forward = quantity == "activation"

    def along(values: Sequence[Any]) -> list[Any]:
        return list(values) if forward else list(reversed(values))

    # A layer that no gradient reaches lies on another way.
    there = [i for i, path in enumerate(profile.paths) if forward or path not in profile.unreached]
    way, paths = np.array(along(variances[there].tolist())), along([profile.paths[i] for i in there])
    steps = len(way) - 1
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = way / way[0]
        total = float(ratios[-1])
        per_block = float(total ** (1 / steps)) if steps else 1.0
        growth, transitions = [], []
        stages = profile.stages if profile.level == BLOCKS else []  # layers of one shape are not one stage
        for stage in stages:
            inside = along(variances[stage].tolist())
            growth.append(_root(inside[-1], inside[0], len(inside) - 1))
        for stage in stages[1:]:
            pair = along([variances[stage.start - 1], variances[stage.start]])
            transitions.append(_root(pair[1], pair[0], 1))
    broken = np.flatnonzero(~np.isfinite(way))
    common = {"total": total, "per_block": per_block, "stages": tuple(growth), "transitions": tuple(transitions)}
    common["unit"] = profile.level
    if broken.size:
        return Direction(quantity, "non-finite", paths[broken[0]], extreme=math.nan, **common)
    if way[0] == 0:
        return Direction(quantity, "vanishing", paths[0], extreme=0.0, **common)
    distance = np.abs(np.log(np.maximum(ratios, 1e-300)))
    worst = int(np.argmax(distance))
    if distance[worst] <= math.log(tolerance):
        return Direction(quantity, "preserved", None, extreme=float(ratios[worst]), **common)
    exploding = ratios[worst] > 1
    left = np.flatnonzero(ratios > tolerance if exploding else ratios < 1 / tolerance)
    verdict = "exploding" if exploding else "vanishing"
    if ratios[worst] == 0:  # it is told where it is 0
        left = np.flatnonzero(ratios == 0)
    return Direction(quantity, verdict, paths[left[0]], extreme=float(ratios[worst]), **common)


def _root(end: float, start: float, steps: int) -> float:
    """The growth per step between two variances, NaN for none."""
    return float((np.float64(end) / np.float64(start)) ** (1 / steps)) if steps else math.nan
