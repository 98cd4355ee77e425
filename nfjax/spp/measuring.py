"""The compiled pass of one network: both directions at once."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfjax.spp import losses, tracing
from nfjax.spp.evaluation import BLOCK, BRANCH, FIELDS, Statistics, Taken, check_supported, evaluate, executions_of
from nfjax.spp.losses import Loss
from nfjax.spp.selection import Where, select, select_branches
from nfjax.spp.tracing import Call, Runnable


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The compiled pass of one network: it serves any parameters, inputs and keys of the same shapes."""

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    program: Any
    _blocks: tuple[int, ...]
    _branches: tuple[int, ...]

    def start(self, arrays: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sets the pass going on `Runnable.arrays`; key: of what is drawn at random for the gradient."""
        with jax.disable_jit(False):  # see `prepare`
            return self.program(jax.tree.leaves(arrays), key)

    def read(self, started: tuple[jax.Array, jax.Array]) -> dict[str, np.ndarray]:
        """Waits for a pass; each statistic of a profile as float64 [blocks]."""
        forward, backward = started
        forward, backward = np.asarray(forward), Statistics.of(np.asarray(backward))
        if not backward.reached.all():
            missed = int(np.flatnonzero(~backward.reached)[-1])
            raise ValueError(
                f"no gradient reaches the output of {self.paths[missed]!r}: something behind it is not differentiable "
                "(stop_gradient, rounding, an integer, a gradient inside the model), or what is differentiated does "
                "not depend on it. Select other blocks with where=, or another target with loss="
            )
        block, branch = (Statistics.of(forward[list(rows)]) for rows in (self._blocks, self._branches))
        has_branch = np.array([row >= 0 for row in self._branches])
        return {
            "forward_var": block.var,
            "backward_var": backward.var,
            "channel_sq_mean": block.channel_sq_mean,
            "channel_var": block.channel_var,
            "branch_var": np.where(has_branch, branch.channel_var, np.nan),
        }


@jax.disable_jit(False)  # JAX's debugging switch is none for what is traced: there is no pass but the compiled one
def prepare(model: Runnable, where: Where | None, branch: Where, loss: str | Loss | None) -> Measurement:
    """Traces the model, selects its blocks and compiles the pass."""
    traced = tracing.trace(model)
    jaxpr, calls = traced.jaxpr, traced.calls
    if not jaxpr.out_avals:
        raise ValueError(f"{model.name} returns no array: is there a return statement missing?")
    reached = executions_of(jaxpr.jaxpr)
    blocks = select(calls, reached, where)
    branches = select_branches(calls, reached, blocks, branch)
    _check_branches(calls, blocks, branches, branch)
    check_supported(jaxpr.jaxpr, calls, [*blocks, *branches])
    roles = dict.fromkeys(branches, BRANCH) | dict.fromkeys(blocks, BLOCK)
    number = sum(reached[block] for block in blocks)
    leaves = jax.tree.leaves(model.arrays)
    order = Taken()

    def measure(leaves: Sequence[jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def run(sinks: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            nonlocal order
            out, taken = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, list(sinks), roles)
            order = taken.order()
            if loss is None:
                return taken.last, jnp.stack(taken.forward)
            value = losses.apply(loss, jax.tree.unflatten(traced.out_tree, out), key)
            return value, jnp.stack(taken.forward)

        sinks = [jnp.zeros(FIELDS, jnp.float32)] * number
        value, pull, forward = jax.vjp(run, sinks, has_aux=True)
        # Drawn in float32 also where JAX's default is float64, which has other numbers.
        start = jnp.ones(value.shape, jnp.float32) if loss else jax.random.normal(key, value.shape, jnp.float32)
        return forward, jnp.stack(pull(start.astype(value.dtype))[0])

    try:
        # Unused arguments stay, so that equal programs have equal arguments.
        lowered = jax.jit(measure, keep_unused=True).lower(leaves, jax.random.key(0))
    except ValueError as error:
        if "everse-mode differentiation" in str(error):  # JAX's message for a while loop, a callback and the like
            raise ValueError(f"{model.name} cannot be differentiated: {error}") from error
        raise
    places = [i for i, call in enumerate(order.calls) if roles[call] == BLOCK]
    return Measurement(
        paths=_paths([calls[order.calls[place]].path for place in places]),
        shapes=tuple(order.shapes[place] for place in places),
        dtypes=tuple(str(calls[order.calls[place]].dtype) for place in places),
        program=_compile(lowered, leaves),
        _blocks=tuple(places),
        _branches=_branch_places(calls, order.calls, roles),
    )


def _check_branches(calls: Sequence[Call], blocks: Sequence[int], branches: Sequence[int], branch: Where) -> None:
    """ValueError where a name or class was chosen that is nowhere; the default is what a model may have or not, and a
    predicate may mean none.
    """
    if branches or branch == "branch" or not isinstance(branch, str | type | tuple | list):
        return
    inside, names = set(blocks), {}
    for i, call in enumerate(calls):  # a call comes after its parent
        if call.parent in inside:
            inside.add(i)
            names[f"{call.path.rpartition('/')[2]} ({tracing.class_name(call.module)})"] = None
    raise ValueError(
        f"branch={getattr(branch, '__name__', repr(branch))} selects no module inside a block; a block calls "
        f"{', '.join(names) or 'no modules'}"
    )


def _branch_places(calls: Sequence[Call], order: Sequence[int], roles: Mapping[int, str]) -> tuple[int, ...]:
    """For each block that runs, where in `order` its branch stands, the last one if it has several; -1 for none."""
    found, pending = [], {}
    for place, call in enumerate(order):
        if roles[call] == BLOCK:
            found.append(pending.pop(call, -1))
            continue
        block = calls[call].parent
        while roles.get(block) != BLOCK:  # branches are selected inside blocks only
            block = calls[block].parent
        pending[block] = place
    return tuple(found)


def _paths(names: Sequence[str]) -> tuple[str, ...]:
    """The paths of blocks in execution order; those of a module that runs several times are numbered: "block[0]"."""
    total, seen, paths = collections.Counter(names), collections.Counter(), []
    for name in names:
        paths.append(f"{name}[{seen[name]}]" if total[name] > 1 else name)
        seen[name] += 1
    return tuple(paths)


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
