"""Why a signal does not survive, and what to do: each cause that is known is one function of a profile.

A cause says what is wrong, by which numbers it is known, and what mends it. The order of `CAUSES` is that in which they
are told: what makes every other number meaningless comes first.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nfjax.spp._kernels import Kernel
from nfjax.spp._mode import Mode

WIDTH = 110  # of a line for a person
IDLE = 0.5  # share of dead units, or of saturated values, in a block that is told of
SAME = 0.99  # cosine between different inputs that have become one
APART = 0.9  # the same where they still were different
LIKE = 1.5  # factor between a measured ratio and one from theory, within which the one explains the other
LEAST = 0.2  # share of the logarithm of what is to be explained, from which kernels are a cause of it
MOST = 0.5  # share of the kernels, or of the blocks, that must be alike to be a cause
GROWTH = 1.1  # of a variance in one block, above which an addition adds to it
SUBNORMAL = {"float16": 6.1e-5, "bfloat16": 1.2e-38, "float32": 1.2e-38}  # smallest number of full precision
STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, half the distance between two numbers


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a network will train badly.

    Attributes:
        what: The cause, in words.
        evidence: The numbers by which it is known.
        remedy: What mends it.
        fatal: Whether the network is unhealthy for this alone, whatever its variances are.
        in_notes: Whether a note of the diagnosis says the same.
    """

    what: str
    evidence: str
    remedy: str
    fatal: bool = False
    in_notes: bool = False

    def __str__(self) -> str:
        parts = [(self.what, ""), (f"because {self.evidence}", "    "), (f"try {self.remedy}", "    ")]
        return "\n".join(
            textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ", break_long_words=False)
            for text, indent in parts
        )


class Seen(Protocol):
    """What causes are found in: a `Profile`, likewise its verdicts."""

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    mode: Mode
    zeros: Mapping[str, tuple[str, ...]]
    kernels: tuple[Kernel, ...]
    level: str
    unreached: tuple[str, ...]
    norms: tuple[str, ...]
    samples: Mapping[str, np.ndarray]

    @property
    def forward_var(self) -> np.ndarray: ...
    @property
    def backward_var(self) -> np.ndarray: ...
    @property
    def branch_share(self) -> np.ndarray: ...
    @property
    def stages(self) -> list[slice]: ...
    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """The verdict of each direction: "preserved", "vanishing", "exploding" or "non-finite"; and the variance at its end
    divided by that at its start.
    """

    forward: str
    backward: str
    forward_total: float
    backward_total: float

    @property
    def both(self) -> tuple[str, str]:
        return self.forward, self.backward


def find(profile: Seen, verdicts: Verdicts) -> tuple[Cause, ...]:
    """All causes that are seen, in the order of `CAUSES`."""
    return tuple(cause for function in CAUSES for cause in function(profile, verdicts))


# ---------------------------------------------------------------- numbers that are none


def _not_finite(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    if verdicts.forward == "non-finite":
        first = profile.paths[int(np.flatnonzero(~np.isfinite(profile.forward_var))[0])]
        before = "it is the first that is measured" if first == profile.paths[0] else "everything before it is finite"
        yield Cause(
            f"the activations of {first!r} are not finite",
            before,
            f"the inputs and the parameters of {first!r} (is one of them NaN or infinite?); in a narrow type, "
            "float32 for that module; rescale.lsuv if its kernels are too large",
            fatal=True,
        )
    elif verdicts.backward == "non-finite":
        reached = np.flatnonzero(~np.isfinite(profile.backward_var) & _reached(profile))
        last = profile.paths[int(reached[-1])]
        yield Cause(
            f"the gradient at the output of {last!r} is not finite, while all activations are",
            "behind that block a derivative overflows, or has no value (the root or the logarithm of 0, a norm of a "
            "vector that is 0)",
            "a small constant under the root or the logarithm there, float32 for that module, or gradients clipped "
            "inside of it",
            fatal=True,
        )


def _underflow(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    number = len(profile)
    for what, variances, way, remedy in (
        ("activations underflow", profile.forward_var, range(number), "larger kernels before it (rescale.lsuv)"),
        ("gradient underflows", profile.backward_var, range(number)[::-1], "a loss scale, if the type is float16"),
    ):
        small = [
            i for i, before in zip(way, (None, *way), strict=False) if _is_subnormal(profile, variances, i, before)
        ]
        if small:
            i = small[0]
            yield Cause(
                f"the {what} in {profile.dtypes[i]}, at {profile.paths[i]!r}",
                f"the standard deviation there is {math.sqrt(variances[i]):.2g}, and the smallest number of full "
                f"precision {SUBNORMAL[profile.dtypes[i]]:.2g}",
                f"{remedy}, or a wider type, and first what makes it vanish",
                fatal=True,
            )
    added = _median(profile, "branch_var")
    lost = [
        i
        for i, (share, dtype) in enumerate(zip(profile.branch_share, profile.dtypes, strict=True))
        if (share > 0 or added[i] > 0) and math.sqrt(share) < STEP.get(dtype, 0.0)
    ]
    if lost:
        i = lost[0]
        yield Cause(
            f"the branches of {len(lost)} blocks are lost in the rounding of {profile.dtypes[i]}, from "
            f"{profile.paths[i]!r}",
            f"their standard deviation is {math.sqrt(profile.branch_share[i]):.2g} of the sum's, and half the distance "
            f"between two numbers {STEP[profile.dtypes[i]]:.2g}",
            "float32 for the sum of shortcut and branch, with the layers in the narrow type as they are; nothing where "
            "a learned factor in front of the branch grows (SkipInit, LayerScale)",
        )


def _is_subnormal(profile: Seen, variances: np.ndarray, i: int, before: int | None) -> bool:
    """Whether a signal is too small for its type there, or has become 0 from what was almost so, one step before."""
    limit = SUBNORMAL.get(profile.dtypes[i], 0.0)
    if variances[i] > 0:
        return math.sqrt(variances[i]) < limit
    fell = before is not None and variances[i] == 0 and variances[before] > 0
    return fell and not profile.zeros and math.sqrt(variances[before]) < 1e3 * limit


# ---------------------------------------------------------------- what is zero, or does nothing


def _zero(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    paths = ("", *profile.paths)
    for variances, direction, places in (
        (profile.forward_var, "activation comes", paths),
        (profile.backward_var, "gradient comes back", profile.paths),
    ):
        still = np.flatnonzero(variances == 0)
        if not still.size:
            continue
        place = still[0] if direction.startswith("act") else still[-1]
        if names := profile.zeros.get(places[place]):
            yield Cause(
                f"no {direction} through {listed(names)}",
                "all of it is 0: it is this that makes the signal 0, and not depth",
                "nothing, where that is meant (a zero-initialized head or last kernel trains from the first step on); "
                "to see past it, measure after a step of training, or with other values there",
                in_notes=True,
            )


def _dead(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    for name, what, remedy in (
        (
            "dead",
            f"units of some {profile.level}s are dead: 0 for every input",
            "biases that begin at 0, a smaller learning rate, an input with mean 0, or an activation that does not end "
            "at 0 (leaky_relu, gelu, silu)",
        ),
        (
            "saturated",
            f"values of some {profile.level}s are saturated: little gradient comes through",
            "smaller kernels before them (rescale.lsuv makes the variance 1), a smaller alpha of dyt or derf, or an "
            "activation without bounds",
        ),
    ):
        shares = np.where(profile.forward_var > 0, _median(profile, name), np.nan)
        bad = np.flatnonzero(shares > IDLE)
        if bad.size:
            worst = bad[int(np.argmax(shares[bad]))]
            yield Cause(
                f"most {what}",
                f"{shares[worst]:.0%} in {profile.paths[worst]!r}, more than {IDLE:.0%} in {bad.size} of "
                f"{len(profile)} {profile.level}s, of a batch of {profile.shapes[worst][0]}",
                remedy,
                fatal=True,
            )


def _same(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    cosine = _median(profile, "similarity")
    # Behind a mean over all positions images of noise are alike by nature.
    ranks = np.array([len(shape) for shape in profile.shapes])
    known = np.flatnonzero(np.isfinite(cosine) & (ranks == ranks[0]))
    if not known.size or cosine[known[0]] > APART:
        return
    same = known[cosine[known] > SAME]
    if same.size > 1 and (cosine[known[known >= same[0]]] > APART).all():
        yield Cause(
            f"different inputs become the same, from {profile.paths[same[0]]!r}",
            f"the cosine between the activations of two examples is {cosine[known[0]]:.2f} at first and "
            f"{cosine[known[-1]]:.4f} at the end",
            "shortcuts, or a larger share of them; kernels without a mean per channel (initializers.brock, or scaled "
            "weight standardization); an input with mean 0",
            fatal=True,
        )


# ---------------------------------------------------------------- what the network is on


def _initial(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    if (told := profile.mode.untrained()) is not None and set(verdicts.both) - {"preserved"}:
        yield Cause("norms that normalize nothing", *told, in_notes=True)


# ---------------------------------------------------------------- kernels, sums and transitions


def _sums(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    """An identity skip that adds the branch's variance at each block."""
    if "exploding" not in verdicts.both or profile.level != "block":
        return
    steps = [i for stage in profile.stages for i in range(stage.start + 1, stage.stop)]
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.array([profile.forward_var[i] / profile.forward_var[i - 1] for i in steps])
        shares = np.array([profile.branch_share[i] for i in steps])
        # Var[x + f] = Var[x] + Var[f] for a branch that is not correlated with its input.
        explained = (growth > GROWTH) & (np.abs(growth * (1 - shares) - 1) < 0.25)
        added = float(np.log(growth[explained]).sum())
    # It must be this that makes the larger part of what explodes.
    exploding = [
        math.log(total)
        for verdict, total in zip(verdicts.both, (verdicts.forward_total, verdicts.backward_total), strict=True)
        if verdict == "exploding" and total > 1
    ]
    if len(steps) and explained.mean() > MOST and exploding and added > MOST * min(exploding):
        typical = float(np.exp(np.log(growth[explained]).mean()))
        yield Cause(
            "an identity shortcut adds the variance of the branch at every block",
            f"Var[x_l] / Var[x_(l-1)] is {typical:.3g} within the stages, and 1 / (1 - the branch's share) in "
            f"{int(explained.sum())} of {len(steps)} blocks",
            'sqrt(1/2) in front of the sum (in our networks residual="idshort"), a branch divided by the square root '
            'of the number of blocks ("depthscale"), or a learned factor from 0 ("skipinit")',
        )


def _fans(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    """Kernels with the variance that the other direction needs, or with that of layers without an activation."""
    # Behind a norm, no scale of a kernel changes anything.
    kernels = [] if profile.norms else [kernel for kernel in profile.kernels if not kernel.zero]
    scheme, number = _scheme(kernels)
    if number <= MOST * len(kernels):
        return
    between = [kernel for kernel in kernels if _is_between(profile, kernel)]
    for name, verdict, needs, mode, direction in (
        ("He fan-in", verdicts.backward, "gradient needs 2 / n_out", "fan_out", "backward"),
        ("He fan-out", verdicts.forward, "activations need 2 / n_in", "fan_in", "forward"),
    ):
        differ = [kernel for kernel in between if len(set(kernel.fans)) > 1 and name in kernel.looks_like]
        # With 2 / n_in the gradient changes by n_out / n_in at each kernel, with 2 / n_out activations by n_in / n_out.
        change = sum(math.log(kernel.fans[1] / kernel.fans[0]) for kernel in differ)
        change = change if direction == "backward" else -change
        total = verdicts.backward_total if direction == "backward" else verdicts.forward_total
        share = change / math.log(total) if 0 < total < math.inf and total != 1 else 0.0
        explained = share > LEAST
        if name == scheme and verdict in ("vanishing", "exploding") and explained:
            yield Cause(
                f"kernels have the variance of {name}, and the {needs}",
                f"{number} of {len(kernels)} kernels match {name}, {len(differ)} between the {profile.level}s with "
                f"n_in != n_out ({differ[0]})",
                f'kernel_init=initializers.standardize(initializers.he_normal("{mode}")), or for the network as it is '
                f'rescale.balance(model, x, direction="{direction}")',
            )
    rectified = np.isfinite(_median(profile, "dead")).any()
    if rectified and scheme == "LeCun" and "vanishing" in verdicts.both:
        yield Cause(
            "kernels without the gain of ReLU",
            f"{number} of {len(kernels)} kernels have the variance 1 / n_in (LeCun's, which Flax draws by default), "
            "and a ReLU halves the second moment at every layer",
            'kernel_init=initializers.he_fan_out() or he_normal("fan_in"), or rescale.lsuv(model, x, init=None) for '
            "the network as it is",
        )


def _is_between(profile: Seen, kernel: Kernel) -> bool:
    """Whether a kernel lies between the first measured output and the last, and not in a stem or a head."""
    first, *others = (re.sub(r"\[\d+\]$", "", path) for path in profile.paths)
    return any(kernel.layer == path or kernel.layer.startswith(f"{path}/") for path in others if path != first)


def _scheme(kernels: Sequence[Kernel]) -> tuple[str, int]:
    """The initialization that explains most kernels, and how many: of one alone, several may."""
    counts = collections.Counter(name for kernel in kernels for name in kernel.looks_like)
    return counts.most_common(1)[0] if counts else ("", 0)


def _strides(profile: Seen, verdicts: Verdicts) -> Iterator[Cause]:
    """Transitions at which the gradient loses the square of the stride."""
    if verdicts.backward != "vanishing" or profile.level != "block":
        return
    seen = []
    for stage in profile.stages[1:]:
        before, after = profile.shapes[stage.start - 1], profile.shapes[stage.start]
        places = math.prod(before[1:-1]) / max(math.prod(after[1:-1]), 1) if len(before) == len(after) > 2 else 1.0
        ratio = float(profile.backward_var[stage.start - 1] / profile.backward_var[stage.start])
        inside = [k for k in profile.kernels if k.layer.startswith(f"{profile.paths[stage.start]}/")]
        if not any(kernel.strides > 1 for kernel in inside):
            continue
        if places > 1 and ratio > 0 and abs(math.log(ratio * places)) < math.log(LIKE * 1.5):
            seen.append((ratio, places))
    if seen:
        shown = ", ".join(f"{ratio:.2g}" for ratio, _ in seen)
        yield Cause(
            "transitions lose the square of the stride",
            f"the gradient's variance falls by the factor{'s' if len(seen) > 1 else ''} {shown} at "
            f"{len(seen)} of {len(profile.stages) - 1} transitions, where the number of positions falls to "
            f"1 / {seen[0][1]:.3g}: behind a stride, an input position feeds fewer outputs than fan-out counts",
            'kernel_init=initializers.he_effective_fan_out(stride=2), in our networks init="he_effective_fan_out", or '
            'rescale.balance(model, x, direction="backward")',
        )


CAUSES: tuple[Callable[[Any, Verdicts], Iterator[Cause]], ...] = (
    _not_finite, _underflow, _initial, _zero, _dead, _same, _sums, _fans, _strides,
)  # fmt: skip


def listed(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _median(profile: Seen, name: str) -> np.ndarray:
    return getattr(profile, name) if name in profile.samples else np.full(len(profile), np.nan)


def _reached(profile: Seen) -> np.ndarray:
    return np.array([path not in profile.unreached for path in profile.paths])
