"""Which module calls of a trace are the blocks to be measured."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nfjax.spp.residuals import IDENTITY, ancestors, residual_calls
from nfjax.spp.tracing import Call, class_name

Where = type | str | Sequence[type | str] | Callable[[str, Any], bool]


def select(jaxpr: Any, calls: Sequence[Call], reached: Mapping[int, int], where: Where | None) -> list[int]:
    """The indices of the selected calls. reached: how often the model's jaxpr computes the output of each.

    Raises ValueError where nothing is selected, or where `where` is left out and the model does not make clear what its
    blocks are.
    """
    if where is None:
        where = default_blocks(jaxpr, calls, reached)
    chosen = [i for i, call in enumerate(calls) if matches(where, "where", call)]
    found = [i for i in chosen if i in reached]
    for i in chosen:
        if calls[i].dtype is None:
            raise ValueError(f"{calls[i].what} returns no floating-point array that could be measured")
    if not found:
        raise ValueError(
            f"where={_shown(where)} selects no module that the model calls (by __call__, not by another method); it "
            f"calls {_census(calls, reached)}"
        )
    return found


def select_branches(
    calls: Sequence[Call], reached: Mapping[int, int], blocks: Sequence[int], branch: Where
) -> list[int]:
    """The indices of the calls inside `blocks` that are residual branches, by default the modules named "branch"."""
    blocks = set(blocks)
    inside = set(blocks)
    for i, call in enumerate(calls):  # a call comes after its parent
        if call.parent in inside:
            inside.add(i)

    def chosen(call: Call) -> bool:
        if isinstance(branch, str):
            return call.path.rpartition("/")[2] == branch or class_name(call.module) == branch
        return matches(branch, "branch", call)

    candidates = (i for i, call in enumerate(calls) if i in inside - blocks and i in reached)
    return [i for i in candidates if calls[i].dtype is not None and chosen(calls[i])]


def matches(where: Where, name: str, call: Call) -> bool:
    """Whether a class, a class name, several of these or a predicate `(path, module)` means this call."""
    if isinstance(where, str):
        return any(cls.__name__ == where for cls in type(call.module).__mro__)
    if isinstance(where, type):
        return isinstance(call.module, where)
    if isinstance(where, tuple | list):
        return any(matches(one, name, call) for one in where)
    if not callable(where):
        raise TypeError(f"{name}={where!r}: expected a class, its name, several, or a predicate (path, module)")
    try:
        return bool(where(call.path, call.module))
    except Exception as error:
        raise ValueError(f"{name}= raised {type(error).__name__} on {call.what}: {error}") from error


def default_blocks(jaxpr: Any, calls: Sequence[Call], reached: Mapping[int, int]) -> list[type]:
    """The classes of a model's blocks, where `where` is left out.

    A block is a call of the innermost class that runs more than once and ends in a residual addition of its own
    (`residuals`): every such class, be they encoder and decoder or basic and bottleneck. A class that holds such calls
    at most once each is one block of which they are parts, if it adds something itself or they are of different kinds
    (attention, MLP); if it holds several of a kind, it is a stage. Where nothing is residual, blocks are the one class
    of repeated modules with parts of their own.
    """
    return _residual_blocks(jaxpr, calls, reached) or [_repeated_composite(calls, reached)]


def _residual_blocks(jaxpr: Any, calls: Sequence[Call], reached: Mapping[int, int]) -> list[type]:
    runs: collections.Counter[type] = collections.Counter()
    members = collections.defaultdict(list)
    for i, call in enumerate(calls):
        if i in reached or call.dtype is None:
            runs[type(call.module)] += max(reached.get(i, 0), 1)
            members[type(call.module)].append(i)
    repeated = {i for cls, group in members.items() if runs[cls] > 1 for i in group if i in reached}
    skips: dict[type, int] = {}
    for i, skip in residual_calls(jaxpr, calls, repeated).items():
        cls = type(calls[i].module)
        skips[cls] = max(skips.get(cls, 0), skip)
    around = {i: ancestors(calls, i) for group in members.values() for i in group}
    contents = {i: set() for i in around}  # the classes inside of a call
    for i, outer in around.items():
        for a in outer:
            contents.setdefault(a, set()).add(type(calls[i].module))

    def inside(part: type, cls: type) -> list[bool]:
        return [any(type(calls[a].module) is cls for a in around[i]) for i in members[part]]

    blocks = set(skips)
    # A layer that sums two products of its input (a low-rank update) is no block where it serves a block with a skip.
    firm = {cls for cls in blocks if skips[cls] == IDENTITY}
    blocks -= {cls for cls in blocks - firm if any(any(inside(cls, other)) for other in firm)}

    def alike(a: int, b: int) -> bool:
        return contents[a] <= contents[b] or contents[b] <= contents[a]

    def parts(call: int, cls: type) -> list[int]:
        """The outermost blocks inside of a call."""
        found = []
        for i, outer in around.items():
            if call in outer and type(calls[i].module) in blocks:
                between = outer[: outer.index(call)]
                if not any(type(calls[a].module) in blocks for a in between):
                    found.append(i)
        return found

    # From the inside to the outside: what a class holds has been settled when its turn comes.
    for cls in sorted(members, key=lambda cls: -max(len(around[i]) for i in members[cls])):
        if runs[cls] < 2:
            continue
        held = {call: parts(call, cls) for call in members[cls]}
        pairs = [pair for found in held.values() for pair in itertools.combinations(found, 2)]
        several = any(type(calls[a].module) is type(calls[b].module) and alike(a, b) for a, b in pairs)
        if several:
            blocks.discard(cls)
            continue
        composed = any(not alike(a, b) for a, b in pairs) and not cls.__module__.startswith("flax.")
        if cls in blocks or composed:
            blocks -= {part for part in blocks - {cls} if all(inside(part, cls))}
            blocks.add(cls)
    return [cls for cls in members if cls in blocks]


def _repeated_composite(calls: Sequence[Call], reached: Mapping[int, int]) -> type:
    """The one class of which several instances run that have modules of their own inside. A class that occurs at most
    once in each call of another such class is a part of that, not a rival.
    """
    # A call without an array is kept: its parts may have some.
    counted = [i for i, call in enumerate(calls) if i in reached or call.dtype is None]
    descendants: collections.Counter[int] = collections.Counter()
    ancestors = {i: _ancestors(calls, i) for i in counted}
    for i in counted:
        descendants.update(ancestors[i])
    groups = collections.defaultdict(list)
    for i in counted:
        groups[type(calls[i].module)].append(i)
    runs = {cls: sum(max(reached.get(i, 0), 1) for i in members) for cls, members in groups.items()}
    # Those with one part are wrappers beside others (norm and activation), and blocks where there are no others.
    for parts in (2, 1):
        candidates = {
            cls: members
            for cls, members in groups.items()
            if runs[cls] > 1 and any(descendants[i] >= parts for i in members)
        }
        if candidates:
            break

    def part_of(cls: type, other: type) -> bool:
        outer = [[a for a in ancestors[i] if type(calls[a].module) is other] for i in candidates[cls]]
        return all(outer) and max(collections.Counter(a[0] for a in outer).values()) == 1

    blocks = [cls for cls in candidates if not any(part_of(cls, other) for other in candidates if other is not cls)]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        raise ValueError(
            "cannot tell what the blocks of this model are: no class of modules with parts of its own is called more "
            "than once. Choose with where=, a class or a predicate (path, module); the model calls "
            f"{_census(calls, reached)}"
        )
    likely = min(blocks, key=lambda cls: (len(ancestors[candidates[cls][0]]), -descendants[candidates[cls][0]]))
    listed = ", ".join(f"{cls.__name__} ({runs[cls]} calls)" for cls in blocks)
    raise ValueError(
        f"cannot tell what the blocks of this model are: choose with where=, such as where={likely.__name__}; "
        f"candidates are {listed}"
    )


def _ancestors(calls: Sequence[Call], index: int) -> list[int]:
    """From the nearest to the farthest."""
    found = []
    while (index := calls[index].parent) is not None:
        found.append(index)
    return found


def _census(calls: Sequence[Call], reached: Mapping[int, int]) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for i, call in enumerate(calls):
        if i in reached or call.dtype is None:
            counts[class_name(call.module)] += reached.get(i, 1)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "no modules"


def _shown(where: Where) -> str:
    if isinstance(where, tuple | list):
        return f"({', '.join(map(_shown, where))})"
    return getattr(where, "__name__", repr(where))
