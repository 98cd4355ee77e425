"""What the arrays of a model are, and what that says about a run: its mode, and the parameters that are all zero."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from nfjax.spp._flow import Marks, bits, follow, union, value
from nfjax.spp._mode import Mode
from nfjax.spp._tracing import Tag, Trace

PARAMETER, STATISTIC, KEY, OTHER = "parameter", "statistic", "key", "other"
_STATISTICS = ("batch_stats", "BatchStat")  # Linen's collection, and that of an NNX module inside a Linen one
_PRODUCTS = ("dot_general", "conv_general_dilated", "mul")
INPUT = ""  # in place of a block: what the network is given


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one array of `Runnable.arrays` is.

    Attributes:
        kind: A parameter, a statistic, a key, or another array.
        path: In the model; of a random key, its stream or place.
        variable: Of a parameter that is no `nnx.Param`, the class that it is instead.
    """

    kind: str
    path: tuple[str, ...] = ()
    variable: str = ""

    @property
    def name(self) -> str:
        return "/".join(self.path)

    @property
    def owner(self) -> str:
        """The module that holds it."""
        return "/".join(self.path[:-1])


def slots(arrays: Any) -> list[Slot]:
    """One for each leaf: of an `nnx.State` by the type of its variable, of Linen's `(variables, rngs, inputs)` by its
    place.
    """
    found = []
    from_linen = isinstance(arrays, tuple | list) and bool(arrays) and not isinstance(arrays[0], nnx.State)
    for place, leaf in jax.tree_util.tree_leaves_with_path(arrays, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        path = tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in place)
        kind, inner, variable = OTHER, path[1:], ""
        if isinstance(leaf, nnx.Variable):
            kind = _kind(leaf)
            variable = type(leaf).__name__ if kind == PARAMETER and not isinstance(leaf, nnx.Param) else ""
        elif from_linen and len(path) > 2 and path[0] == "0":
            kind = PARAMETER if path[1] == "params" else STATISTIC if path[1] in _STATISTICS else OTHER
            inner = path[2:-1] if isinstance(place[-1], jax.tree_util.GetAttrKey) else path[2:]  # a box around it
        elif from_linen and path[0] == "1":
            kind = KEY
        elif not isinstance(leaf, np.ndarray) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kind, inner = KEY, ("input",)
        if kind == KEY and isinstance(leaf, nnx.Variable):
            inner = inner[:-1]
        found += [Slot(kind, inner, variable)] * len(jax.tree.leaves(leaf))
    return found


def _kind(variable: nnx.Variable) -> str:
    if isinstance(variable, nnx.BatchStat):
        return STATISTIC
    if isinstance(variable, nnx.RngKey):
        return KEY
    return OTHER if isinstance(variable, nnx.RngState | nnx.Cache | nnx.Intermediate) else PARAMETER


# ---------------------------------------------------------------- the mode


def mode(traced: Trace, found: Sequence[Slot], arrays: Any) -> Mode:
    """How this trace of the model runs, `initial` left open; arrays: `Runnable.arrays`."""
    seeds = [1 << i if slot.kind in (STATISTIC, KEY) else 0 for i, slot in enumerate(found)]
    used = set(bits(union(follow(traced.jaxpr.jaxpr, seeds, value).out)))
    called = {call.path for call in traced.calls} | {""}
    owners: dict[str, bool] = {}
    for i, slot in enumerate(found):
        if slot.kind == STATISTIC and slot.owner in called:
            owners[slot.owner] = owners.get(slot.owner, False) or i in used
    dropped: dict[str, bool] = {}
    for call in traced.calls:
        if call.dropping is not None:
            dropped[call.path] = dropped.get(call.path, False) or call.dropping
    return Mode(
        batch=tuple(path for path, running in owners.items() if not running),
        running=tuple(path for path, running in owners.items() if running),
        dropout_on=tuple(path for path, on in dropped.items() if on),
        dropout_off=tuple(path for path, on in dropped.items() if not on),
        random=tuple(dict.fromkeys(slot.name for i, slot in enumerate(found) if slot.kind == KEY and i in used)),
        mutable=None if isinstance(arrays[0], nnx.State) else _mutable(traced.mutable),
    )


def _mutable(filter_like: Any) -> str:
    if isinstance(filter_like, linen.DenyList):
        return f"all but {_mutable(filter_like.deny)}" if filter_like.deny is not False else "all"
    if isinstance(filter_like, str):
        return filter_like
    if isinstance(filter_like, bool) or filter_like is None:
        return "all" if filter_like else "none"
    return ", ".join(sorted(map(str, filter_like))) or "none"


def initial(ran: Mode, found: Sequence[Slot], leaves: Sequence[Any]) -> tuple[str, ...]:
    """Which of the modules that ran on running statistics have them as they begin: means 0, variances 1."""
    held: dict[str, list[tuple[str, Any]]] = collections.defaultdict(list)
    for slot, leaf in zip(found, leaves, strict=True):
        if slot.kind == STATISTIC and slot.owner in ran.running:
            held[slot.owner].append((slot.path[-1], leaf))
    return tuple(path for path in ran.running if all(_begins(name, leaf) for name, leaf in held[path]))


def _begins(name: str, leaf: Any) -> bool:
    values = values_of(leaf)
    if values is None or not jnp.issubdtype(values.dtype, jnp.number):
        return values is not None
    starts = [0] if "mean" in name else [1] if "var" in name else [0, 1]
    return any(bool((values == start).all()) for start in starts)


def values_of(leaf: Any) -> np.ndarray | None:
    """Its values, None where they lie on devices of other processes or are no numbers."""
    if isinstance(leaf, jax.Array):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return None
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return None
    return np.asarray(leaf)


# ---------------------------------------------------------------- what multiplies a signal


def factors(traced: Trace, found: Sequence[Slot], blocks: Iterable[Tag]) -> dict[int, set[Tag | None]]:
    """For each parameter that multiplies a signal, by its place among the arrays, the measured blocks' outputs from
    which that signal comes without passing another; None for what comes before all of them.

    A parameter is known to multiply where one side of a product depends on it alone (cast, transposed, standardized).
    """
    tags = list(blocks)
    signal, first = 1 << len(tags), len(tags) + 1
    seeds = [1 << (first + i) if slot.kind == PARAMETER else 0 for i, slot in enumerate(found)]
    seeds = [signal if slot.kind == OTHER else seed for slot, seed in zip(found, seeds, strict=True)]
    own = {tag: 1 << i for i, tag in enumerate(tags)}
    multiplied: dict[int, set[Tag | None]] = collections.defaultdict(set)

    def at_tag(tag: Tag, marks: Marks) -> Marks:
        return own[tag] | signal if tag in own else marks

    def through(eqn: Any, out: Any, given: Sequence[Marks]) -> Marks:
        if eqn.primitive.name in _PRODUCTS:
            for alone, other in (given[:2], given[1::-1]):
                if alone.bit_count() == 1 and alone > signal and other & signal:
                    sources = [tags[i] for i in bits(other & (signal - 1))]
                    multiplied[alone.bit_length() - 1 - first].update(sources or [None])
        return value(eqn, out, given)

    follow(traced.jaxpr.jaxpr, seeds, through, at_tag)
    return dict(multiplied)


def zeros(
    multiplied: Mapping[int, set[Tag | None]], found: Sequence[Slot], leaves: Sequence[Any]
) -> dict[Tag | None, tuple[str, ...]]:
    """Of `factors`, the parameters that are all zero, by the block whose output they multiply."""
    by_block: dict[Tag | None, list[str]] = collections.defaultdict(list)
    for i in sorted(multiplied):
        values = values_of(leaves[i])
        if values is not None and not values.any():
            for tag in multiplied[i]:
                by_block[tag].append(found[i].name)
    return {tag: tuple(names) for tag, names in by_block.items()}
