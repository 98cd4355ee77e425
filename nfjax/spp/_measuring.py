"""The compiled pass of one network: both directions at once.

A model with its inputs (`Runnable`) is traced, every module call tagged (`_tracing`); the calls that are blocks and
branches are selected (`_selection`), and of what they return one array each (`_outputs`). The tagged program is
evaluated again with these arrays tapped (`_evaluation`), lowered and compiled. A `Measurement` runs it, any number of
times, and turns what comes out into statistics (`_statistics`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from nfjax import compilation
from nfjax._flax import Runnable, bind
from nfjax.spp import _activations, _kernels, _losses, _outputs, _statistics, _tracing, _variables
from nfjax.spp._activations import Activation
from nfjax.spp._evaluation import BLOCK, check_supported, evaluate
from nfjax.spp._flow import calls_of, executions_of, follow, order, value
from nfjax.spp._kernels import Kernel, Layout
from nfjax.spp._losses import Loss
from nfjax.spp._mode import Mode
from nfjax.spp._outputs import Output
from nfjax.spp._profile import Profile
from nfjax.spp._selection import BLOCKS, LAYERS, Where, is_norm, layers, select, select_branches
from nfjax.spp._statistics import IDENTITY, NOTHING, Moments
from nfjax.spp._tracing import Call, Tag
from nfjax.spp._variables import Slot

Started = tuple[Any, Any]  # the arrays of a pass, and what it computes from them


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is to be measured, and where the gradient starts; the arguments of `propagate`."""

    where: Where | None = None
    branch: Where = "branch"
    output: Output | None = None
    loss: str | Loss | None = None
    level: str = BLOCKS


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass.

    Attributes:
        statistics: Each of `STATISTICS`, float64 [blocks].
        mode: In which the network ran.
        zeros: `Profile.zeros`.
        unreached: Paths of what no gradient reached.
        kernels: `Profile.kernels`.
    """

    statistics: Mapping[str, np.ndarray]
    mode: Mode
    zeros: Mapping[str, tuple[str, ...]]
    unreached: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The compiled pass of one network: it serves any parameters, inputs and keys of the same shapes.

    Attributes:
        paths: Of the blocks.
        outputs: What of each block is measured, its path and that of the array in what it returns.
        shapes: Of these arrays.
        dtypes: Likewise.
        program: What was compiled.
        level: BLOCKS or LAYERS.
        norms: `Profile.norms`.
    """

    paths: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    program: Any
    level: str
    norms: tuple[str, ...]
    _mode: Mode
    _slots: tuple[Slot, ...]
    _factors: Mapping[int, set[Tag | None]]
    _tags: tuple[Tag, ...]  # of each block
    _blocks: tuple[int, ...]
    _branches: tuple[int, ...]
    _activations: list[Activation]
    _layouts: Mapping[str, Layout]

    def start(self, arrays: Any, key: jax.Array) -> Started:
        """Sets the pass going.

        Args:
            arrays: Of a `Runnable`.
            key: Of what is drawn at random for the gradient.
        """
        leaves = jax.tree.leaves(arrays)
        with jax.disable_jit(False):  # a compiled program cannot be run without, and nobody's function is in it
            return leaves, self.program(leaves, key)

    def read(self, started: Started, kernels: bool = False) -> Run:
        """Waits for a pass.

        Args:
            started: By `start`.
            kernels: Whether the kernels themselves are looked at, too.

        Raises:
            ValueError: No gradient came to a block.
        """
        leaves, (forward, changes, similarities, shares, backward) = started
        idle = _activations.by_block(self._activations, np.asarray(shares, np.float64), len(self.paths))
        seen = _statistics.observed(forward, changes, similarities, idle, backward, self._blocks, self._branches)
        unreached = tuple(path for path, one in zip(self.paths, seen.gradient.reached, strict=True) if not one)
        if unreached and (self.level == BLOCKS or len(unreached) == len(self.paths)):
            missed = int(np.flatnonzero(seen.gradient.reached == 0)[-1])
            raise ValueError(
                f"no gradient reaches the output of {self.outputs[missed]!r}: a derivative rule behind it (of jax.grad "
                "inside the model, custom_vjp or custom_jvp) stops it. Select other blocks with where=, another array "
                "of theirs with output=, or another target with loss="
            )
        statistics = _statistics.compute(seen)
        if self.level == LAYERS:  # a layer adds nothing to its input
            statistics["branch_share"] = np.full(len(self.paths), np.nan)
        if unreached:
            statistics["backward_var"] = np.where(seen.gradient.reached > 0, statistics["backward_var"], np.nan)
        mode = dataclasses.replace(self._mode, initial=_variables.initial(self._mode, self._slots, leaves))
        stopped = (seen.gradient.var == 0) | (seen.output.var == 0) | (statistics["branch_share"] < IDENTITY)
        zeros = self._zeros(leaves) if stopped.any() else {}
        looked_at = _kernels.read(self._layouts, self._slots, leaves) if kernels else ()
        return Run(statistics, mode, zeros, unreached, tuple(looked_at))

    def _zeros(self, leaves: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        zeros = _variables.zeros(self._factors, self._slots, leaves)
        after = {path: zeros[tag] for path, tag in zip(self.paths, self._tags, strict=True) if tag in zeros}
        return ({_variables.INPUT: zeros[None]} if None in zeros else {}) | after

    def profile(self, seeds: Sequence[int], runs: Sequence[Run]) -> Profile:
        """What `read` gave for each seed, as a profile."""
        zeros: dict[str, tuple[str, ...]] = {}
        for run in runs:
            zeros |= {path: tuple(dict.fromkeys((*zeros.get(path, ()), *names))) for path, names in run.zeros.items()}
        return Profile(
            paths=self.paths,
            shapes=self.shapes,
            dtypes=self.dtypes,
            seeds=tuple(seeds),
            samples={name: np.stack([run.statistics[name] for run in runs]) for name in runs[0].statistics},
            outputs=self.outputs,
            mode=functools.reduce(Mode.merged, [run.mode for run in runs]),
            zeros=zeros,
            level=self.level,
            kernels=runs[0].kernels,
            unreached=runs[0].unreached,
            norms=self.norms,
        )


def prepare(model: Runnable, choice: Choice) -> Measurement:
    """Traces the model, selects its blocks and compiles the pass.

    Raises:
        ValueError: No block is selected or it is not clear which; one cannot be measured; or no gradient reaches one.
    """
    with jax.disable_jit(False):  # what is only traced shows nobody more without jit
        return _prepare(model, choice)


def choose(model: Runnable, choice: Choice) -> tuple[_tracing.Trace, list[int], list[int]]:
    """(trace, blocks, branches) of a model: it is traced, and its blocks and branches selected.

    Raises:
        ValueError: No block is selected, or it is not clear which.
    """
    traced = _tracing.trace(model)
    jaxpr, calls = traced.jaxpr, traced.calls
    if not jaxpr.out_avals:
        raise ValueError(f"{model.name} returns no array: is there a return statement missing?")
    reached = calls_of(executions_of(jaxpr.jaxpr))
    if choice.level == LAYERS and choice.where is None:
        if not (blocks := _layers(model, traced, reached)):
            raise ValueError(f"{model.name} calls no module that holds parameters: choose modules with where=")
    else:
        blocks = select(jaxpr.jaxpr, calls, reached, choice.where)
    return traced, blocks, select_branches(calls, reached, blocks, choice.branch)


def _layers(model: Runnable, traced: _tracing.Trace, reached: Mapping[int, int]) -> list[int]:
    """The calls of layers, of those whose output depends on what the model is given."""
    slots = _variables.slots(model.arrays)
    seeds = [int(slot.kind == _variables.OTHER) for slot in slots]
    at = follow(traced.jaxpr.jaxpr, seeds, value).at
    signal = {tag.call for tag, marks in at.items() if marks and not tag.entry}
    owners = {slot.owner for slot in slots if slot.kind == _variables.PARAMETER}
    return layers(traced.calls, reached, signal, owners)


def _prepare(model: Runnable, choice: Choice) -> Measurement:
    traced, blocks, branches = choose(model, choice)
    jaxpr, calls, loss = traced.jaxpr, traced.calls, choice.loss
    roles = _outputs.choose(traced, blocks, branches, choice.output, loss, choice.level == BLOCKS)
    check_supported(jaxpr.jaxpr, calls, roles)
    ran = order(jaxpr.jaxpr, roles)
    places = [i for i, (tag, _) in enumerate(ran) if roles[tag] == BLOCK]
    leaves = jax.tree.leaves(model.arrays)
    slots = tuple(_variables.slots(model.arrays))
    activations = _activations.order(jaxpr.jaxpr, roles, {tag for tag, role in roles.items() if role == BLOCK})

    def measure(leaves: Sequence[jax.Array], key: jax.Array) -> tuple[Moments, jax.Array, jax.Array, Any, Moments]:
        def run(sinks: list[Moments]) -> tuple[jax.Array, Any]:
            out, taken = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, sinks, roles)
            found = _stacked(taken.forward), jnp.stack(taken.changes), jnp.stack(taken.similarities), taken.shares
            if loss is None:
                return taken.last, found
            return _losses.apply(loss, jax.tree.unflatten(traced.out_tree, out), key), found

        end, pull, found = jax.vjp(run, [NOTHING] * len(places), has_aux=True)
        # Drawn in float32 also where JAX's default is float64, which has other numbers.
        start = jnp.ones(end.shape, jnp.float32) if loss else jax.random.normal(key, end.shape, jnp.float32)
        return *found, _stacked(pull(start.astype(end.dtype))[0])

    try:
        # Unused arguments stay, so that equal programs have equal arguments.
        lowered = jax.jit(bind(measure, traced.axes), keep_unused=True).lower(leaves, jax.random.key(0))
    except ValueError as error:
        if "everse-mode differentiation" in str(error):  # JAX's message for a while loop, a callback and the like
            raise ValueError(f"{model.name} cannot be differentiated: {error}") from error
        raise
    tags, runs = tuple(ran[place][0] for place in places), calls_of(executions_of(jaxpr.jaxpr))
    paths = _outputs.numbered([calls[tag.call].path for tag in tags])
    return Measurement(
        paths=paths,
        outputs=tuple(path + _outputs.leaf_path(calls, tag) for path, tag in zip(paths, tags, strict=True)),
        shapes=tuple(ran[place][1] for place in places),
        dtypes=tuple(str(_outputs.dtype(calls, tag)) for tag in tags),
        program=compilation.compile_once(lowered, placed=[str(getattr(leaf, "sharding", None)) for leaf in leaves]),
        level=choice.level,
        _mode=_mode(model, traced, slots),
        _slots=slots,
        _factors=_variables.factors(traced, slots, tags),
        _tags=tags,
        _blocks=tuple(places),
        _branches=_branch_places(calls, [tag for tag, _ in ran], roles),
        _activations=activations,
        norms=tuple(dict.fromkeys(calls[i].path for i in runs if is_norm(calls[i].module))),
        _layouts=_kernels.layouts(calls, runs, _layers(model, traced, runs)),
    )


def _stacked(found: Sequence[Moments]) -> Moments:
    return jax.tree.map(lambda *fields: jnp.stack(fields), *found)


def _mode(model: Runnable, traced: _tracing.Trace, slots: Sequence[Slot]) -> Mode:
    """In which mode the model runs, and whether that is decided by what a Linen model may write: by a trace of the same
    model that may write more, or less.
    """
    mode = _variables.mode(traced, slots, model.arrays)
    if model.writing is None or not (mode.batch or mode.running):
        return mode
    try:
        other = model.writing(False if mode.mutable != "none" else linen.DenyList("params"))
        found = _variables.mode(_tracing.trace(other), _variables.slots(other.arrays), other.arrays)
    except Exception:  # in its mode, it must write; or with these it does what it cannot: then a flag decides
        return mode
    return dataclasses.replace(mode, mutable_decides=found.running != mode.running)


def _branch_places(calls: Sequence[Call], ran: Sequence[Tag], roles: Mapping[Tag, str]) -> tuple[int, ...]:
    """For each block that runs, where in `ran` its branch stands, the last one if it has several; -1 for none."""
    blocks = {tag.call for tag, role in roles.items() if role == BLOCK}
    found, pending = [], {}
    for place, tag in enumerate(ran):
        if roles[tag] == BLOCK:
            found.append(pending.pop(tag.call, -1))
            continue
        block = calls[tag.call].parent
        while block not in blocks:  # branches are selected inside blocks only
            block = calls[block].parent
        pending[block] = place
    return tuple(found)
