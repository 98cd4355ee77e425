"""A tagged jaxpr evaluated again under JAX's differentiation: the statistics of every block on the way forward, and of
the gradient that flows back through it, none of which is kept longer than it takes to reduce it.

Each selected tag becomes an identity with a second, unused argument, its sink; the rule for the gradient gives back as
the sink's "gradient" the statistics of the one that passes through.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp.tracing import Call, tag

FIELDS = 5  # reached, scale; of the channels' means: mean square and variance; mean of the channels' variances
BLOCK, BRANCH = "block", "branch"  # the roles of the selected calls
# JAX's names for what is walked into.
_INLINED = {"jit": "jaxpr", "closed_call": "call_jaxpr"}
_SCAN, _REMATERIALIZED = "scan", "remat2"


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
        """From [n, FIELDS]."""
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
class Taken:
    """What an evaluation found, in execution order: the calls, their outputs' shapes and forward statistics; and the
    value at the last block.
    """

    calls: list[int] = dataclasses.field(default_factory=list)
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    forward: list[jax.Array] = dataclasses.field(default_factory=list)
    last: jax.Array | None = None

    def order(self) -> Taken:
        """The calls and shapes alone: traced values must not outlive their trace."""
        return Taken(self.calls, self.shapes)

    def extend(self, other: Taken) -> None:
        self.calls += other.calls
        self.shapes += other.shapes
        self.forward += other.forward
        self.last = self.last if other.last is None else other.last


def evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], sinks: list[jax.Array], roles: Mapping[int, str]
) -> tuple[list[Any], Taken]:
    """Evaluates a tagged jaxpr, the calls in `roles` tapped. sinks: one for each block in execution order; used up."""
    values: dict[Any, Any] = {}
    taken = Taken()

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def inside(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        out, inner = evaluate(jaxpr, consts, args, sinks, roles)
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
                if roles[call] == BLOCK:
                    value = taken.last = _tap(value, sinks.pop(0))
            out = [value]
        elif not any(count for call, count in executions(eqn).items() if call in roles):
            out = _bind(eqn, given)
        elif name in _INLINED:
            inner = eqn.params[_INLINED[name]]
            out = inside(inner.jaxpr, inner.consts, given)
        elif name == _SCAN:
            out = _scan(eqn, given, inside)
        elif name == _REMATERIALIZED:
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
    params: Mapping[str, Any], given: Sequence[Any], sinks: list[jax.Array], roles: Mapping[int, str], taken: Taken
) -> list[Any]:
    """A rematerialized part stays one: what it takes comes out beside its outputs."""
    jaxpr = params["jaxpr"]
    counts = executions_of(jaxpr)
    needed = sum(count for call, count in counts.items() if roles.get(call) == BLOCK)
    own, sinks[:needed] = sinks[:needed], []
    inner = Taken()

    @functools.partial(jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"])
    def run(given: Sequence[Any], sinks: Sequence[jax.Array]) -> Any:
        nonlocal inner
        out, found = evaluate(jaxpr, (), given, list(sinks), roles)
        inner = found.order()
        return out, found.forward, found.last

    out, forward, last = run(given, own)
    taken.extend(dataclasses.replace(inner, forward=forward, last=last))
    return out


# ---------------------------------------------------------------- what a jaxpr will execute


def executions(eqn: Any) -> collections.Counter[int]:
    """How often an equation runs each tagged call."""
    if (call := tag(eqn)) is not None:
        return collections.Counter([call])
    rounds = eqn.params["length"] if eqn.primitive.name == _SCAN else 1
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
        if name not in (*_INLINED, _SCAN, _REMATERIALIZED):
            raise ValueError(
                f"{calls[within[0]].what} runs inside JAX's {name!r}, from where its statistics cannot be brought out "
                "(a conditional, a while loop, or a derivative rule of its own); choose blocks outside it with where="
            )
        for inner in jaxprs_in_params(eqn.params):
            check_supported(inner, calls, chosen)
