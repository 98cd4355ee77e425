"""A few optimizer steps of one network on one batch: how large its activations are after each, and how far they moved.

The traced model is evaluated with the outputs of its blocks taken out as they are, since how far an activation moved is
known only where its first value is kept. One compiled program serves every step and every seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal

from nfjax import compilation
from nfjax._flax import Runnable, bind
from nfjax.spp import _losses, _measuring, _outputs, _variables
from nfjax.spp._evaluation import BLOCK, bind_equation, check_supported
from nfjax.spp._flow import INLINED, REMATERIALIZED, SCAN, executions, order, scan_layout
from nfjax.spp._losses import Loss
from nfjax.spp._measuring import Choice
from nfjax.spp._mode import Mode
from nfjax.spp._products import tag_products
from nfjax.spp._tracing import Tag, Trace, tag

LOSS = "loss"
_UNKNOWN = -1.0  # of a kernel that begins as zeros: a NaN would stop a program under JAX's debugging switch
_ROUNDS = 16  # of the power iteration: of a random kernel it finds 97 % of the norm or more, at every width alike

# ---------------------------------------------------------------- optimizers


class Optimizer(Protocol):
    """What turns gradients into updates, as optax has it."""

    def init(self, params: Any) -> Any:
        """The state to start with."""

    def update(self, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """(what is added to the parameters, the next state)."""


class Rule(NamedTuple):
    """An `Optimizer` of a learning rate of 1."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


def _descend(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    del params
    return jax.tree.map(jnp.negative, gradients), state


def _adam_init(params: Any) -> tuple[jax.Array, Any, Any]:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    return jnp.zeros((), jnp.float32), zeros, zeros


def _adam(gradients: Any, state: Any, params: Any, b1: float = 0.9, b2: float = 0.999) -> tuple[Any, Any]:
    """Kingma and Ba (2015), with their defaults, in float32."""
    del params
    step, first, second = state
    step = step + 1
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, gradients)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), second, gradients)

    def update(m: jax.Array, v: jax.Array) -> jax.Array:
        return -m / (1 - b1**step) / (jnp.sqrt(v / (1 - b2**step)) + 1e-8)

    return jax.tree.map(update, first, second), (step, first, second)


# name -> optimizer, and the learning rate that it has if none is given (those of mup's coordinate check).
OPTIMIZERS: dict[str, Rule] = {"sgd": Rule(lambda params: (), _descend), "adam": Rule(_adam_init, _adam)}
RATES: dict[str, float] = {"sgd": 0.1, "adam": 1e-3}

# ---------------------------------------------------------------- one network


@dataclasses.dataclass(frozen=True)
class Course:
    """The compiled steps of one network: they serve any parameters, inputs and keys of the same shapes.

    Attributes:
        paths: Of the blocks.
        kernels: Paths of the trained ones, in the order of their first use.
        parameters: Paths of all trained parameters, in the order in which their rates are given.
        mode: In which the network runs.
        program: What was compiled.
    """

    paths: tuple[str, ...]
    kernels: tuple[str, ...]
    parameters: tuple[str, ...]
    mode: Mode
    program: Any
    _places: Mapping[str, int]  # path of a trained parameter -> its place among the arrays
    _start: Any  # shapes of the activations
    _optimizer: Optimizer | None

    def run(self, arrays: Any, rates: Sequence[float], steps: int, key: jax.Array) -> dict[str, np.ndarray]:
        """Takes the steps.

        Args:
            arrays: Of a `Runnable`.
            rates: A factor of the update of each of `parameters`.
            steps: How many.
            key: Of what the loss draws.

        Returns:
            Each quantity as float64 [steps + 1, places], and the loss as [steps + 1, 1].
        """
        leaves, found = jax.tree.leaves(arrays), []
        factors = {path: np.float32(rate) for path, rate in zip(self.parameters, rates, strict=True)}
        with jax.disable_jit(False):  # a compiled program cannot be run without, and nobody's function is in it
            initial = {path: leaves[place] for path, place in self._places.items()}
            state = () if self._optimizer is None else jax.jit(self._optimizer.init)(initial)
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._start)
            for step in range(steps + 1):
                sizes, now, moved, state = self.program(leaves, state, initial, start, factors, key)
                start = start if step else now
                found.append(sizes)
                for path, place in self._places.items():
                    leaves[place] = moved[path]
        on_host = [{name: np.asarray(size, np.float64) for name, size in sizes.items()} for sizes in found]
        for name in ("activation_change", "output_change", "kernel_change"):
            on_host[0][name] = np.minimum(on_host[0][name], 0.0)  # from what is no start yet; the unknown stays so
        stacked = {name: np.stack([sizes[name] for sizes in on_host]) for name in on_host[0]}
        return {name: np.where(sizes == _UNKNOWN, np.nan, sizes) for name, sizes in stacked.items()}


def prepare(model: Runnable, choice: Choice, optimizer: Optimizer | None) -> Course:
    """Traces the model, selects its blocks and compiles a step; without an optimizer, one that only looks.

    Raises:
        ValueError: No block is selected or it is not clear which; one cannot be measured; there is nothing to train.
    """
    with jax.disable_jit(False):  # what is only traced shows nobody more without jit
        return _prepare(model, choice, optimizer)


def _prepare(model: Runnable, choice: Choice, optimizer: Optimizer | None) -> Course:
    traced, blocks, _ = _measuring.choose(model, choice)
    roles = _outputs.choose(traced, blocks, [], choice.output, choice.loss)
    check_supported(traced.jaxpr.jaxpr, traced.calls, roles)
    tags = {tagged for tagged, role in roles.items() if role == BLOCK}
    leaves, slots = jax.tree.leaves(model.arrays), _variables.slots(model.arrays)
    trained = [i for i, use in enumerate(_trained(model.arrays, slots)) if use and _floating(leaves[i])]
    if not trained:
        raise ValueError(
            f"{model.name} has no parameters that could be trained: expected floating-point nnx.Param variables, or "
            "Linen's 'params'"
        )
    names = _outputs.numbered([slots[i].name for i in trained])
    places = dict(zip(names, trained, strict=True))
    by_place = {place: path for path, place in places.items()}
    used = tag_products(traced, slots, leaves)[1] if optimizer is not None else []
    matrices = [by_place[kernel.leaf] for kernel in used if kernel.leaf in by_place]
    step = _step(traced, tags, places, matrices, choice.loss, optimizer)
    initial = {path: leaves[i] for path, i in places.items()}
    state = () if optimizer is None else jax.eval_shape(optimizer.init, initial)
    start = jax.eval_shape(bind(lambda leaves: _forward(traced, tags, leaves)[1:], traced.axes), leaves)
    factors, key = {path: np.float32(1) for path in names}, jax.random.key(0)
    lowered = jax.jit(bind(step, traced.axes), keep_unused=True).lower(leaves, state, initial, start, factors, key)
    mode = _variables.mode(traced, slots, model.arrays)
    return Course(
        paths=_outputs.numbered([traced.calls[one.call].path for one, _ in order(traced.jaxpr.jaxpr, roles)]),
        kernels=tuple(matrices),
        parameters=names,
        mode=dataclasses.replace(mode, initial=_variables.initial(mode, slots, leaves)),
        program=compilation.compile_once(lowered, placed=[str(getattr(leaf, "sharding", None)) for leaf in leaves]),
        _places=places,
        _start=start,
        _optimizer=optimizer,
    )


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _trained(arrays: Any, slots: Sequence[_variables.Slot]) -> list[bool]:
    """Whether a trainer would change each array: of NNX, only what is an `nnx.Param`."""
    found = []
    for leaf in jax.tree.leaves(arrays, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        number = len(jax.tree.leaves(leaf))
        kinds = [slot.kind == _variables.PARAMETER for slot in slots[len(found) : len(found) + number]]
        found += [isinstance(leaf, nnx.Param)] * number if isinstance(leaf, nnx.Variable) else kinds
    return found


def _step(
    traced: Trace,
    tags: set[Tag],
    places: Mapping[str, int],
    matrices: Sequence[str],
    loss: str | Loss,
    optimizer: Optimizer | None,
) -> Callable[..., Any]:
    """`leaves, state, initial, start, factors, key -> sizes, activations, parameters after the step, state`; without an
    optimizer there is no step.
    """

    def step(leaves: Any, state: Any, initial: Any, start: Any, factors: Any, key: jax.Array) -> Any:
        def value(trained: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
            given = list(leaves)
            for path, place in places.items():
                given[place] = trained[path]
            out, blocks, outputs = _forward(traced, tags, given)
            return _losses.apply(loss, out, key), (blocks, outputs)

        params = {path: jnp.asarray(leaves[place]) for path, place in places.items()}
        if optimizer is None:
            (loss_value, now), moved = value(params), params
        else:
            (loss_value, now), gradients = jax.value_and_grad(value, has_aux=True)(params)
            updates, state = optimizer.update(gradients, state, params)
            moved = {
                path: (x.astype(jnp.float32) + factors[path] * updates[path].astype(jnp.float32)).astype(x.dtype)
                for path, x in params.items()
            }
        (blocks, outputs), (first_blocks, first_outputs) = now, start
        sizes = {
            "activation": jnp.stack([_size([x]) for x in blocks]),
            "activation_change": jnp.stack([_size([x], [x0]) for x, x0 in zip(blocks, first_blocks, strict=True)]),
            "output": _size(outputs)[None],
            "output_change": _size(outputs, first_outputs)[None],
            "kernel_change": jnp.array([]),
            LOSS: loss_value.astype(jnp.float32)[None],
        }
        if matrices:
            sizes["kernel_change"] = _moved([params[path] for path in matrices], [initial[path] for path in matrices])
        return sizes, now, moved, state

    return step


def _size(values: Sequence[jax.Array], start: Sequence[jax.Array] | None = None) -> jax.Array:
    """The root mean square of what these arrays hold together, or of their difference to others."""
    values = [x.astype(jnp.float32) for x in values]
    if start is not None:
        values = [x - x0.astype(jnp.float32) for x, x0 in zip(values, start, strict=True)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in values]))
    # The squares of what is divided by it neither overflow nor vanish.
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    total = sum(jnp.sum(jnp.square(x / scale)) for x in values)
    return scale * jnp.sqrt(total / max(sum(x.size for x in values), 1))


def _moved(kernels: Sequence[jax.Array], initial: Sequence[jax.Array]) -> jax.Array:
    """The spectral norm of each kernel's change over that of the kernel at the start."""
    initial = [x.astype(jnp.float32) for x in initial]
    changes = [x.astype(jnp.float32) - x0 for x, x0 in zip(kernels, initial, strict=True)]
    norms = _spectral_norms([*changes, *initial])
    change, unit = norms[: len(changes)], norms[len(changes) :]
    return jnp.where(unit > 0, change / jnp.where(unit > 0, unit, 1.0), _UNKNOWN)


def _spectral_norms(kernels: Sequence[jax.Array]) -> jax.Array:
    """The largest singular values of kernels [..., C] as matrices of C columns, by power iteration, in one loop."""
    largest = [jnp.max(jnp.abs(x), initial=0.0) for x in kernels]
    scales = [jnp.where((top > 0) & jnp.isfinite(top), top, 1.0) for top in largest]
    matrices = [x.reshape(-1, x.shape[-1]) / scale for x, scale in zip(kernels, scales, strict=True)]

    def improve(_: Any, vectors: Sequence[jax.Array]) -> list[jax.Array]:
        vectors = [matrix.T @ (matrix @ vector) for matrix, vector in zip(matrices, vectors, strict=True)]
        return [vector / jnp.maximum(jnp.linalg.norm(vector), 1e-30) for vector in vectors]

    start = [jax.random.normal(jax.random.key(0), x.shape[-1:], jnp.float32) for x in matrices]
    vectors = jax.lax.fori_loop(0, _ROUNDS, improve, start)
    norms = [jnp.linalg.norm(matrix @ vector) for matrix, vector in zip(matrices, vectors, strict=True)]
    return jnp.stack([scale * norm for scale, norm in zip(scales, norms, strict=True)])


# ---------------------------------------------------------------- the blocks' outputs, as they are


def _forward(traced: Trace, tags: set[Tag], leaves: Sequence[Any]) -> tuple[Any, list[jax.Array], list[jax.Array]]:
    """The model's output, what its blocks returned, and the floating-point arrays of the output."""
    flat, blocks = _take(traced.jaxpr.jaxpr, traced.jaxpr.consts, leaves, tags)
    return jax.tree.unflatten(traced.out_tree, flat), blocks, [x for x in flat if _floating(x)]


def _take(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], tags: set[Tag]) -> tuple[list[Any], list[jax.Array]]:
    """The outputs of a jaxpr, and the tagged values on the way, in the order of `_flow.order`."""
    values: dict[Any, Any] = {}
    taken: list[jax.Array] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def inner(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        out, found = _take(jaxpr, consts, args, tags)
        taken.extend(found)
        return out

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        name, given, tagged = eqn.primitive.name, [read(x) for x in eqn.invars], tag(eqn)
        if tagged is not None:
            out = given
            taken += given if tagged in tags else []
        elif not tags & executions(eqn).keys():
            out = bind_equation(eqn, given)
        elif name in INLINED:
            closed = eqn.params[INLINED[name]]
            out = inner(closed.jaxpr, closed.consts, given)
        elif name == REMATERIALIZED:  # the values are kept here in any case
            out = inner(eqn.params["jaxpr"], (), given)
        elif name == SCAN:
            out = _unroll(eqn, given, inner)
        else:
            raise AssertionError(f"check_supported let {name} pass")
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars], taken


def _unroll(eqn: Any, given: Sequence[Any], inner: Callable[..., list[Any]]) -> list[Any]:
    """A loop over blocks, each round's value taken on its own."""
    params, body, (num_consts, num_carry) = eqn.params, eqn.params["jaxpr"], scan_layout(eqn)
    num_unstacked = num_consts + num_carry
    consts, carry, stacked = given[:num_consts], given[num_consts:num_unstacked], given[num_unstacked:]
    rounds, rows = range(params["length"]), []
    for i in reversed(rounds) if params["reverse"] else rounds:
        out = inner(body.jaxpr, body.consts, [*consts, *carry, *(x[i] for x in stacked)])
        carry = out[:num_carry]
        rows.append(out[num_carry:])
    if params["reverse"]:
        rows.reverse()
    return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]
