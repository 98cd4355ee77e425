"""Which of the arrays that a block returns is measured."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from nfjax.spp import _flow, _losses
from nfjax.spp._evaluation import BLOCK, BRANCH
from nfjax.spp._flow import Marks
from nfjax.spp._losses import Loss
from nfjax.spp._tracing import Call, Leaf, Tag, Trace

Output = Callable[[Any], Any] | int | str | Sequence[int | str]


def choose(
    traced: Trace,
    blocks: Sequence[int],
    branches: Sequence[int],
    output: Output | None,
    loss: str | Loss | None,
    all_reached: bool = True,
) -> dict[Tag, str]:
    """The tag to be measured of every block and branch, with its role.

    Of a block that returns several floating-point arrays, `output` says which one. Left out, it is chosen by use. The
    arrays are ranked by the calls of the same class that return the same structure together:

    1. in how many of these calls it goes into another block (or into the next round of a loop over this one);
    2. in how many it goes into what the model returns, with `loss` into what that reads, without passing another block;
    3. in how many places of the output it stands (an LSTM cell returns its hidden state twice, its cell state once);
    4. its size; 5. the order in which it stands there.

    Ways along which a gradient comes back count first, and where these do not decide, others. Of each block, the array
    of highest rank is measured that a gradient reaches; of a branch likewise, by what goes into its block's output.

    Raises ValueError where no gradient reaches a block's array, saying why, if `all_reached` asks for it, and where
    `output` does not name one.
    """
    executed = _flow.executions_of(traced.jaxpr.jaxpr)
    there = {tag for tag in executed if not tag.entry}
    candidates = {call: _candidates(traced.calls[call], call, there) for call in blocks}
    wanted = {} if output is None else {call: _named(output, traced.calls[call], call) for call in blocks}
    sinks = _sinks(traced, loss)
    ranked = {call: [wanted[call]] for call in blocks} if wanted else _ranked(traced, candidates, sinks)
    chosen = _with_gradient(traced, ranked, sinks if loss is not None else None, all_reached)
    return dict.fromkeys(_branch_outputs(traced, branches, chosen, there), BRANCH) | dict.fromkeys(chosen, BLOCK)


def leaf_path(calls: Sequence[Call], tag: Tag) -> str:
    """Where a measured array stands in its call's output, at the shortest of its places; empty for all of it."""
    paths = [leaf.path for leaf in calls[tag.call].leaves if leaf.number == tag.number]
    return min(paths, key=len)


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """The paths of blocks in execution order; those of a module that runs several times are numbered: "block[0]"."""
    total, seen, paths = collections.Counter(names), collections.Counter(), []
    for name in names:
        paths.append(f"{name}[{seen[name]}]" if total[name] > 1 else name)
        seen[name] += 1
    return tuple(paths)


def dtype(calls: Sequence[Call], tag: Tag) -> Any:
    return next(leaf.dtype for leaf in calls[tag.call].leaves if leaf.number == tag.number)


# ---------------------------------------------------------------- chosen by the user


def _named(output: Output, call: Call, index: int) -> Tag:
    returned = ", ".join(map(str, call.leaves))
    if isinstance(output, str):
        found = [leaf for leaf in call.leaves if output in _names(leaf)]
        if not found:
            raise ValueError(f"output={output!r} names no array that {call.what} returns: expected one of {returned}")
    else:
        try:
            found = [_walk(output, jax.tree.unflatten(call.tree, call.returned))]
        except Exception as error:
            raise ValueError(
                f"output= raised {type(error).__name__} on {call.what} ({error}), which returns {returned}"
            ) from error
    if not (isinstance(found[0], Leaf) and found[0].number is not None):
        raise ValueError(
            f"output= chooses no floating-point array of what {call.what} returns: expected one of {returned}"
        )
    return Tag(index, found[0].number)


def _walk(output: Any, returned: Any) -> Any:
    if callable(output):
        return output(returned)
    for step in [output] if isinstance(output, int) else output:
        returned = getattr(returned, step) if isinstance(step, str) and hasattr(returned, step) else returned[step]
    return returned


def _names(leaf: Leaf) -> set[str]:
    """An array's path "['state'][0].h" by that name, and as "state/0/h"."""
    plain = "/".join(leaf.path.replace("[", "/").replace("]", "").replace("'", "").replace(".", "/").split("/"))
    return {leaf.path, plain.strip("/").replace("//", "/")}


# ---------------------------------------------------------------- chosen by use


def _candidates(call: Call, index: int, there: set[Tag]) -> list[Tag]:
    numbers = dict.fromkeys(leaf.number for leaf in call.leaves)
    return [tag for number in numbers if (tag := Tag(index, number)) in there]


def _ranked(traced: Trace, candidates: Mapping[int, Sequence[Tag]], sinks: Sequence[Marks]) -> dict[int, list[Tag]]:
    """The candidates of every call, the best first."""
    if all(len(tags) == 1 for tags in candidates.values()):
        return {call: list(tags) for call, tags in candidates.items()}
    calls = traced.calls
    tags = [tag for group in candidates.values() for tag in group]
    own = {tag: 1 << i for i, tag in enumerate(tags)}
    uses: collections.Counter[Any] = collections.Counter()

    def kind(tag: Tag) -> Any:
        call = calls[tag.call]
        return type(call.module), tuple((leaf.path, leaf.number) for leaf in call.leaves), tag.number

    def at_tag(tag: Tag, marks: Marks) -> Marks:
        if tag.entry or tag.call not in candidates:
            return marks
        # What comes from a block inside this one goes on beside its output.
        inside = (1 << i for i in _flow.bits(marks) if _within(calls, tags[i].call, tag.call))
        return _flow.union([*inside, own.get(tag, 0)])

    for way, through in (("gradient", _flow.gradient), ("value", _flow.value)):
        out, at = _flow.follow(traced.jaxpr.jaxpr, [0] * len(traced.jaxpr.in_avals), through, at_tag)
        read = _flow.union([marks for marks, sink in zip(out, sinks, strict=True) if sink])
        arrived = [(tag, marks) for tag, marks in at.items() if not tag.entry and tag.call in candidates]
        passed_on = {
            tags[i] for tag, marks in arrived for i in _flow.bits(marks) if not _within(calls, tags[i].call, tag.call)
        }
        uses.update((way, "passed on", kind(tag)) for tag in passed_on)
        uses.update((way, "returned", kind(tags[i])) for i in _flow.bits(read))

    def rank(tag: Tag) -> tuple[int, ...]:
        leaves = [leaf for leaf in calls[tag.call].leaves if leaf.number == tag.number]
        used = (uses[way, how, kind(tag)] for way in ("gradient", "value") for how in ("passed on", "returned"))
        return (*used, len(leaves), leaves[0].size, -tag.number)

    return {call: sorted(group, key=rank, reverse=True) for call, group in candidates.items()}


def _within(calls: Sequence[Call], inner: int, outer: int) -> bool:
    """Whether one call is made during another."""
    parent = calls[inner].parent
    while parent is not None and parent != outer:
        parent = calls[parent].parent
    return parent == outer


def _sinks(traced: Trace, loss: str | Loss | None) -> list[Marks]:
    """For each array that the model returns, whether (1 or 0) a gradient may start there: all of them, or those that
    the loss reads.
    """
    avals = traced.jaxpr.out_avals
    if loss is None:
        return [1] * len(avals)

    def value(out: Sequence[Any], key: jax.Array) -> jax.Array:
        return _losses.apply(loss, jax.tree.unflatten(traced.out_tree, out), key)

    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    jaxpr = jax.make_jaxpr(value)(shapes, jax.random.key(0))
    marks = [*(1 << i for i in range(len(avals))), *[0] * (len(jaxpr.in_avals) - len(avals))]
    (read,) = _flow.follow(jaxpr.jaxpr, marks, _flow.gradient).out
    return [read >> i & 1 for i in range(len(avals))]


def _with_gradient(
    traced: Trace, ranked: Mapping[int, Sequence[Tag]], sinks: Sequence[Marks] | None, all_reached: bool
) -> list[Tag]:
    """The best of every call that a gradient reaches: from `sinks`, or from the output of the last block, None."""
    jaxpr = traced.jaxpr.jaxpr
    tags = [tag for group in ranked.values() for tag in group]
    start = None if sinks is not None else _last(jaxpr, [group[0] for group in ranked.values()])
    own = {tag: 1 << i for i, tag in enumerate(tags)}
    out, at = _flow.follow(jaxpr, [0] * len(jaxpr.invars), _flow.gradient, lambda tag, marks: marks | own.get(tag, 0))
    if sinks is None:
        reached = at.get(start, 0) | own.get(start, 0)
    else:
        reached = _flow.union([marks for marks, sink in zip(out, sinks, strict=True) if sink])
    chosen = []
    for group in ranked.values():
        with_gradient = [tag for tag in group if own[tag] & reached]
        chosen.append(with_gradient[0] if with_gradient else group[0])
    missed = [tag for tag in chosen if not own[tag] & reached]
    if missed and all_reached:
        raise ValueError(_why(traced, chosen, missed, start, sinks))
    return chosen


def _last(jaxpr: Any, tags: Sequence[Tag]) -> Tag | None:
    ran = _flow.order(jaxpr, dict.fromkeys(tags, BLOCK))
    return ran[-1][0] if ran else None


def _branch_outputs(traced: Trace, branches: Sequence[int], chosen: Sequence[Tag], there: set[Tag]) -> list[Tag]:
    candidates = {call: _candidates(traced.calls[call], call, there) for call in branches}
    if all(len(tags) == 1 for tags in candidates.values()):
        return [tags[0] for tags in candidates.values()]
    tags = [tag for group in candidates.values() for tag in group]
    own = {tag: 1 << i for i, tag in enumerate(tags)}

    def at_tag(tag: Tag, marks: Marks) -> Marks:
        return 0 if tag in chosen else marks | own.get(tag, 0)

    at = _flow.follow(traced.jaxpr.jaxpr, [0] * len(traced.jaxpr.in_avals), _flow.gradient, at_tag).at
    used = _flow.union([at.get(tag, 0) for tag in chosen])

    def rank(tag: Tag) -> tuple[int, ...]:
        leaves = [leaf for leaf in traced.calls[tag.call].leaves if leaf.number == tag.number]
        return bool(own[tag] & used), len(leaves), leaves[0].size, -tag.number

    return [max(group, key=rank) for group in candidates.values() if group]


# ---------------------------------------------------------------- no gradient


def _why(
    traced: Trace, chosen: Sequence[Tag], missed: Sequence[Tag], start: Tag | None, sinks: Sequence[Marks] | None
) -> str:
    """The message for blocks that no gradient reaches: where it stops."""
    jaxpr, calls = traced.jaxpr.jaxpr, traced.calls
    tag = _last(jaxpr, missed) or missed[-1]
    named = dict(zip(chosen, numbered([calls[one.call].path for one in chosen]), strict=True))
    stopped: list[str] = []  # by what: each has a bit of its own behind the first, which is the way of the gradient

    def through(eqn: Any, out: Any, given: Sequence[Marks]) -> Marks:
        marks = _flow.union(given)
        if not marks & 1 or not _flow.stops(eqn, out):
            return marks
        name = eqn.primitive.name
        if name not in ("stop_gradient", "floor", "ceil", "round", "sign"):
            name = f"{out.aval.dtype} values ({name})"
        if name not in stopped:
            stopped.append(name)
        return marks & ~1 | 2 << stopped.index(name)

    out, at = _flow.follow(jaxpr, [0] * len(jaxpr.invars), through, lambda other, marks: marks | int(other == tag))
    if sinks is None:
        arrived = at.get(start, 0) | int(start == tag)
    else:
        arrived = _flow.union([marks for marks, sink in zip(out, sinks, strict=True) if sink])
    path, returned = leaf_path(calls, tag), calls[tag.call].leaves
    what = f"no gradient reaches the output of {named[tag]!r}" + (f", array {path}" if path else "")
    culprits = [stopped[i - 1] for i in _flow.bits(arrived)]
    others = [str(leaf) for leaf in returned if leaf.number != tag.number]
    if culprits:
        # A comparison may only steer; what stops a gradient outright is the likelier cause.
        culprits = [name for name in culprits if not name.startswith("bool")] or culprits
        return (
            f"{what}: behind it, what depends on it passes {', '.join(culprits)}, which is not differentiable. Select "
            "other blocks with where=, or another array of theirs with output="
        )
    if others and not _flow.union(out) and not arrived:
        return (
            f"{what}: nothing that the model returns depends on it. It also returns {', '.join(others)}: choose with "
            "output="
        )
    if start is not None:
        return (
            f"{what}: the gradient starts at the output of {named[start]!r}, the last block, which does not "
            "depend on it. Start it at a loss= that does, or select other blocks with where="
        )
    return (
        f"{what}: the loss does not depend on it. Select other blocks with where=, another array with output=, or "
        "another target with loss="
    )
