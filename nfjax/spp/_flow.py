"""What depends on what in a tagged jaxpr: marks, the bits of integers, travel from its inputs and tags to its outputs.

What is inside jit, remat, scan and cond is followed; any other operation passes all that it is given to all that it
returns.
"""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp._tracing import Tag, tag

# JAX's names for what is walked into.
INLINED = {"jit": "jaxpr", "closed_call": "call_jaxpr"}
SCAN, REMATERIALIZED, COND = "scan", "remat2", "cond"
# Their derivative is zero or stopped; those whose result is no floating-point array are known by it.
_WITHOUT_GRADIENT = {"stop_gradient", "floor", "ceil", "round", "sign"}

Marks = int
AtTag = Callable[[Tag, Marks], Marks]
Through = Callable[[Any, Any, Sequence[Marks]], Marks]


def union(marks: Sequence[Marks]) -> Marks:
    return functools.reduce(operator.or_, marks, 0)


def bits(marks: Marks) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while marks:
        lowest = marks & -marks
        yield lowest.bit_length() - 1
        marks ^= lowest


def value(eqn: Any, out: Any, given: Sequence[Marks]) -> Marks:
    """A `Through`: every dependence counts."""
    del eqn, out
    return union(given)


def gradient(eqn: Any, out: Any, given: Sequence[Marks]) -> Marks:
    """A `Through`: those along which a gradient flows back."""
    return 0 if stops(eqn, out) else union(given)


def stops(eqn: Any, out: Any) -> bool:
    """Whether no gradient comes back through this output of an operation."""
    return eqn.primitive.name in _WITHOUT_GRADIENT or not jnp.issubdtype(out.aval.dtype, jnp.inexact)


class Followed(NamedTuple):
    """Marks behind a jaxpr.

    Attributes:
        out: Of its outputs.
        at: Of what arrives at each tag.
    """

    out: list[Marks]
    at: dict[Tag, Marks]


def follow(jaxpr: Any, given: Sequence[Marks], through: Through, at_tag: AtTag = lambda tag, marks: marks) -> Followed:
    """Follows marks through a jaxpr; the body of a loop until nothing new arrives.

    Args:
        jaxpr: The jaxpr.
        given: Marks of its inputs.
        through: `(equation, output variable, marks of its inputs) -> marks`.
        at_tag: `(tag, marks) -> marks` of the value behind a tag.
    """
    marks: dict[Any, Marks] = dict(zip(jaxpr.invars, given, strict=True))
    at: dict[Tag, Marks] = {}

    def read(atom: Any) -> Marks:
        return 0 if isinstance(atom, Literal) else marks.get(atom, 0)

    def inside(jaxpr: Any, given: Sequence[Marks]) -> list[Marks]:
        inner = follow(jaxpr, given, through, at_tag)
        at.update({tag: at.get(tag, 0) | new for tag, new in inner.at.items()})
        return inner.out

    for eqn in jaxpr.eqns:
        name, ins = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if (tagged := tag(eqn)) is not None:
            at[tagged] = at.get(tagged, 0) | ins[0]
            out = [at_tag(tagged, ins[0])]
        elif name in INLINED:
            out = inside(eqn.params[INLINED[name]].jaxpr, ins)
        elif name == REMATERIALIZED:
            out = inside(eqn.params["jaxpr"], ins)
        elif name == COND:
            chosen, *rest = ins
            ways = [inside(branch.jaxpr, rest) for branch in eqn.params["branches"]]
            out = [union(way) | chosen for way in zip(*ways, strict=True)]
        elif name == SCAN:
            out = _loop(eqn, ins, inside)
        else:
            out = [through(eqn, variable, ins) for variable in eqn.outvars]
        marks.update(zip(eqn.outvars, out, strict=True))
    return Followed([read(atom) for atom in jaxpr.outvars], at)


def _loop(eqn: Any, given: Sequence[Marks], inside: Callable[..., list[Marks]]) -> list[Marks]:
    num_consts, num_carry = scan_layout(eqn)
    consts, stacked = given[:num_consts], given[num_consts + num_carry :]
    carry = list(given[num_consts : num_consts + num_carry])
    while True:
        out = inside(eqn.params["jaxpr"].jaxpr, [*consts, *carry, *stacked])
        further = [old | new for old, new in zip(carry, out[:num_carry], strict=True)]
        if further == carry:
            return [*further, *out[num_carry:]]
        carry = further


def scan_layout(eqn: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried; stacked ones follow.

    Carried values have the same rank inside and outside, stacked ones lose an axis; JAX's own names for their numbers
    differ between its versions.
    """
    body = eqn.params["jaxpr"].jaxpr

    def same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))

    num_carry = same_rank(eqn.outvars, body.outvars)
    return same_rank(eqn.invars, body.invars) - num_carry, num_carry


# ---------------------------------------------------------------- what a jaxpr will execute


def executions(eqn: Any) -> collections.Counter[Tag]:
    """How often an equation runs each tag."""
    if (tagged := tag(eqn)) is not None:
        return collections.Counter([tagged])
    rounds = eqn.params["length"] if eqn.primitive.name == SCAN else 1
    total: collections.Counter[Tag] = collections.Counter()
    for inner in jaxprs_in_params(eqn.params):
        for tagged, count in executions_of(inner).items():
            total[tagged] += rounds * count
    return total


def executions_of(jaxpr: Any) -> collections.Counter[Tag]:
    """How often a jaxpr runs each tag."""
    return sum(map(executions, jaxpr.eqns), collections.Counter())


def calls_of(executed: Mapping[Tag, int]) -> dict[int, int]:
    """How often each call runs of which something is returned that can be measured."""
    runs: dict[int, int] = {}
    for tagged, count in executed.items():
        if not tagged.entry:
            runs[tagged.call] = max(count, runs.get(tagged.call, 0))
    return runs


def order(jaxpr: Any, chosen: Mapping[Tag, str]) -> list[tuple[Tag, tuple[int, ...]]]:
    """The chosen tags with the shapes of what they tag, in the order in which `evaluation.evaluate` comes to them."""
    found = []
    for eqn in jaxpr.eqns:
        if (tagged := tag(eqn)) is not None:
            found += [(tagged, eqn.outvars[0].aval.shape)] if tagged in chosen else []
            continue
        rounds = eqn.params["length"] if eqn.primitive.name == SCAN else 1
        for inner in jaxprs_in_params(eqn.params):
            found += rounds * order(inner, chosen)
    return found
