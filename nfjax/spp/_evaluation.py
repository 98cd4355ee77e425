"""A tagged jaxpr evaluated again under JAX's differentiation: the moments of every block on the way forward, and of
the gradient that flows back through it, none of which is kept longer than it takes to reduce it.

Each chosen tag becomes an identity with a second, unused argument, its sink; the rule for the gradient gives back as
the sink's "gradient" the moments of the one that passes through.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp import _activations
from nfjax.spp._flow import INLINED, REMATERIALIZED, SCAN, executions, scan_layout
from nfjax.spp._statistics import Moments, change, moments, similarity
from nfjax.spp._tracing import Call, Tag, tag

BLOCK, BRANCH = "block", "branch"  # the roles of what is tapped


@jax.custom_vjp
def _tap(x: jax.Array, sink: Moments) -> jax.Array:
    """x; the gradient for the sink is the `moments` of the gradient for x."""
    del sink
    return x


def _tap_forward(x: jax.Array, sink: Moments) -> tuple[jax.Array, None]:
    del sink
    return x, None


def _tap_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, Moments]:
    return gradient, moments(gradient)


_tap.defvjp(_tap_forward, _tap_backward)


class Taken(NamedTuple):
    """What an evaluation found, in the order of `_flow.order`.

    Attributes:
        forward: Moments of every tapped value.
        changes: Of the blocks, by `change`.
        similarities: Likewise, by `similarity`.
        shares: Of the activations, by `_activations.share`, in the order of `_activations.order`.
        last: The value at the last block; None where there was none.
    """

    forward: tuple[Moments, ...] = ()
    changes: tuple[jax.Array, ...] = ()
    similarities: tuple[jax.Array, ...] = ()
    shares: tuple[jax.Array, ...] = ()
    last: jax.Array | None = None

    def then(self, later: Taken) -> Taken:
        """Both, one after the other."""
        joined = [own + after for own, after in zip(self[:-1], later[:-1], strict=True)]
        return Taken(*joined, self.last if later.last is None else later.last)


Sinks = Sequence[Moments]
Inner = Callable[[Any, Sequence[Any], Sequence[Any], Sinks], tuple[list[Any], Taken]]


def evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], sinks: Sinks, roles: Mapping[Tag, str]
) -> tuple[list[Any], Taken]:
    """Evaluates a tagged jaxpr, the tags in `roles` tapped.

    Args:
        jaxpr: What is evaluated, with its `consts`.
        consts: Of the jaxpr.
        args: Likewise.
        sinks: One for each block in execution order.
        roles: What is tapped, as what.

    Returns:
        The outputs, and what was found on the way.
    """
    values: dict[Any, Any] = {}
    blocks = {tagged.call for tagged, role in roles.items() if role == BLOCK}
    given_to: dict[int, list[jax.Array]] = collections.defaultdict(list)
    inner, taken, activations = functools.partial(evaluate, roles=roles), Taken(), _activations.kinds(jaxpr)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        name, given, tagged, runs = eqn.primitive.name, [read(x) for x in eqn.invars], tag(eqn), executions(eqn)
        needed = sum(count for one, count in runs.items() if roles.get(one) == BLOCK)
        own, sinks, found = sinks[:needed], sinks[needed:], Taken()
        if tagged in roles:
            out, found = _tapped(given[0], own, given_to[tagged.call])
        elif tagged is not None:
            out = given
            if tagged.entry and tagged.call in blocks:
                given_to[tagged.call] += given
        elif not roles.keys() & runs.keys():
            out = bind_equation(eqn, given)
            if eqn.outvars and eqn.outvars[0] in activations:
                found = Taken(shares=(_activations.share(activations[eqn.outvars[0]], out[0]),))
        elif name in INLINED:
            closed = eqn.params[INLINED[name]]
            out, found = inner(closed.jaxpr, closed.consts, given, own)
        elif name == SCAN:
            out, found = _scan(eqn, given, own, inner)
        elif name == REMATERIALIZED:
            out, found = _remat(eqn.params, given, own, inner)
        else:
            raise AssertionError(f"check_supported let {name} pass")
        values.update(zip(eqn.outvars, out, strict=True))
        taken = taken.then(found)
    return [read(atom) for atom in jaxpr.outvars], taken


def _tapped(value: jax.Array, sinks: Sinks, given: Sequence[jax.Array]) -> tuple[list[jax.Array], Taken]:
    """A branch, without a sink, or a block, with the arrays that it was given."""
    still = jax.lax.stop_gradient(value)
    measured = moments(still)
    if not sinks:
        return [value], Taken((measured,))
    same = [jax.lax.stop_gradient(x) for x in given if x.shape == value.shape]
    changed = change(same, still, measured)
    # Before anything that follows: XLA would keep the value until there is time for it.
    value, alike = jax.lax.optimization_barrier((value, similarity(still, measured)))
    value = _tap(value, *sinks)
    return [value], Taken((measured,), (changed,), (alike,), last=value)


def bind_equation(eqn: Any, given: Sequence[Any]) -> Sequence[Any]:
    """What an equation of a jaxpr returns for these inputs."""
    params, functions = eqn.primitive.get_bind_params(eqn.params), ()
    if isinstance(params, tuple):  # before JAX 0.10.2 a pair, with the functions of a custom derivative in front
        functions, params = params
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*functions, *given, **params)
    return out if eqn.primitive.multiple_results else [out]


def _scan(eqn: Any, given: Sequence[Any], sinks: Sinks, inner: Inner) -> tuple[list[Any], Taken]:
    """A loop over blocks, unrolled, so that each round is measured on its own."""
    params, body = eqn.params, eqn.params["jaxpr"]
    num_consts, num_carry = scan_layout(eqn)
    num_unstacked = num_consts + num_carry
    consts, carry, stacked = given[:num_consts], given[num_consts:num_unstacked], given[num_unstacked:]
    rounds, each = range(params["length"]), len(sinks) // params["length"]
    outputs, taken = [], Taken()
    for done, i in enumerate(reversed(rounds) if params["reverse"] else rounds):
        args = [*consts, *carry, *(x[i] for x in stacked)]
        out, found = inner(body.jaxpr, body.consts, args, sinks[done * each : (done + 1) * each])
        carry, taken = out[:num_carry], taken.then(found)
        outputs.append(out[num_carry:])
    if params["reverse"]:
        outputs.reverse()
    return [*carry, *(jnp.stack(column) for column in zip(*outputs, strict=True))], taken


def _remat(params: Mapping[str, Any], given: Sequence[Any], sinks: Sinks, inner: Inner) -> tuple[list[Any], Taken]:
    """A rematerialized part stays one: what it takes comes out beside its outputs."""

    @functools.partial(jax.checkpoint, prevent_cse=params["prevent_cse"], policy=params["policy"])
    def run(given: Sequence[Any], sinks: Sinks) -> tuple[list[Any], Taken]:
        return inner(params["jaxpr"], (), given, sinks)

    return run(given, sinks)


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
