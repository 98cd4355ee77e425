"""Both directions in one pass: the forward statistics of every block, and those of the gradient that flows back through
it, none of which is kept longer than it takes to reduce it.

The tagged jaxpr is evaluated again under JAX's differentiation. Each selected tag becomes an identity with a second,
unused argument, its sink; the rule for the gradient gives back as the sink's "gradient" the statistics of the one that
passes through.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp import tracing
from nfjax.spp.selection import Where, select, select_branches
from nfjax.spp.tracing import Call, Runnable, tag

Loss = Callable[[Any], jax.Array]

_FIELDS = 5  # reached, scale; of the channels' means: mean square and variance; mean of the channels' variances
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_REMATERIALIZED = ("checkpoint", "remat", "remat2")
_BLOCK, _BRANCH = "block", "branch"


# ---------------------------------------------------------------- statistics


def statistics(x: jax.Array) -> jax.Array:
    """Population statistics of a tensor [..., C] in float32, as a vector for `Statistics`.

    Of x / scale, the scale being the largest magnitude: squares then neither overflow nor vanish where x does not.
    """
    axes = tuple(range(x.ndim - 1))
    largest = jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    # Behind each barrier x is read anew: XLA would otherwise store x / scale, which takes three times as long.
    x, scale = jax.lax.optimization_barrier((x, scale))
    means = (x.astype(jnp.float32) / scale).mean(axis=axes, keepdims=True)
    x, scale, means = jax.lax.optimization_barrier((x, scale, means))
    variances = jnp.square(x.astype(jnp.float32) / scale - means).mean(axis=axes)
    return jnp.stack([jnp.float32(1), scale, jnp.square(means).mean(), jnp.var(means), variances.mean()])


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of several tensors, one entry each, in float64: channel_sq_mean, the squared mean of each channel, averaged;
    channel_var, the variance within each channel, averaged; var, the variance of the whole tensor.
    """

    channel_sq_mean: np.ndarray
    channel_var: np.ndarray
    var: np.ndarray
    reached: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Statistics:
        """From [n, _FIELDS]."""
        reached, scale, sq_mean, between, within = np.asarray(vectors, np.float64).T
        return cls(sq_mean * scale**2, within * scale**2, (within + between) * scale**2, reached > 0)


# ---------------------------------------------------------------- taps


@jax.custom_vjp
def _tap(x: jax.Array, sink: jax.Array) -> jax.Array:
    """x; the gradient for the sink is `statistics` of the gradient for x."""
    del sink
    return x


def _tap_forward(x: jax.Array, sink: jax.Array) -> tuple[jax.Array, None]:
    del sink
    return x, None


def _tap_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, statistics(gradient)


_tap.defvjp(_tap_forward, _tap_backward)


@dataclasses.dataclass
class _Taken:
    """What an evaluation found, in execution order: the calls, their outputs' shapes and forward statistics; and the
    value at the last block.
    """

    calls: list[int] = dataclasses.field(default_factory=list)
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    forward: list[jax.Array] = dataclasses.field(default_factory=list)
    last: jax.Array | None = None

    def extend(self, other: _Taken) -> None:
        self.calls += other.calls
        self.shapes += other.shapes
        self.forward += other.forward
        self.last = self.last if other.last is None else other.last


def _evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], sinks: list[jax.Array], roles: Mapping[int, str]
) -> tuple[list[Any], _Taken]:
    """Evaluates a tagged jaxpr, the calls in `roles` tapped. sinks: one for each block in execution order; used up."""
    values: dict[Any, Any] = {}
    taken = _Taken()

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def inside(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        out, inner = _evaluate(jaxpr, consts, args, sinks, roles)
        taken.extend(inner)
        return out

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        name, given = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if (call := tag(eqn)) is not None:
            (value,) = given
            if call in roles:
                taken.calls.append(call)
                taken.shapes.append(value.shape)
                taken.forward.append(statistics(jax.lax.stop_gradient(value)))
                if roles[call] == _BLOCK:
                    value = taken.last = _tap(value, sinks.pop(0))
            out = [value]
        elif not any(count for call, count in executions(eqn).items() if call in roles):
            out = _bind(eqn, given)
        elif name in _INLINED:
            inner = eqn.params[_INLINED[name]]
            out = inside(inner.jaxpr, inner.consts, given)
        elif name == "scan":
            out = _scan(eqn, given, inside)
        elif name in _REMATERIALIZED:
            out = _remat(eqn.params, given, sinks, roles, taken)
        else:
            raise AssertionError(f"check_supported let {name} pass")
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars], taken


def _bind(eqn: Any, given: Sequence[Any]) -> Sequence[Any]:
    params, functions = eqn.primitive.get_bind_params(eqn.params), ()
    if isinstance(params, tuple):  # before JAX 0.10.2 a pair, with the functions of a custom derivative in front
        functions, params = params
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *given, **params)
    return out if eqn.primitive.multiple_results else [out]


def _scan(eqn: Any, given: Sequence[Any], inside: Callable[..., list[Any]]) -> list[Any]:
    """A loop over blocks, unrolled, so that each round is measured on its own."""
    params, body = eqn.params, eqn.params["jaxpr"]
    # Carried values have the same rank inside and outside, stacked ones lose an axis; JAX's own names for their numbers
    # differ between its versions.
    outer, inner = [[v.aval.ndim for v in vs] for vs in (eqn.outvars, body.jaxpr.outvars)]
    num_carry = sum(a == b for a, b in zip(outer, inner, strict=True))
    outer, inner = [[jnp.ndim(x) for x in given], [v.aval.ndim for v in body.jaxpr.invars]]
    num_unstacked = sum(a == b for a, b in zip(outer, inner, strict=True))
    num_consts = num_unstacked - num_carry
    consts, carry, stacked = given[:num_consts], given[num_consts:num_unstacked], given[num_unstacked:]
    rounds = range(params["length"])
    outputs = []
    for i in reversed(rounds) if params["reverse"] else rounds:
        out = inside(body.jaxpr, body.consts, [*consts, *carry, *(x[i] for x in stacked)])
        carry = out[:num_carry]
        outputs.append(out[num_carry:])
    if params["reverse"]:
        outputs.reverse()
    return [*carry, *(jnp.stack(column) for column in zip(*outputs, strict=True))]


def _remat(
    params: Mapping[str, Any], given: Sequence[Any], sinks: list[jax.Array], roles: Mapping[int, str], taken: _Taken
) -> list[Any]:
    """A rematerialized part stays one: what it takes comes out beside its outputs."""
    jaxpr = params["jaxpr"]
    counts = executions_of(jaxpr)
    needed = sum(count for call, count in counts.items() if roles.get(call) == _BLOCK)
    own, sinks[:needed] = sinks[:needed], []
    inner = _Taken()

    @functools.partial(jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"])
    def evaluate(given: Sequence[Any], sinks: Sequence[jax.Array]) -> Any:
        nonlocal inner
        out, inner = _evaluate(jaxpr, (), given, list(sinks), roles)
        return out, inner.forward, inner.last

    out, forward, last = evaluate(given, own)
    taken.extend(dataclasses.replace(inner, forward=forward, last=last))
    return out


# ---------------------------------------------------------------- what a jaxpr will execute


def executions(eqn: Any) -> collections.Counter[int]:
    """How often an equation runs each tagged call."""
    if (call := tag(eqn)) is not None:
        return collections.Counter([call])
    rounds = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    total: collections.Counter[int] = collections.Counter()
    for inner in jaxprs_in_params(eqn.params):
        for call, count in executions_of(inner).items():
            total[call] += rounds * count
    return total


def executions_of(jaxpr: Any) -> collections.Counter[int]:
    """How often a jaxpr runs each tagged call."""
    return sum(map(executions, jaxpr.eqns), collections.Counter())


def check_supported(jaxpr: Any, calls: Sequence[Call], chosen: Sequence[int]) -> None:
    """ValueError for a chosen call at a place where it cannot be measured."""
    for eqn in jaxpr.eqns:
        within = [call for call in executions(eqn) if call in chosen]
        if tag(eqn) is not None or not within:
            continue
        name = eqn.primitive.name
        if name not in (*_INLINED, "scan", *_REMATERIALIZED):
            raise ValueError(
                f"{calls[within[0]].what} runs inside JAX's {name!r}, from where its statistics cannot be brought out "
                "(a conditional, a while loop, or a derivative rule of its own); choose blocks outside it with where="
            )
        for inner in jaxprs_in_params(eqn.params):
            check_supported(inner, calls, chosen)


# ---------------------------------------------------------------- the pass


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


def prepare(model: Runnable, where: Where | None, branch: Where, loss: str | Loss | None) -> Measurement:
    """Traces the model, selects its blocks and compiles the pass."""
    traced = tracing.trace(model)
    jaxpr, calls = traced.jaxpr, traced.calls
    if not jaxpr.out_avals:
        raise ValueError(f"{model.name} returns no array: is there a return statement missing?")
    reached = executions_of(jaxpr.jaxpr)
    blocks = select(calls, reached, where)
    branches = select_branches(calls, reached, blocks, branch)
    check_supported(jaxpr.jaxpr, calls, [*blocks, *branches])
    roles = dict.fromkeys(branches, _BRANCH) | dict.fromkeys(blocks, _BLOCK)
    number = sum(reached[block] for block in blocks)
    leaves = jax.tree.leaves(model.arrays)
    taken_calls: list[int] = []
    taken_shapes: list[tuple[int, ...]] = []

    def measure(leaves: Sequence[jax.Array], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def run(sinks: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            out, taken = _evaluate(jaxpr.jaxpr, consts, leaves, list(sinks), roles)
            taken_calls[:], taken_shapes[:] = taken.calls, taken.shapes
            if loss is None:
                return taken.last, jnp.stack(taken.forward)
            value = _apply_loss(loss, jax.tree.unflatten(traced.out_tree, out), key)
            return value, jnp.stack(taken.forward)

        sinks = [jnp.zeros(_FIELDS, jnp.float32)] * number
        value, pull, forward = jax.vjp(run, sinks, has_aux=True)
        start = jnp.ones((), value.dtype) if loss else jax.random.normal(key, value.shape).astype(value.dtype)
        return forward, jnp.stack(pull(start)[0])

    consts = jaxpr.consts
    try:
        # Unused arguments stay, so that equal programs have equal arguments.
        lowered = jax.jit(measure, keep_unused=True).lower(leaves, jax.random.key(0))
    except ValueError as error:
        if "everse-mode differentiation" in str(error):  # JAX's message for a while loop, a callback and the like
            raise ValueError(f"{model.name} cannot be differentiated: {error}") from error
        raise
    places = [i for i, call in enumerate(taken_calls) if roles[call] == _BLOCK]
    return Measurement(
        paths=_paths([calls[taken_calls[place]].path for place in places]),
        shapes=tuple(taken_shapes[place] for place in places),
        dtypes=tuple(str(calls[taken_calls[place]].dtype) for place in places),
        program=_compile(lowered, leaves),
        _blocks=tuple(places),
        _branches=_branch_places(calls, taken_calls, roles),
    )


def _branch_places(calls: Sequence[Call], order: Sequence[int], roles: Mapping[int, str]) -> tuple[int, ...]:
    """For each block that runs, where in `order` its branch stands, the last one if it has several; -1 for none."""
    found, pending = [], {}
    for place, call in enumerate(order):
        if roles[call] == _BLOCK:
            found.append(pending.pop(call, -1))
            continue
        block = calls[call].parent
        while roles.get(block) != _BLOCK:  # branches are selected inside blocks only
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


def _apply_loss(loss: str | Loss, output: Any, key: jax.Array) -> jax.Array:
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: expected one of {', '.join(LOSSES)}, or a function of the output")
        return LOSSES[loss](output, key)
    value = loss(output)
    if not isinstance(value, jax.Array) or value.ndim or not jnp.issubdtype(value.dtype, jnp.floating):
        shown = f"shape {value.shape}, {value.dtype}" if isinstance(value, jax.Array) else type(value).__name__
        raise ValueError(f"loss= must return a floating-point scalar, not {shown}")
    return value


def cross_entropy(output: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits [..., C] on labels drawn uniformly at random."""
    if not isinstance(output, jax.Array) or output.ndim < 2 or not jnp.issubdtype(output.dtype, jnp.floating):
        shown = f"shape {output.shape}, {output.dtype}" if isinstance(output, jax.Array) else type(output).__name__
        raise ValueError(
            f'loss="cross_entropy" needs logits [..., C] as the model\'s output, which is {shown}; pass loss= a '
            "function of this output that returns a scalar"
        )
    logits = output.astype(jnp.float32)
    labels = jax.random.randint(key, output.shape[:-1], 0, output.shape[-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -chosen.mean()


LOSSES: dict[str, Callable[[Any, jax.Array], jax.Array]] = {"cross_entropy": cross_entropy}
