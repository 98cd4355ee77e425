"""Which module calls of a trace end in a residual addition, read from the traced jaxpr.

The additions are found, not the names: a ResNet's block, a transformer's and one that nobody has seen before look alike
as data flow. From the two terms of an addition one walks back to where they part, the fork. It is residual if from
there one term is a skip, at most pooled, normalized or projected once it left the fork, while the other comes through a
layer. That leaves out biases (no fork), GELU's x + 0.04 x^3 and rotary embeddings (no layer), and the gated sums of
LSTMs and GRUs (no skip).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Container, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp._tracing import Call, tag

PROJECTED, IDENTITY = 1, 2  # what a skip is: through a convolution or a matrix, or not

_INPUT, _TAG, _MERGE = "(input)", "(tag)", "(merge)"  # the nodes that are no primitives
_ADDS = ("add", "add_any")
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "(opaque)")
_LAYERS = (*_PRODUCTS, "fft", "scatter-add", "reduce_window", "reduce_window_sum", "reduce_window_max")
_NONLINEAR = (
    "tanh", "logistic", "erf", "exp", "exp2", "expm1", "log", "log1p", "max", "min", "clamp", "sin", "cos", "abs",
    "sign", "integer_pow", "pow", "square", "sqrt", "rsqrt",
)  # fmt: skip
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin", "cumsum", "cumprod", "cummax", "sort")
_PRODUCTS_BY_ELEMENT = ("mul", "div", "select_n")


def residual_calls(jaxpr: Any, calls: Sequence[Call], eligible: Container[int]) -> dict[int, int]:
    """Those of the eligible calls that make a residual addition of their own which reaches their output through no
    further layer (an activation or a norm may follow), and for each the best skip found, PROJECTED or IDENTITY.

    A call is credited with an addition only where both terms part inside it, and where the layers between are its own
    modules: a helper that is handed two arrays, or an array and a branch, and adds them is not what holds the residual
    structure, its caller is.
    """
    graph = _Graph(jaxpr)
    found: dict[int, int] = {}
    for node in graph.nodes(_ADDS):
        addition = _residual(graph, node)
        if addition is None:
            continue
        around = [call for call in _around(addition, calls) if call in eligible and _reaches(graph, node, call, calls)]
        owners = (call for call in around if all(_owns(calls[call], calls[part]) for part in addition.inside))
        holder = next(owners, around[0] if around else None)
        if holder is not None:
            found[holder] = max(found.get(holder, 0), addition.skip)
    return found


def in_one_line(jaxpr: Any, chosen: Sequence[int]) -> bool:
    """Whether the output of the last of these calls depends on that of each other."""
    graph = _Graph(jaxpr)
    tags = {node: graph.calls[node] for node in graph.nodes([_TAG]) if graph.calls[node] in chosen}
    last = max(tags, default=0)
    seen, pending = set(), [last]
    while pending:
        for parent in graph.parents[pending.pop()]:
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    before = {call for node, call in tags.items() if node in seen}  # by any of the arrays that it returns
    return bool(tags) and set(tags.values()) - before <= {tags[last]}


@dataclasses.dataclass(frozen=True)
class _Addition:
    """A residual addition. fork: the call whose output the fork is, if it is one. inside: the calls whose outputs lie
    between the fork and the addition. after: those whose outputs come next.
    """

    skip: int
    fork: int | None
    inside: frozenset[int]
    after: frozenset[int]


class _Graph:
    """A jaxpr with its inner jaxprs inlined, as nodes in topological order. An equation is one node; the body of a loop
    occurs once, without the way back.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.names: list[str] = []
        self.parents: list[tuple[int, ...]] = []
        self.calls: list[int | None] = []
        self.floating: list[bool] = []
        self.sources: list[int] = []  # the inputs that a node depends on, one bit each
        inputs = [self._add(_INPUT, (), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)]
        self._inline(jaxpr, inputs)
        self.children: list[list[int]] = [[] for _ in self.names]
        for node, parents in enumerate(self.parents):
            for parent in parents:
                self.children[parent].append(node)

    def nodes(self, names: Sequence[str]) -> Iterator[int]:
        return (node for node, name in enumerate(self.names) if name in names)

    def _add(self, name: str, parents: Sequence[int | None], aval: Any, call: int | None = None) -> int:
        node = len(self.names)
        known = tuple(dict.fromkeys(parent for parent in parents if parent is not None))
        self.names.append(name)
        self.parents.append(known)
        self.calls.append(call)
        self.floating.append(jnp.issubdtype(aval.dtype, jnp.floating))
        sources = 1 << node if name == _INPUT else 0
        for parent in known:
            sources |= self.sources[parent]
        self.sources.append(sources)
        return node

    def _inline(self, jaxpr: Any, inputs: Sequence[int | None]) -> list[int | None]:
        """The nodes of a jaxpr's outputs; None for a literal."""
        values: dict[Any, int | None] = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            given = [None if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
            bodies = list(_bodies(eqn))
            tagged = tag(eqn)
            if tagged is not None and not tagged.entry:
                out = [self._add(_TAG, given, eqn.outvars[0].aval, tagged.call)]
            elif tagged is not None or name == "optimization_barrier":
                out = given
            elif bodies:
                ends = []
                for body in bodies:
                    consts = [self._add(_INPUT, (), v.aval) for v in body.constvars]
                    ends.append(self._inline(body, [*consts, *given[len(given) - len(body.invars) :]]))
                out = ends[0]
                if len(ends) > 1:
                    out = [
                        self._add(_MERGE, end, v.aval)
                        for end, v in zip(zip(*ends, strict=True), eqn.outvars, strict=True)
                    ]
            else:
                known = not any(True for _ in jaxprs_in_params(eqn.params))
                node = self._add(name if known else "(opaque)", given, eqn.outvars[0].aval) if eqn.outvars else None
                out = [node] * len(eqn.outvars)
            values.update(zip(eqn.outvars, out, strict=True))
        return [None if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars]


def _bodies(eqn: Any) -> Iterator[Any]:
    """The inner jaxprs that compute what an equation returns from its last operands: the function that is called, a
    loop's body, every branch of a conditional.
    """
    wanted = [v.aval.dtype for v in eqn.outvars]
    for jaxpr in jaxprs_in_params(eqn.params):
        if len(jaxpr.invars) <= len(eqn.invars) and [v.aval.dtype for v in jaxpr.outvars] == wanted:
            yield jaxpr


def _residual(graph: _Graph, node: int) -> _Addition | None:
    """What an addition is, None if it is not residual."""
    terms = graph.parents[node]
    if len(terms) != 2 or not graph.sources[terms[0]] & graph.sources[terms[1]]:
        return None
    fork, between = _fork(graph, *terms)
    if fork is None or not graph.floating[fork]:
        return None
    flow = _Flow(graph, fork, sorted(between))
    skips = [flow.skip[a] for a, b in (terms, terms[::-1]) if b in flow.layered]
    skip = max(skips, default=0)
    if not skip:
        return None
    inside = {graph.calls[n] for n in between if n in flow.skip} - {None}
    return _Addition(skip, graph.calls[fork], frozenset(inside), frozenset(_next_tags(graph, node)))


def _fork(graph: _Graph, a: int, b: int) -> tuple[int | None, set[int]]:
    """The last node that both a and b depend on (or are), and the nodes behind it that either depends on (or is)."""
    marks = {a: 1, b: 2}
    heap, waiting = [-a, -b], [0, 1, 1, 0]
    heapq.heapify(heap)
    seen: set[int] = set()
    while waiting[1] + waiting[3] and waiting[2] + waiting[3]:
        node = -heapq.heappop(heap)
        mark = marks[node]
        waiting[mark] -= 1
        if mark == 3:
            return node, seen
        seen.add(node)
        for parent in graph.parents[node]:
            known = marks.get(parent, 0)
            if known == 0:
                heapq.heappush(heap, -parent)
            else:
                waiting[known] -= 1
            marks[parent] = known | mark
            waiting[marks[parent]] += 1
    return None, seen


class _Flow:
    """How the nodes behind a fork depend on it. skip: for each that does, IDENTITY or PROJECTED if the fork's value is
    in it as it was or projected, else 0. layered: those that it reaches through a layer.
    """

    def __init__(self, graph: _Graph, fork: int, nodes: Sequence[int]) -> None:
        self.skip: dict[int, int] = {fork: IDENTITY}
        self.layered: set[int] = set()
        self._dense = {fork}  # depend on it element by element, not by a mean or another statistic of it
        self._curved: set[int] = set()  # and through an activation: what can be a gate
        for node in nodes:
            if given := [parent for parent in graph.parents[node] if parent in self.skip]:
                self._visit(node, graph.names[node], given)

    def _visit(self, node: int, name: str, given: Sequence[int]) -> None:
        if name in _LAYERS or any(parent in self.layered for parent in given):
            self.layered.add(node)
        if name not in _REDUCTIONS and any(parent in self._dense for parent in given):
            self._dense.add(node)
            if name in _NONLINEAR or any(parent in self._curved for parent in given):
                self._curved.add(node)
        self.skip[node] = self._through(name, given)

    def _through(self, name: str, given: Sequence[int]) -> int:
        if name in _NONLINEAR or name in _REDUCTIONS:
            return 0
        if name in _PRODUCTS:
            return min(self.skip[given[0]], PROJECTED) if len(given) == 1 else 0
        if name in _PRODUCTS_BY_ELEMENT and any(parent in self._curved for parent in given):
            return 0  # a gate
        return max(self.skip[parent] for parent in given)


def _next_tags(graph: _Graph, node: int) -> set[int]:
    """The calls whose outputs come next, through no layer."""
    found, seen, pending = set(), {node}, [node]
    while pending:
        for child in graph.children[pending.pop()]:
            if child in seen or graph.names[child] in _PRODUCTS:
                continue
            seen.add(child)
            if graph.calls[child] is None:
                pending.append(child)
            else:
                found.add(graph.calls[child])
    return found


def _around(addition: _Addition, calls: Sequence[Call]) -> list[int]:
    """The calls that can hold an addition, from the innermost to the outermost: those around all calls inside of it.

    With none inside, the layers are written without modules, and so may be what lies before the next call. It is that
    call's own, then, only where one of the same class and place gave the fork: a block after a block.
    """
    if addition.inside:
        chains = [ancestors(calls, call) for call in addition.inside]
        return [call for call in chains[0] if all(call in chain for chain in chains)]
    if addition.fork is None:
        return []
    before = calls[addition.fork]
    return [
        call
        for call in addition.after
        if type(calls[call].module) is type(before.module) and calls[call].parent == before.parent
    ]


def _owns(call: Call, part: Call) -> bool:
    """Whether a module holds another. One that was made during the call has no place in the model."""
    return part.path.startswith((f"{call.path}/", "(outside)"))


def _reaches(graph: _Graph, node: int, call: int, calls: Sequence[Call]) -> bool:
    """Whether a node reaches the output of the call from inside it, through no layer."""
    seen, pending = {node}, [node]
    while pending:
        for child in graph.children[pending.pop()]:
            if child in seen or graph.names[child] in _PRODUCTS:
                continue
            seen.add(child)
            ended = graph.calls[child]
            if ended == call:
                return True
            if ended is None or call in ancestors(calls, ended):
                pending.append(child)
    return False


def ancestors(calls: Sequence[Call], index: int) -> list[int]:
    """The calls around one, from the nearest to the farthest."""
    found = []
    while (index := calls[index].parent) is not None:
        found.append(index)
    return found
