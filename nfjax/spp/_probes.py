"""Products with the Jacobians of a model's blocks, as many as wished, in one pass through the model.

The tagged program of a model (`_tracing`) has, for every block, a tag of what it is given and one of what it returns;
between them stands the block. The program is evaluated again, and at each block's output what stands between its tags
is linearized, as a function of the block's input alone: all else that it reads is held fixed. Nothing behind a block
needs its linearization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from nfjax.spp import _flow, _tracing
from nfjax.spp._evaluation import bind_equation
from nfjax.spp._tracing import Call, Tag

_SHIFTS = 4096  # at how many places of the noise a block's vectors may begin


class Products(NamedTuple):
    """What products with the Jacobians of n blocks gave, float32.

    Attributes:
        gains: |J v| / |v| for each probe, [n, probes].
        diagonal: Of the bidiagonal matrix that Lanczos's method makes of J, [n, iterations].
        beside: The elements to the right of the diagonal, [n, iterations].
    """

    gains: jax.Array
    diagonal: jax.Array
    beside: jax.Array


def join(found: Sequence[Products]) -> Products:
    """One after the other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


class Noise(NamedTuple):
    """Random vectors for all blocks, drawn once: a generator for each block would take most of the time to compile.

    Attributes:
        signs: -1 or 1, int8 [probes, longest input + _SHIFTS].
        normal: From N(0, 1), float32 [longest input + _SHIFTS].
        shifts: Where in these each block's vectors begin, so that they are not alike, [blocks].
    """

    signs: jax.Array
    normal: jax.Array
    shifts: jax.Array


def draw(key: jax.Array, probes: int, longest: int, blocks: int) -> Noise:
    """longest: how many numbers the largest input of a block has."""
    signs, normal, shifts = jax.random.split(key, 3)
    return Noise(
        jax.random.rademacher(signs, (probes, longest + _SHIFTS), jnp.int8),
        jax.random.normal(normal, (longest + _SHIFTS,), jnp.float32),
        jax.random.randint(shifts, (blocks,), 0, _SHIFTS, jnp.int32),
    )


class Probes(NamedTuple):
    """Evaluates a jaxpr and measures its blocks on the way.

    Attributes:
        inputs: Of the blocks by output, both as tags.
        calls: Of the trace.
        iterations: Of Lanczos's method.
        signs: As in `Noise`.
        normal: Likewise.
    """

    inputs: Mapping[Tag, Tag]
    calls: Sequence[Call]
    iterations: int
    signs: jax.Array
    normal: jax.Array

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], shifts: jax.Array
    ) -> tuple[list[Any], list[Products]]:
        """The outputs, and the products of its blocks. shifts: theirs, in the order of `_flow.order`."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        entered: dict[Tag, int] = {}
        found: list[Products] = []

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for place, eqn in enumerate(jaxpr.eqns):
            name, given, tag = eqn.primitive.name, [read(atom) for atom in eqn.invars], _tracing.tag(eqn)
            runs = _flow.executions(eqn)
            needed = sum(count for one, count in runs.items() if one in self.inputs)
            own, shifts = shifts[:needed], shifts[needed:]
            if tag is not None:
                out = given
                if tag.entry:
                    entered[tag] = place
                elif tag in self.inputs:
                    call, start = self.calls[tag.call], entered.get(self.inputs[tag])
                    if start is None:
                        raise ValueError(
                            f"{call.what} cannot be cut out: what it is given and what it returns stand in different "
                            "parts of the traced program. Choose other blocks with where="
                        )
                    x = jaxpr.eqns[start].invars[0]
                    block = _between(jaxpr.eqns[start:place], x, eqn.invars[0], values)
                    found.append(self._measured(block, values[x], own[0], call))
            elif not needed:
                out = bind_equation(eqn, given)
            elif name == _flow.SCAN:
                out, inside = self._scan(eqn, given, own)
                found.append(inside)
            else:
                jaxprs = {_flow.REMATERIALIZED: "jaxpr", **_flow.INLINED}
                inner = eqn.params[jaxprs[name]]  # check_supported lets no other pass
                out, inside = self.evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), given, own)
                found += inside
            values.update(zip(eqn.outvars, out, strict=True))
        return [read(atom) for atom in jaxpr.outvars], found

    def _scan(self, eqn: Any, given: Sequence[Any], shifts: jax.Array) -> tuple[list[Any], Products]:
        """A loop over blocks stays one; each of its rounds is measured on its own."""
        params, body = eqn.params, eqn.params["jaxpr"]
        num_consts, num_carry = _flow.scan_layout(eqn)
        unstacked, rounds = num_consts + num_carry, params["length"]
        order = slice(None, None, -1 if params["reverse"] else 1)  # the first that runs may be the last in an array
        each = shifts.reshape(rounds, -1)[order]

        def step(carry: Any, stacked: Any) -> Any:
            own, *slices = stacked
            out, found = self.evaluate(body.jaxpr, body.consts, [*given[:num_consts], *carry, *slices], own)
            return out[:num_carry], (out[num_carry:], join(found))

        start, stacked = list(given[num_consts:unstacked]), [each, *given[unstacked:]]
        carry, (columns, found) = jax.lax.scan(step, start, stacked, length=rounds, reverse=params["reverse"])
        found = jax.tree.map(lambda x: x[order].reshape(-1, x.shape[-1]), found)
        return [*carry, *columns], found

    def _measured(self, block: Callable[[Any], Any], x: jax.Array, shift: jax.Array, call: Call) -> Products:
        errors: list[Exception] = []
        for linear in (_forward, _backward):
            try:
                return self._products(*linear(block, x), x, shift)
            except Exception as error:
                errors.append(error)
        raise ValueError(
            f"{call.what} cannot be differentiated ({str(errors[0]).strip()}); choose other blocks with where="
        ) from errors[0]

    def _products(
        self, y: jax.Array, push: Callable[[Any], Any], pull: Callable[[Any], Any], x: jax.Array, shift: jax.Array
    ) -> Products:
        """push: v -> J v. pull: u -> J^T u."""

        def own(noise: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(noise, shift, x.size).reshape(x.shape)

        def gain(_: None, signs: jax.Array) -> tuple[None, jax.Array]:
            return None, _norm(push(own(signs).astype(x.dtype))) / jnp.float32(math.sqrt(x.size))

        def iterate(carry: Any, _: None) -> Any:
            v, u, beside = carry
            u, diagonal = _unit(_scaled(push, v, x) - beside * u)
            v, beside = _unit(_scaled(pull, u, y) - diagonal * v)
            return (v, u, beside), (diagonal, beside)

        start, _ = _unit(own(self.normal))
        _, gains = jax.lax.scan(gain, None, self.signs)
        nothing = jnp.zeros(y.shape, jnp.float32), jnp.float32(0)
        _, (diagonal, beside) = jax.lax.scan(iterate, (start, *nothing), length=self.iterations)
        return Products(gains[None], diagonal[None], beside[None])


def _between(equations: Sequence[Any], x: Any, out: Any, values: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """`out` as a function of `x`, by these equations; whatever does not depend on x is as in `values`."""
    depends = {x}
    for eqn in equations:
        if depends.intersection(atom for atom in eqn.invars if not isinstance(atom, Literal)):
            depends.update(eqn.outvars)
    needed, kept = {out} if not isinstance(out, Literal) else set(), []
    for eqn in reversed(equations):
        if needed.intersection(eqn.outvars) and depends.intersection(eqn.outvars):
            needed.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
            kept.append(eqn)

    def block(given: jax.Array) -> jax.Array:
        own = {x: given}

        def read(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return atom.val
            return own[atom] if atom in own else values[atom]

        for eqn in reversed(kept):
            own.update(zip(eqn.outvars, bind_equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return jnp.asarray(read(out))

    return block


def _forward(block: Callable[[Any], Any], x: jax.Array) -> tuple[jax.Array, Callable[..., Any], Callable[..., Any]]:
    y, push = jax.linearize(block, x)
    if _runs(jax.make_jaxpr(push)(x).jaxpr, "custom_lin"):  # which JAX can transpose, but not compute
        raise TypeError("it has a rule for its gradient alone")
    transpose = jax.linear_transpose(push, x)
    return y, push, lambda u: transpose(u)[0]


def _backward(block: Callable[[Any], Any], x: jax.Array) -> tuple[jax.Array, Callable[..., Any], Callable[..., Any]]:
    """For what has a rule for the gradient alone (custom_vjp): J is then the transpose of J^T."""
    y, pull = jax.vjp(block, x)
    transpose = jax.linear_transpose(lambda u: pull(u)[0], y)
    return y, lambda v: transpose(v)[0], lambda u: pull(u)[0]


def _runs(jaxpr: Any, name: str) -> bool:
    inside = (inner for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))
    return any(eqn.primitive.name == name for eqn in jaxpr.eqns) or any(_runs(inner, name) for inner in inside)


def _scaled(product: Callable[[Any], Any], unit: jax.Array, like: jax.Array) -> jax.Array:
    """The product with a unit vector, float32; its components are brought to about 1, so that no dtype loses them."""
    root = jnp.float32(math.sqrt(max(like.size, 1)))
    return product((unit * root).astype(like.dtype)).astype(jnp.float32) / root


def _norm(x: jax.Array) -> jax.Array:
    """|x|, a float32 scalar, whose squares neither overflow nor vanish."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), initial=0.0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale)))


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x / |x|, zero for a zero, and |x|."""
    norm = _norm(x)
    return x / jnp.where(norm > 0, norm, 1.0), norm


def singular_values(products: Products) -> np.ndarray:
    """mean_square, mean_square_error, largest and last_growth, [4, n]; products: on the host, float64."""
    squares = np.square(products.gains)
    probes, iterations = squares.shape[1], products.diagonal.shape[1]
    unknown = np.full(len(squares), np.nan)
    error = squares.std(axis=1, ddof=1) / math.sqrt(probes) if probes > 1 else unknown
    largest, before = _largest(products, iterations), _largest(products, iterations - 1)
    # Never negative but for rounding. Zero stays zero.
    growth = np.maximum(largest - before, 0.0) / np.where(largest > 0, largest, 1.0)
    return np.stack([squares.mean(axis=1), error, largest, growth])


def _largest(products: Products, steps: int) -> np.ndarray:
    """That of the bidiagonal matrices after so many steps, [n]."""
    found = np.full(len(products.diagonal), np.nan)
    for i, (diagonal, beside) in enumerate(zip(products.diagonal, products.beside, strict=True)):
        matrix = np.zeros((steps, steps + 1))
        np.fill_diagonal(matrix, diagonal[:steps])
        np.fill_diagonal(matrix[:, 1:], beside[:steps])
        if steps and np.isfinite(matrix).all():
            found[i] = np.linalg.svd(matrix, compute_uv=False)[0]
    return found
