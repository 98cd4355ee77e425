"""Where a model's kernels meet its signal: the products of which one side is a parameter alone.

A kernel is a parameter of two or more axes. It meets the signal at the first operation that has it, cast, reshaped or
standardized but mixed with no other kernel, on one side, and on the other what comes from the model's input. What such
an operation returns is tagged, as the outputs of modules are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, jaxprs_in_params

from nfjax._flax import inside
from nfjax.spp._evaluation import bind_equation
from nfjax.spp._flow import INLINED, REMATERIALIZED, SCAN, Marks, follow, scan_layout, union
from nfjax.spp._tracing import Call, Tag, Trace, tag
from nfjax.spp._variables import OTHER, PARAMETER, Slot

# What multiplies two arrays, or reads rows of one as the other says.
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "mul", "gather")
_SIGNAL = 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parameter that multiplies the signal.

    Attributes:
        leaf: Which of the model's arrays it is.
        path: Where it stands in the model.
        rounds: Of the loop each of whose rounds has a slice of it, along its first axis; None for a kernel that is used
            whole.
        reverse: Whether that loop begins with the last slice.
        variable: The class of NNX variable that it is, where that is no `nnx.Param`.
    """

    leaf: int
    path: str
    rounds: int | None = None
    reverse: bool = False
    variable: str = ""


def tag_products(
    traced: Trace, slots: Sequence[Slot], leaves: Sequence[Any]
) -> tuple[Trace, list[Kernel], tuple[str, ...]]:
    """The trace with every product of a kernel and the signal tagged, the kernels in the order of their first use, and
    the paths of other parameters that could be kernels.

    The tag of kernel number n is `Tag(len(traced.calls) + n, 0)`.

    Args:
        traced: Of the model.
        slots: What its arrays are.
        leaves: These arrays.
    """
    candidates = [
        i
        for i, (slot, leaf) in enumerate(zip(slots, leaves, strict=True))
        if slot.kind == PARAMETER and jnp.ndim(leaf) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    kernels: dict[int, Kernel] = {}
    seeds = [_SIGNAL if slot.kind == OTHER else 0 for slot in slots]
    for number, i in enumerate(candidates):
        seeds[i] = 1 << (number + 1)

    def meet(side: Marks) -> str | None:
        """The name of the tag of a kernel's product; None for a vector of which a loop has several, such as a scale."""
        leaf = candidates[side.bit_length() - 2]
        if leaf in sliced and jnp.ndim(leaves[leaf]) < 3:
            return None
        kernels.setdefault(leaf, Kernel(leaf, slots[leaf].name, variable=slots[leaf].variable))
        return Tag(len(traced.calls) + list(kernels).index(leaf), 0).name

    def slice_by(side: Marks, rounds: int, reverse: bool) -> None:
        leaf = candidates[side.bit_length() - 2]
        if leaf not in kernels and jnp.shape(leaves[leaf])[0] == rounds:
            sliced[leaf] = rounds, reverse

    sliced: dict[int, tuple[int, bool]] = {}
    walk = _Walk(meet, slice_by)

    def run(*args: Any) -> list[Any]:
        return walk(traced.jaxpr.jaxpr, traced.jaxpr.consts, args, seeds)[0]

    with jax.disable_jit(False):
        jaxpr = inside(traced.axes, lambda: jax.make_jaxpr(run)(*leaves))
    found = [
        dataclasses.replace(kernel, rounds=sliced[leaf][0], reverse=sliced[leaf][1]) if leaf in sliced else kernel
        for leaf, kernel in kernels.items()
    ]
    vectors = {leaf for leaf in sliced if jnp.ndim(leaves[leaf]) < 3}
    others = tuple(slots[leaf].name for leaf in candidates if leaf not in kernels and leaf not in vectors)
    calls = [Call(kernel.path, kernel, None, leaves[kernel.leaf].dtype) for kernel in found]
    return dataclasses.replace(traced, jaxpr=jaxpr, calls=(*traced.calls, *calls)), found, others


class _Walk:
    """Evaluates a jaxpr, and tags products on the way; gives values and their marks."""

    def __init__(self, meet: Callable[[Marks], str | None], slice_by: Callable[[Marks, int, bool], None]) -> None:
        self._meet, self._slice = meet, slice_by

    def __call__(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], seeds: Sequence[Marks]
    ) -> tuple[list[Any], list[Marks]]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        marks: dict[Any, Marks] = dict.fromkeys(jaxpr.constvars, 0)
        values.update(zip(jaxpr.invars, args, strict=True))
        marks.update(zip(jaxpr.invars, seeds, strict=True))

        def read(atom: Any) -> tuple[Any, Marks]:
            return (atom.val, 0) if isinstance(atom, Literal) else (values[atom], marks[atom])

        for eqn in jaxpr.eqns:
            given, own = zip(*map(read, eqn.invars), strict=True) if eqn.invars else ((), ())
            out, behind = self._equation(eqn, given, own)
            values.update(zip(eqn.outvars, out, strict=True))
            marks.update(zip(eqn.outvars, behind, strict=True))
        out = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in out], [mark for _, mark in out]

    def _equation(self, eqn: Any, given: Sequence[Any], own: Sequence[Marks]) -> tuple[Sequence[Any], Sequence[Marks]]:
        name, params = eqn.primitive.name, eqn.params
        if name in INLINED and tag(eqn) is None:
            closed = params[INLINED[name]]
            return self(closed.jaxpr, closed.consts, given, own)
        if name == REMATERIALIZED:
            run = jax.checkpoint(
                lambda *args: self(params["jaxpr"], (), args, own)[0],
                prevent_cse=params["prevent_cse"],
                policy=params["policy"],
            )
            return run(*given), follow(params["jaxpr"], own, _behind).out
        if name == SCAN:
            return self._scan(eqn, given, own)
        out, side = bind_equation(eqn, given), _meeting(eqn, own)
        if side is not None and (name := self._meet(side)) is not None:
            out = [checkpoint_name(x, name) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in out]
        return out, [_behind(eqn, variable, own) for variable in eqn.outvars]

    def _scan(self, eqn: Any, given: Sequence[Any], own: Sequence[Marks]) -> tuple[Sequence[Any], Sequence[Marks]]:
        params, body = eqn.params, eqn.params["jaxpr"]
        num_consts, num_carry = scan_layout(eqn)
        unstacked = num_consts + num_carry
        for side in filter(_is_kernel, own[unstacked:]):
            self._slice(side, params["length"], params["reverse"])
        carried = list(own[num_consts:unstacked])
        while True:  # until another round carries nothing else
            inside = [*own[:num_consts], *carried, *own[unstacked:]]
            behind = follow(body.jaxpr, inside, _behind).out
            further = [_joined([old, new]) for old, new in zip(carried, behind[:num_carry], strict=True)]
            if further == carried:
                break
            carried = further

        def step(carry: Any, stacked: Any) -> Any:
            out, _ = self(body.jaxpr, body.consts, [*given[:num_consts], *carry, *stacked], inside)
            return out[:num_carry], out[num_carry:]

        start, stacked = list(given[num_consts:unstacked]), list(given[unstacked:])
        loop = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, columns = jax.lax.scan(step, start, stacked, **loop)
        return [*carry, *columns], behind


def _is_kernel(side: Marks) -> bool:
    """Whether it depends on one kernel, and on nothing else that is marked."""
    return side > _SIGNAL and side.bit_count() == 1


def _meeting(eqn: Any, own: Sequence[Marks]) -> Marks | None:
    """The mark of the kernel that an operation multiplies with the signal, None where it is no such product."""
    sides = set(filter(_is_kernel, own))
    if len(sides) != 1 or not any(side & _SIGNAL for side in own):
        return None
    if eqn.primitive.name in _PRODUCTS or any(map(_multiplies, jaxprs_in_params(eqn.params))):
        return sides.pop()
    return None


def _multiplies(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS[:3] or any(map(_multiplies, jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns
    )


def _behind(eqn: Any, out: Any, given: Sequence[Marks]) -> Marks:
    del eqn, out
    return _joined(given)


def _joined(marks: Sequence[Marks]) -> Marks:
    """What has met the signal is signal, and no kernel's any more."""
    together = union(marks)
    return _SIGNAL if together & _SIGNAL else together
