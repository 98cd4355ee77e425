"""Which module calls of a trace are the blocks to be measured."""

from __future__ import annotations

import collections
import difflib
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from flax import linen, nnx

from nfjax.spp._residuals import IDENTITY, ancestors, in_one_line, residual_calls
from nfjax.spp._tracing import Call, class_name

DEFAULT_BRANCH = "branch"
BLOCKS, LAYERS = "block", "layer"  # what is measured where `where` is left out

Where = type | str | Sequence[type | str] | Callable[[str, Any], bool]


def select(jaxpr: Any, calls: Sequence[Call], reached: Mapping[int, int], where: Where | None) -> list[int]:
    """The indices of the selected calls. reached: how often the model's jaxpr computes the output of each.

    Raises ValueError where nothing is selected, or where `where` is left out and the model does not make clear what its
    blocks are.
    """
    if where is None:
        where = tuple(default_blocks(jaxpr, calls, reached))
    chosen = [i for i, call in enumerate(calls) if matches(where, "where", call)]
    found = [i for i in chosen if i in reached]
    for i in chosen:
        if calls[i].dtype is None:
            raise ValueError(f"{calls[i].what} returns no floating-point array that could be measured")
    for one in where if isinstance(where, tuple | list) else [where]:
        if isinstance(one, str) and not any(matches(one, "where", calls[i]) for i in found):
            raise ValueError(_unknown(one, calls, reached))
    if not found:
        raise ValueError(
            f"where={_shown(where)} selects no module that the model calls (by __call__, not by another method); it "
            f"calls {_census(calls, reached)}"
        )
    return found


def layers(
    calls: Sequence[Call], reached: Mapping[int, int], signal: Collection[int], owners: Collection[str]
) -> list[int]:
    """The indices of the calls of layers: of the innermost modules that hold parameters, of norms without any, of
    attention around its projections, and of a recurrent layer instead of its cell, which runs at every step of time.

    Args:
        calls: Of the model's trace.
        reached: As for `select`.
        signal: Those whose output depends on what the model is given.
        owners: The paths of the modules that hold parameters.
    """
    holding = {i for i in reached if calls[i].path in owners or is_norm(calls[i].module)}
    recurrent = {i: _recurrent(calls, i) for i in holding}
    holding = {recurrent[i] if recurrent[i] in reached else i for i in holding} & set(signal)
    around = {a for i in holding for a in ancestors(calls, i) if calls[a].path != calls[i].path}
    attention = {i for i in reached if "attention" in class_name(calls[i].module).lower()}
    return sorted(attention & around | holding - around)


def is_norm(module: Any) -> bool:
    """Whether a module normalizes, as its class's name says."""
    return class_name(module).endswith("Norm")


def _recurrent(calls: Sequence[Call], index: int) -> int | None:
    """The outermost recurrent layer or cell that a call is or is inside of, None where it is in none."""
    kinds = linen.RNN | nnx.RNN | linen.RNNCellBase | nnx.RNNCellBase
    return next((i for i in reversed([index, *ancestors(calls, index)]) if isinstance(calls[i].module, kinds)), None)


def _unknown(name: str, calls: Sequence[Call], reached: Mapping[int, int]) -> str:
    """What to say of a `where` that is no name of a class."""
    place = re.sub(r"\[\d+\]$", "", name)  # as a profile numbers the calls of one module
    for call in calls:
        if call.path == place:
            cls = class_name(call.module)
            return (
                f"where={name!r} is the path of a {cls}: where= takes classes, their names or a predicate. For this "
                f"module alone, where=lambda path, module: path == {place!r}; for every {cls}, where={_copyable(cls)}"
            )
    close = difflib.get_close_matches(name, [class_name(calls[i].module) for i in reached], 1)
    return (
        f"where={name!r} selects no module that the model calls (by __call__, not by another method)"
        f"{f', did you mean where={_copyable(close[0])}?' if close else ''}; it calls {_census(calls, reached)}"
    )


def select_branches(
    calls: Sequence[Call], reached: Mapping[int, int], blocks: Sequence[int], branch: Where
) -> list[int]:
    """The indices of the calls inside `blocks` that are residual branches, by default the modules named "branch", of
    which there may be none. ValueError where another name, or a class, means none.
    """
    blocks = set(blocks)
    inside = set(blocks)
    for i, call in enumerate(calls):  # a call comes after its parent
        if call.parent in inside:
            inside.add(i)

    def chosen(call: Call) -> bool:
        if isinstance(branch, str):
            return call.path.rpartition("/")[2] == branch or class_name(call.module) == branch
        return matches(branch, "branch", call)

    candidates = [i for i in sorted(inside - blocks) if i in reached or calls[i].dtype is None]
    found = [i for i in candidates if chosen(calls[i])]
    if not found and branch != DEFAULT_BRANCH and not _is_predicate(branch):
        children = [calls[i] for i in candidates if calls[i].parent in blocks]
        names = dict.fromkeys(f"{call.path.rpartition('/')[2]!r} ({class_name(call.module)})" for call in children)
        raise ValueError(
            f"branch={_shown(branch)} means no module inside the blocks: expected the name of an attribute or a class, "
            f"several, or a predicate (path, module); in the blocks are {', '.join(names) or 'no modules'}"
        )
    return [i for i in found if i in reached and calls[i].dtype is not None]


def _is_predicate(where: Where) -> bool:
    return callable(where) and not isinstance(where, type)


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
    return _residual_blocks(jaxpr, calls, reached) or [_repeated_composite(jaxpr, calls, reached)]


def _residual_blocks(jaxpr: Any, calls: Sequence[Call], reached: Mapping[int, int]) -> list[type]:
    runs: collections.Counter[type] = collections.Counter()
    members = collections.defaultdict(list)
    for i, call in enumerate(calls):
        if i in reached or call.dtype is None:
            runs[type(call.module)] += max(reached.get(i, 0), 1)
            members[type(call.module)].append(i)
    # Flax's own layers are no blocks; nor is a step of a recurrent cell, whose state is a sum, too.
    eligible = [
        cls
        for cls in members
        if runs[cls] > 1
        and not cls.__module__.startswith("flax.")
        and not issubclass(cls, linen.RNNCellBase | nnx.RNNCellBase)
    ]
    repeated = {i for cls in eligible for i in members[cls] if i in reached}
    skips: dict[type, int] = {}
    for i, skip in residual_calls(jaxpr, calls, repeated).items():
        cls = type(calls[i].module)
        skips[cls] = max(skips.get(cls, 0), skip)
    around = {i: ancestors(calls, i) for group in members.values() for i in group}
    contents = {i: set() for i in around}  # the classes inside of a call
    for i, outer in around.items():
        for a in outer:
            contents.setdefault(a, set()).add(type(calls[i].module))

    def outside(part: type, cls: type) -> list[int]:
        """The calls of one class that are not inside of a call of the other."""
        return [i for i in members[part] if not any(type(calls[a].module) is cls for a in around[i])]

    blocks = set(skips)
    # A layer that sums two products of its input (a low-rank update) is no block where it serves a block with a skip.
    firm = {cls for cls in blocks if skips[cls] == IDENTITY}
    blocks -= {cls for cls in blocks - firm if any(len(outside(cls, other)) < len(members[cls]) for other in firm)}

    def alike(a: int, b: int) -> bool:
        return contents[a] <= contents[b] or contents[b] <= contents[a]

    def parts(call: int) -> list[int]:
        """The outermost blocks inside of a call."""
        found = []
        for i in (i for cls in blocks for i in members[cls] if call in around[i]):
            between = around[i][: around[i].index(call)]
            if not any(type(calls[a].module) in blocks for a in between):
                found.append(i)
        return found

    # From the inside to the outside: what a class holds has been settled when its turn comes.
    for cls in sorted(eligible, key=lambda cls: -max(len(around[i]) for i in members[cls])):
        if not repeated.issuperset(members[cls]):
            continue
        pairs = [pair for call in members[cls] for pair in itertools.combinations(parts(call), 2)]
        several = any(type(calls[a].module) is type(calls[b].module) and alike(a, b) for a, b in pairs)
        if several:
            blocks.discard(cls)
            continue
        composed = any(not alike(a, b) for a, b in pairs)
        if cls in blocks or composed:
            # A part may be called once more elsewhere, such as in a head.
            blocks -= {part for part in blocks - {cls} if sum(reached.get(i, 0) for i in outside(part, cls)) < 2}
            blocks.add(cls)
    return [cls for cls in members if cls in blocks]


def _repeated_composite(jaxpr: Any, calls: Sequence[Call], reached: Mapping[int, int]) -> type:
    """The one class of which several instances run that have modules of their own inside. A class that occurs at most
    once in each call of another such class is a part of that, not a rival.
    """
    # A call without an array is kept: its parts may have some.
    counted = [i for i, call in enumerate(calls) if i in reached or call.dtype is None]
    descendants: collections.Counter[int] = collections.Counter()
    around = {i: ancestors(calls, i) for i in counted}
    for i in counted:
        descendants.update(around[i])
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
        outer = [[a for a in around[i] if type(calls[a].module) is other] for i in candidates[cls]]
        return all(outer) and max(collections.Counter(a[0] for a in outer).values()) == 1

    blocks = [cls for cls in candidates if not any(part_of(cls, other) for other in candidates if other is not cls)]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        raise ValueError(
            "cannot tell what the blocks of this model are: nothing that is called more than once makes a residual "
            "addition or has parts of its own. Choose with where=, a class or a predicate (path, module)"
            f"{_most_called(jaxpr, calls, reached)}; the model calls {_census(calls, reached)}"
        )
    likely = min(blocks, key=lambda cls: (len(around[candidates[cls][0]]), -descendants[candidates[cls][0]]))
    listed = ", ".join(f"{cls.__name__} ({runs[cls]} calls)" for cls in blocks)
    raise ValueError(
        "cannot tell what the blocks of this model are: nothing that is called more than once makes a residual "
        f"addition. Choose with where=, such as where={_copyable(likely.__name__)}; candidates are {listed}"
    )


def _most_called(jaxpr: Any, calls: Sequence[Call], reached: Mapping[int, int]) -> str:
    """ ", such as where=..." for the class that is called most often, each call on the way to the last."""
    groups = collections.defaultdict(list)
    for i in reached:
        groups[type(calls[i].module)].append(i)
    for _, group in sorted(groups.items(), key=lambda item: -sum(reached[i] for i in item[1])):
        if in_one_line(jaxpr, group):
            return f", such as where={_copyable(class_name(calls[group[0]].module))}"
    return ""


def _census(calls: Sequence[Call], reached: Mapping[int, int]) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for i, call in enumerate(calls):
        if i in reached or call.dtype is None:
            counts[class_name(call.module)] += reached.get(i, 1)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "no modules"


def _copyable(*names: str) -> str:
    """Names of classes as a value of `where`."""
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"({', '.join(quoted)})"


def _shown(where: Where) -> str:
    if isinstance(where, tuple | list):
        return f"({', '.join(map(_shown, where))})"
    return getattr(where, "__name__", repr(where))
