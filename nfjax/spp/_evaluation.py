"""A tagged jaxpr evaluated again under JAX's differentiation: the statistics of every block on the way forward, and of
the gradient that flows back through it, none of which is kept longer than it takes to reduce it.

Each chosen tag becomes an identity with a second, unused argument, its sink; the rule for the gradient gives back as
the sink's "gradient" the statistics of the one that passes through.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp._flow import INLINED, REMATERIALIZED, SCAN, executions, executions_of, scan_layout
from nfjax.spp._tracing import Call, Tag, tag

FIELDS = 5  # reached, scale; of the channels' means: mean square and variance; mean of the channels' variances
UNKNOWN = -1.0  # of a share: a NaN would stop a program under JAX's debugging switch
BLOCK, BRANCH = "block", "branch"  # the roles of what is tapped


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
    """What an evaluation found, in the order of `flow.order`: forward statistics of every tapped value; of blocks, by
    `change`, how little they change what they are given; and the value at the last block.
    """

    forward: list[jax.Array] = dataclasses.field(default_factory=list)
    changes: list[jax.Array] = dataclasses.field(default_factory=list)
    last: jax.Array | None = None

    def extend(self, forward: Sequence[jax.Array], changes: Sequence[jax.Array], last: jax.Array | None) -> None:
        self.forward += forward
        self.changes += changes
        self.last = self.last if last is None else last


def change(given: Sequence[jax.Array], out: jax.Array, measured: jax.Array) -> jax.Array:
    """Var[out - x] / Var[out] for the array x, of those given to a block, that lies closest to its output;
    `UNKNOWN` where none has the output's shape, or the output has no variance. measured: `statistics` of the output.
    """
    _, scale, _, between, within = measured
    variances = []
    for x in given:
        difference = out.astype(jnp.float32) / scale - x.astype(jnp.float32) / scale
        variances.append(jnp.maximum(jnp.square(difference).mean() - jnp.square(difference.mean()), 0.0))
    if not variances:
        return jnp.float32(UNKNOWN)
    total = between + within
    share = functools.reduce(jnp.fmin, variances) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, share, UNKNOWN)


def evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], sinks: Iterator[jax.Array], roles: Mapping[Tag, str]
) -> tuple[list[Any], Taken]:
    """Evaluates a tagged jaxpr, the tags in `roles` tapped. sinks: one for each block in execution order."""
    values: dict[Any, Any] = {}
    taken = Taken()
    blocks = {tagged.call for tagged, role in roles.items() if role == BLOCK}
    given_to = collections.defaultdict(list)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def inside(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        out, inner = evaluate(jaxpr, consts, args, sinks, roles)
        taken.extend(inner.forward, inner.changes, inner.last)
        return out

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        name, given = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if (tagged := tag(eqn)) is not None:
            (value,) = given
            if tagged.entry and tagged.call in blocks:
                given_to[tagged.call].append(value)
            elif tagged in roles:
                still = jax.lax.stop_gradient(value)
                taken.forward.append(statistics(still))
                if roles[tagged] == BLOCK:
                    same = [jax.lax.stop_gradient(x) for x in given_to[tagged.call] if x.shape == value.shape]
                    taken.changes.append(change(same, still, taken.forward[-1]))
                    value = taken.last = _tap(value, next(sinks))
            out = [value]
        elif not any(tagged in roles for tagged in executions(eqn)):
            out = _bind(eqn, given)
        elif name in INLINED:
            inner = eqn.params[INLINED[name]]
            out = inside(inner.jaxpr, inner.consts, given)
        elif name == SCAN:
            out = _scan(eqn, given, inside)
        elif name == REMATERIALIZED:
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
    num_consts, num_carry = scan_layout(eqn)
    num_unstacked = num_consts + num_carry
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
    params: Mapping[str, Any], given: Sequence[Any], sinks: Iterator[jax.Array], roles: Mapping[Tag, str], taken: Taken
) -> list[Any]:
    """A rematerialized part stays one: what it takes comes out beside its outputs."""
    jaxpr = params["jaxpr"]
    needed = sum(count for tagged, count in executions_of(jaxpr).items() if roles.get(tagged) == BLOCK)

    @functools.partial(jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"])
    def run(given: Sequence[Any], sinks: Sequence[jax.Array]) -> Any:
        out, inner = evaluate(jaxpr, (), given, iter(sinks), roles)
        return out, inner.forward, inner.changes, inner.last

    out, *inner = run(given, list(itertools.islice(sinks, needed)))
    taken.extend(*inner)
    return out


def check_supported(jaxpr: Any, calls: Sequence[Call], chosen: Collection[Tag]) -> None:
    """ValueError for a chosen tag at a place where it cannot be measured."""
    for eqn in jaxpr.eqns:
        within = [tagged.call for tagged in executions(eqn) if tagged in chosen]
        if tag(eqn) is not None or not within:
            continue
        name = eqn.primitive.name
        if name not in (*INLINED, SCAN, REMATERIALIZED):
            raise ValueError(
                f"{calls[within[0]].what} runs inside JAX's {name!r}, from where its statistics cannot be brought out "
                "(a conditional, a while loop, or a derivative rule of its own); choose blocks outside it with where="
            )
        for inner in jaxprs_in_params(eqn.params):
            check_supported(inner, calls, chosen)
