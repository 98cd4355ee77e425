"""Activations in a tagged jaxpr, and how many of their units do nothing: dead ones and saturated ones.

They are operations and no modules, and are found in the computation: whatever rectifies (ReLU, ReLU6, `max(x, 0)`), and
tanh, erf and the logistic function where they stand by themselves. Inside a GELU or a SiLU, which have no bound, they
are left out; so are those inside of what the model compiles or rematerializes by itself without a measured module in
it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp._flow import INLINED, SCAN, executions, executions_of
from nfjax.spp._tracing import Tag, tag

RECTIFIED = "rectified"
BOUNDS = {"tanh": (-1.0, 1.0), "erf": (-1.0, 1.0), "logistic": (0.0, 1.0)}
NEAR = 0.01  # of its range: a value that close to a bound is saturated
_FUNCTIONS = (*INLINED, "custom_jvp_call", "custom_vjp_call")
FEW = 32  # examples and positions, with fewer of which a unit may be 0 by chance
_RESHAPED = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "add")
_PASSED = ("convert_element_type", "broadcast_in_dim", "min", "copy")  # beside the rectifying maximum


@dataclasses.dataclass(frozen=True)
class Activation:
    """One that runs.

    Attributes:
        before: The number of the measured block whose output comes next.
        kind: RECTIFIED, or a name in BOUNDS.
        size: Of its units, the last axis, where it is rectified; of its values otherwise.
        samples: How many values each unit has, over examples and positions.
    """

    before: int
    kind: str
    size: int
    samples: int


def kinds(jaxpr: Any) -> dict[Any, str]:
    """The activations among the equations of a jaxpr, not of those inside of it, by their output."""
    found = {}
    readers = collections.defaultdict(list)
    for eqn in jaxpr.eqns:
        for atom in eqn.invars:
            if not isinstance(atom, Literal):
                readers[atom].append(eqn)
    for eqn in jaxpr.eqns:
        if len(eqn.outvars) != 1 or not _is_signal(eqn.outvars[0].aval):
            continue
        if _rectifies(eqn) and not _is_rooted(eqn.outvars[0], readers):
            found[eqn.outvars[0]] = RECTIFIED
        elif (name := _bounded(eqn)) and not any(_gates(reader, eqn) for reader in readers[eqn.outvars[0]]):
            found[eqn.outvars[0]] = name
    return found


def share(kind: str, value: jax.Array) -> jax.Array:
    """Of the units [..., C] of a rectified activation the share that is 0 for the whole batch and at every place; of
    the values of a bounded one the share that is within 1 % of its range from a bound. A float32 scalar.
    """
    value = jax.lax.stop_gradient(value)
    if kind == RECTIFIED:
        return (value.max(axis=tuple(range(value.ndim - 1))) <= 0).mean(dtype=jnp.float32)
    low, high = BOUNDS[kind]
    margin = NEAR * (high - low)
    return ((value < low + margin) | (value > high - margin)).mean(dtype=jnp.float32)


def order(jaxpr: Any, roles: Mapping[Tag, str], blocks: Container[Tag], before: int = 0) -> list[Activation]:
    """The activations in the order in which `evaluation.evaluate` comes to them.

    Args:
        jaxpr: Tagged.
        roles: What is tapped.
        blocks: The tags of those that are blocks.
        before: How many blocks have run already.
    """
    found: list[Activation] = []
    known = kinds(jaxpr)
    for eqn in jaxpr.eqns:
        runs = executions(eqn)
        if (tagged := tag(eqn)) is not None:
            before += tagged in blocks
        elif roles.keys() & runs.keys():
            for _ in range(eqn.params["length"] if eqn.primitive.name == SCAN else 1):
                for inner in jaxprs_in_params(eqn.params):
                    found += order(inner, roles, blocks, before)
                    before += sum(count for one, count in executions_of(inner).items() if one in blocks)
        elif eqn.outvars and eqn.outvars[0] in known:
            kind, shape = known[eqn.outvars[0]], eqn.outvars[0].aval.shape
            size = int(np.prod(shape))
            samples = size // shape[-1]
            found.append(Activation(before, kind, shape[-1] if kind == RECTIFIED else size, samples))
    return found


def by_block(found: list[Activation], shares: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(dead, saturated): for each block the share of all units of the activations before it, since the block before;
    NaN where there are none, or too few examples to tell.

    Args:
        found: By `order`.
        shares: Of each of them, by `share`.
        count: Of the blocks.
    """
    totals = np.zeros((2, 2, count))  # rectified or bounded, units and those that do nothing, block
    for one, value in zip(found, shares, strict=True):
        if one.before < count and (one.kind != RECTIFIED or one.samples >= FEW):
            totals[int(one.kind != RECTIFIED), :, one.before] += one.size, one.size * value
    with np.errstate(invalid="ignore"):
        dead, saturated = totals[:, 1] / totals[:, 0]
    return dead, saturated


def _is_signal(aval: Any) -> bool:
    return aval.ndim > 1 and aval.size > 0 and jnp.issubdtype(aval.dtype, jnp.floating)


def _rectifies(eqn: Any) -> bool:
    """Whether it is max(x, 0), or a function of one array that is, with an upper bound at most."""
    if eqn.primitive.name == "max":
        return any(_is_zero(atom) for atom in eqn.invars)
    if eqn.primitive.name not in _FUNCTIONS:
        return False
    body = next(iter(jaxprs_in_params(eqn.params)), None)
    zeros = {var for var, atom in zip(body.invars, eqn.invars, strict=False) if _is_zero(atom)} if body else set()
    return body is not None and _rectifies_inside(body, zeros)


def _rectifies_inside(body: Any, zeros: set[Any]) -> bool:
    maxima = 0
    for eqn in body.eqns:
        if eqn.primitive.name == "convert_element_type" and not isinstance(eqn.invars[0], Literal):
            zeros = zeros | ({eqn.outvars[0]} if eqn.invars[0] in zeros else set())
        if _rectifies(eqn) or (
            eqn.primitive.name == "max" and any(not isinstance(atom, Literal) and atom in zeros for atom in eqn.invars)
        ):
            maxima += 1
        elif eqn.primitive.name not in _PASSED:
            return False
    return maxima == 1


def _is_rooted(variable: Any, readers: Mapping[Any, Sequence[Any]]) -> bool:
    """Whether a root is taken of it, perhaps of its sum with a small number: a variance that is kept from being
    negative, as norms do, and no activation.
    """
    for reader in readers.get(variable, ()):
        name = reader.primitive.name
        if name in ("rsqrt", "sqrt"):
            return True
        alone = sum(not isinstance(atom, Literal) for atom in reader.invars) == 1
        if name in _RESHAPED and alone and _is_rooted(reader.outvars[0], readers):
            return True
    return False


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, Literal) and np.ndim(atom.val) == 0 and float(atom.val) == 0


def _bounded(eqn: Any) -> str | None:
    """The name in BOUNDS of a function of one array."""
    if eqn.primitive.name in BOUNDS:
        return eqn.primitive.name
    if eqn.primitive.name in _FUNCTIONS:
        body = next(iter(jaxprs_in_params(eqn.params)), None)
        if body is not None and len(body.eqns) == 1:
            return _bounded(body.eqns[0])
    return None


def _gates(reader: Any, eqn: Any) -> bool:
    """Whether what reads a bounded function makes something unbounded of it: x sigmoid(x), or x (1 + tanh(x))."""
    others = [atom for atom in reader.invars if atom is not eqn.outvars[0]]
    if reader.primitive.name in ("add", "sub"):
        return any(isinstance(atom, Literal) for atom in others)
    own = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
    return reader.primitive.name == "mul" and any(
        not isinstance(atom, Literal) and any(atom is one for one in own) for atom in others
    )
