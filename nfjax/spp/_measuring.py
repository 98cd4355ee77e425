"""The compiled pass of one network: both directions at once."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from nfjax._flax import bind
from nfjax.spp import _losses, _outputs, _tracing, _variables
from nfjax.spp._diagnosis import IDENTITY
from nfjax.spp._evaluation import BLOCK, FIELDS, UNKNOWN, Statistics, check_supported, evaluate
from nfjax.spp._flow import calls_of, executions_of, order
from nfjax.spp._losses import Loss
from nfjax.spp._mode import Mode
from nfjax.spp._outputs import Output
from nfjax.spp._selection import Where, select, select_branches
from nfjax.spp._tracing import Call, Runnable, Tag
from nfjax.spp._variables import Slot

Started = tuple[Any, Any]  # the arrays of a pass, and what it computes from them


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The compiled pass of one network: it serves any parameters, inputs and keys of the same shapes. outputs: what of
    each block is measured, its path and that of the array in what it returns.
    """

    paths: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    program: Any
    _mode: Mode
    _slots: tuple[Slot, ...]
    _factors: Mapping[int, set[Tag | None]]
    _tags: tuple[Tag, ...]  # of each block
    _blocks: tuple[int, ...]
    _branches: tuple[int, ...]

    def start(self, arrays: Any, key: jax.Array) -> Started:
        """Sets the pass going on `Runnable.arrays`; key: of what is drawn at random for the gradient."""
        leaves = jax.tree.leaves(arrays)
        with jax.disable_jit(False):  # a compiled program cannot be run without, and nobody's function is in it
            return leaves, self.program(leaves, key)

    def read(self, started: Started) -> Run:
        """Waits for a pass."""
        leaves, (forward, changes, backward) = started
        forward, backward = np.asarray(forward), Statistics.of(np.asarray(backward))
        if not backward.reached.all():
            missed = int(np.flatnonzero(~backward.reached)[-1])
            raise ValueError(
                f"no gradient reaches the output of {self.outputs[missed]!r}: a derivative rule behind it (of jax.grad "
                "inside the model, custom_vjp or custom_jvp) stops it. Select other blocks with where=, another array "
                "of theirs with output=, or another target with loss="
            )
        block, branch = (Statistics.of(forward[list(rows)]) for rows in (self._blocks, self._branches))
        has_branch = np.array([row >= 0 for row in self._branches])
        change = np.asarray(changes, np.float64)
        change = np.where(change == UNKNOWN, np.nan, change)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            share = np.where(has_branch, branch.var / block.var, change)
        # What is called a branch may be scaled where it is added: an output that equals the input decides.
        share = np.where(change < IDENTITY, np.fmin(share, change), share)
        statistics = {
            "forward_var": block.var,
            "backward_var": backward.var,
            "channel_sq_mean": block.channel_sq_mean,
            "channel_var": block.channel_var,
            "branch_var": np.where(has_branch, branch.channel_var, np.nan),
            "branch_share": share,
        }
        mode = dataclasses.replace(self._mode, initial=_variables.initial(self._mode, self._slots, leaves))
        stopped = (backward.var == 0).any() or (block.var == 0).any() or (share < IDENTITY).any()
        return Run(statistics, mode, self._zeros(leaves) if stopped else {})

    def _zeros(self, leaves: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        zeros = _variables.zeros(self._factors, self._slots, leaves)
        after = {path: zeros[tag] for path, tag in zip(self.paths, self._tags, strict=True) if tag in zeros}
        return ({_variables.INPUT: zeros[None]} if None in zeros else {}) | after


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass. statistics: each of a profile's as float64 [blocks]. zeros: `Profile.zeros`."""

    statistics: Mapping[str, np.ndarray]
    mode: Mode
    zeros: Mapping[str, tuple[str, ...]]


def prepare(
    model: Runnable,
    where: Where | None,
    branch: Where,
    loss: str | Loss | None,
    output: Output | None = None,
    with_mutable: Callable[[Any], Runnable] | None = None,
) -> Measurement:
    """Traces the model, selects its blocks and compiles the pass. with_mutable: the same Linen model, with other
    collections that it can write.
    """
    with jax.disable_jit(False):  # what is only traced shows nobody more without jit
        return _prepare(model, where, branch, loss, output, with_mutable)


def _prepare(
    model: Runnable,
    where: Where | None,
    branch: Where,
    loss: str | Loss | None,
    output: Output | None,
    with_mutable: Callable[[Any], Runnable] | None,
) -> Measurement:
    traced = _tracing.trace(model)
    jaxpr, calls = traced.jaxpr, traced.calls
    if not jaxpr.out_avals:
        raise ValueError(f"{model.name} returns no array: is there a return statement missing?")
    reached = calls_of(executions_of(jaxpr.jaxpr))
    blocks = select(jaxpr.jaxpr, calls, reached, where)
    roles = _outputs.choose(traced, blocks, select_branches(calls, reached, blocks, branch), output, loss)
    check_supported(jaxpr.jaxpr, calls, roles)
    ran = order(jaxpr.jaxpr, roles)
    places = [i for i, (tag, _) in enumerate(ran) if roles[tag] == BLOCK]
    leaves = jax.tree.leaves(model.arrays)
    slots = tuple(_variables.slots(model.arrays))

    def measure(leaves: Sequence[jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def run(sinks: list[jax.Array]) -> tuple[jax.Array, Any]:
            out, taken = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, iter(sinks), roles)
            found = jnp.stack(taken.forward), jnp.stack(taken.changes)
            if loss is None:
                return taken.last, found
            return _losses.apply(loss, jax.tree.unflatten(traced.out_tree, out), key), found

        sinks = [jnp.zeros(FIELDS, jnp.float32)] * len(places)
        value, pull, (forward, changes) = jax.vjp(run, sinks, has_aux=True)
        # Drawn in float32 also where JAX's default is float64, which has other numbers.
        start = jnp.ones(value.shape, jnp.float32) if loss else jax.random.normal(key, value.shape, jnp.float32)
        return forward, changes, jnp.stack(pull(start.astype(value.dtype))[0])

    try:
        # Unused arguments stay, so that equal programs have equal arguments.
        lowered = jax.jit(bind(measure, traced.axes), keep_unused=True).lower(leaves, jax.random.key(0))
    except ValueError as error:
        if "everse-mode differentiation" in str(error):  # JAX's message for a while loop, a callback and the like
            raise ValueError(f"{model.name} cannot be differentiated: {error}") from error
        raise
    tags = tuple(ran[place][0] for place in places)
    paths = _outputs.numbered([calls[tag.call].path for tag in tags])
    mode = _variables.mode(traced, slots, model.arrays)
    if with_mutable is not None and (mode.batch or mode.running):
        mode = dataclasses.replace(mode, mutable_decides=_mutable_decides(mode, with_mutable))
    return Measurement(
        paths=paths,
        outputs=tuple(path + _outputs.leaf_path(calls, tag) for path, tag in zip(paths, tags, strict=True)),
        shapes=tuple(ran[place][1] for place in places),
        dtypes=tuple(str(_outputs.dtype(calls, tag)) for tag in tags),
        program=_compile(lowered, leaves),
        _mode=mode,
        _slots=slots,
        _factors=_variables.factors(traced, slots, tags),
        _tags=tags,
        _blocks=tuple(places),
        _branches=_branch_places(calls, [tag for tag, _ in ran], roles),
    )


def _mutable_decides(mode: Mode, with_mutable: Callable[[Any], Runnable]) -> bool:
    """Whether the norms of a Linen model take other statistics where more, or fewer, collections are mutable."""
    mutable = False if mode.mutable != "none" else linen.DenyList("params")
    try:
        model = with_mutable(mutable)
        other = _variables.mode(_tracing.trace(model), _variables.slots(model.arrays), model.arrays)
    except Exception:  # in its mode, it must write; or with these it does what it cannot: then a flag decides
        return False
    return other.running != mode.running


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


_programs: collections.OrderedDict[str, Any] = collections.OrderedDict()
_programs_lock = threading.Lock()
_KEPT_PROGRAMS = 16


def _compile(lowered: Any, leaves: Sequence[Any]) -> Any:
    """The same program on the same devices is compiled once in a process, whichever model it comes from: another
    initialization of the same network is the same program.
    """
    text = lowered.as_text()
    if "callback" in text:  # which Python function it calls does not stand in the text
        return lowered.compile()
    placed = [str(getattr(leaf, "sharding", None)) for leaf in leaves]
    name = hashlib.sha256("\n".join([text, *placed]).encode()).hexdigest()
    with _programs_lock:
        if name not in _programs:
            _programs[name] = lowered.compile()
            if len(_programs) > _KEPT_PROGRAMS:
                _programs.popitem(last=False)
        _programs.move_to_end(name)
        return _programs[name]
