"""Any Flax model, NNX or Linen, with any call, as a function of arrays.

The user's model is left alone, and nothing is written on it. An NNX model is copied (split and merged) inside the
trace, and for the length of it the `__call__` of its modules' classes, and Linen's `intercept_methods`, tell the
recorder of each call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors as linen_errors
from flax import linen, nnx

from nfjax._calls import class_name, failures, join, linen_calls, nnx_calls, placed

T = TypeVar("T")


class _Absent:
    def __repr__(self) -> str:
        return "<not given>"


ABSENT: Any = _Absent()  # of an argument for which None is a value


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model with its inputs as a function of arrays.

    Attributes:
        function: `arrays -> output`.
        arrays: Parameters, other variables and inputs, a pytree.
        name: Of the model's class.
        network: What decides, together with the arrays' shapes, which function it is.
        modules: The user's own by path, where the function runs copies of them.
        untouched: The same function for a model that compares modules of its own with each other, to be had by
            `attempt`.
        writing: `mutable -> Runnable`, of a Linen model: the same with other mutable collections.
    """

    function: Callable[[Any], Any]
    arrays: Any
    name: str
    network: Any
    modules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    untouched: Callable[[Any], Any] | None = None
    writing: Callable[[Any], Runnable] | None = None


def runnable(
    model: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    variables: Mapping[str, Any] | None,
    rngs: Any,
    mutable: Any,
    key: Any,
    abstract: bool = False,
) -> Runnable:
    """The model called as `model(*inputs, **kwargs)`, NNX or Linen.

    Arrays anywhere in the inputs are arguments of the function; all else, flags, numbers and names, is part of it.

    Args:
        model: An `nnx.Module` or a Linen module.
        inputs: Of its call.
        kwargs: Likewise.
        variables: Of a Linen model; drawn from `key` if they are None.
        rngs: For an NNX model an argument like any other, None included where it takes one; `ABSENT` where none was
            given. For a Linen model those of its `apply`.
        mutable: Of a Linen model; None for all but the parameters if it writes any.
        key: Of a Linen model's parameters and random numbers.
        abstract: Nothing is computed or allocated; arrays may be `jax.ShapeDtypeStruct`, or tracers, and
            `Runnable.arrays` are the former.

    Raises:
        TypeError: It is no Flax model, the variables are none or stand in the wrong place, or, unless abstract, arrays
            have no values.
    """
    if not isinstance(model, nnx.Module | linen.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else class_name(model)
        raise TypeError(f"{given} is no Flax model: expected an nnx.Module or a linen.Module instance, not {given}")
    if isinstance(model, nnx.Module) and rngs is not ABSENT and (rngs is not None or _accepts_rngs(model)):
        kwargs = {**kwargs, "rngs": rngs}
    leaves, tree = jax.tree.flatten((tuple(inputs), dict(kwargs)))
    dynamic = [_is_array(leaf, abstract) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, dynamic, strict=True) if is_array]

    def arguments(arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = iter(arrays)
        return jax.tree.unflatten(
            tree, [next(given) if is_array else leaf for leaf, is_array in zip(leaves, dynamic, strict=True)]
        )

    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError("variables= belongs to Linen modules; an nnx.Module holds its own")
        return _nnx(model, arguments, arrays, key, abstract)
    rngs = None if rngs is ABSENT else rngs
    return _linen(model, inputs, arguments, arrays, variables, rngs, mutable, key, abstract)


def _accepts_rngs(model: nnx.Module) -> bool:
    parameters = inspect.signature(type(model).__call__).parameters.values()
    return any(parameter.name == "rngs" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _is_array(leaf: Any, abstract: bool) -> bool:
    if abstract and not isinstance(leaf, np.generic):
        return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _ready(arrays: Any, key: Any, name: str, abstract: bool) -> Any:
    """The arrays as the function takes them: without their values where only shapes matter, otherwise with."""
    if abstract:
        return jax.tree.map(shape_of, arrays)
    for leaf in jax.tree.leaves((arrays, key)):
        if isinstance(leaf, jax.core.Tracer):
            raise TypeError(
                f"{name} is measured inside a function that JAX transforms (jax.jit, jax.grad, jax.vmap, jax.lax.scan "
                "or their like in Flax), where arrays have no values yet: nfjax.spp compiles a pass of its own and "
                "reads its numbers, so call it outside"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name} or its input is abstract (a jax.ShapeDtypeStruct, {leaf.dtype}{list(leaf.shape)}, as "
                "jax.eval_shape and nnx.eval_shape give them): nfjax.spp needs arrays with values; nfjax.cost does not"
            )
    return arrays


def shape_of(leaf: Any) -> Any:
    """An array, or what describes one, without its values; anything else as it is."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=bool(getattr(leaf, "weak_type", False)))


# ---------------------------------------------------------------- NNX


def _nnx(
    model: nnx.Module, arguments: Callable[[Any], Any], arrays: Sequence[Any], key: Any, abstract: bool
) -> Runnable:
    graph, state = nnx.split(model)
    originals = {join(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}

    def function(tree: Any, carried: bool) -> Any:
        state, arrays = tree
        copy = nnx.merge(graph, state)
        modules = [(join(path), node) for path, node in nnx.iter_graph(copy) if isinstance(node, nnx.Module)]
        if carried:
            for path, node in modules:
                placed(node, path)
        args, kwargs = arguments(arrays)
        with nnx_calls(modules), linen_calls():
            return copy(*args, **kwargs)

    return Runnable(
        functools.partial(function, carried=True),
        _ready((state, list(arrays)), key, class_name(model), abstract),
        class_name(model),
        graph,
        originals,
        functools.partial(function, carried=False),
    )


# ---------------------------------------------------------------- Linen


def _linen(
    model: linen.Module,
    inputs: Sequence[Any],
    arguments: Callable[[Any], Any],
    arrays: Sequence[Any],
    variables: Mapping[str, Any] | None,
    rngs: Any,
    mutable: Any,
    key: Any,
    abstract: bool,
) -> Runnable:
    name, reader = class_name(model), "nfjax.cost" if abstract else "nfjax.spp"
    if model.scope is not None:
        model, bound = model.unbind()
        variables = bound if variables is None else variables
    if not isinstance(variables, Mapping | None):
        raise TypeError(
            f"variables= is of type {class_name(variables)}: expected the collections of {name}, "
            "variables={'params': ...}, as its init returns them"
        )
    if rngs is not None and not isinstance(rngs, Mapping):  # one key for all, as Linen takes it
        rngs = {"params": rngs}
    # Linen falls back on the "params" stream for any other that is missing: dropout and the like.
    rngs = {"params": key, **(rngs or {})}
    _, rngs, arrays = _ready((variables, rngs, list(arrays)), key, name, abstract)

    def initialize(rngs: Any, arrays: Any) -> Any:
        args, kwargs = arguments(arrays)
        with linen_calls():
            return model.init(rngs, *args, **kwargs)

    axes: tuple[str, ...] = ()
    if variables is None:
        run = jax.eval_shape if abstract else lambda function, *args: jax.jit(function)(*args)
        try:
            # Without jit, JAX's scan draws other parameters: those of the compiled network are meant.
            with jax.disable_jit(False), explained(name, reader):
                variables, axes = _with_axes(lambda axes: run(bind(initialize, axes), rngs, arrays))
        except Exception as error:
            if inputs and isinstance(inputs[0], Mapping) and isinstance(inputs[0].get("params"), Mapping):
                raise TypeError(
                    f"the first input of {name} is a mapping with 'params', like the variables of a Linen module: give "
                    "these by name, variables=..., and by position only what the model is called with"
                ) from error
            raise

    def function(tree: Any, mutable: Any) -> Any:
        variables, rngs, arrays = tree
        args, kwargs = arguments(arrays)
        try:
            with linen_calls():
                output = model.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
        except (linen_errors.ScopeParamNotFoundError, linen_errors.ScopeCollectionNotFound) as error:
            if "params" not in variables:
                error.add_note(
                    f"(variables= has {', '.join(map(repr, variables)) or 'nothing'}, and no 'params': nfjax takes all "
                    "collections of a Linen module, as its apply does, variables={'params': ...})"
                )
            raise
        return output if mutable is False else output[0]  # what it writes is dropped

    tree = _ready((variables, rngs, arrays), key, name, abstract)
    if mutable is None:

        def dry(tree: Any) -> None:  # whatever it returns need be no array
            function(tree, mutable=False)

        mutable = False
        try:
            with explained(name, reader):
                _with_axes(lambda axes: jax.eval_shape(bind(dry, axes), tree), axes)
        except linen_errors.ModifyScopeVariableError:  # batch norm in training mode writes its statistics
            mutable = linen.DenyList("params")

    def writing(mutable: Any) -> Runnable:
        called = functools.partial(function, mutable=mutable)
        return Runnable(called, tree, name, (model, repr(mutable)), writing=writing)

    return writing(mutable)


# ---------------------------------------------------------------- what a model asks for while it is traced


def attempt(model: Runnable, trace: Callable[[Runnable], T]) -> tuple[T, tuple[str, ...]]:
    """`trace(model)`, and the axis names that the model asks for, which are bound to size one there: whoever runs what
    was traced binds them again with `bind`.

    A model that cannot be traced so is tried once more without `placed`: it may compare the structures of modules of
    its own, as jax.tree.map does on several of them.
    """
    try:
        return _with_axes(lambda axes: inside(axes, lambda: trace(model)))
    except Exception:
        if model.untouched is None:
            raise
        plain = dataclasses.replace(model, function=model.untouched, untouched=None)
        with contextlib.suppress(Exception):  # the first error tells more
            return attempt(plain, trace)
        raise


def _with_axes(run: Callable[[tuple[str, ...]], T], axes: tuple[str, ...] = ()) -> tuple[T, tuple[str, ...]]:
    """`run(axes)`, with the axis names for which it asks."""
    while True:
        try:
            return run(axes), axes
        except NameError as error:
            found = re.search(r"unbound axis name: (.+?)(?:\. To fix this|$)", str(error))
            if found is None or found[1] in axes:
                raise
            axes = (*axes, found[1])


def bind(function: Callable[..., Any], axes: Sequence[str]) -> Callable[..., Any]:
    """A function of arrays with these axis names bound to size one, as if it ran on one device of many.

    Nothing gets another shape inside, and the collective operations (psum, all_gather, axis_index) vanish.
    """
    for axis in axes:
        function = _bind(function, axis)
    return function


def _bind(function: Callable[..., Any], axis: str) -> Callable[..., Any]:
    def bound(*args: Any) -> Any:
        try:
            out = jax.vmap(function, in_axes=None, axis_name=axis, axis_size=1)(*args)
        except NotImplementedError as error:  # of groups of devices, for one
            error.add_note(
                f"(the model names the axis {axis!r}, which nfjax binds to size one, as on one device: what it does "
                "with it needs several; give nfjax the model without axis_index_groups, or without axis_name)"
            )
            raise
        return jax.tree.map(lambda x: x[0], out)

    return bound


def inside(axes: Sequence[str], trace: Callable[[], T]) -> T:
    """`trace()`, which makes a jaxpr, where these axis names are bound to size one: they stay in the jaxpr."""
    made: list[T] = []

    def run(dummy: Any) -> Any:
        made.append(trace())
        return dummy

    bind(run, axes)(jnp.zeros(()))
    return made[-1]


@contextlib.contextmanager
def explained(name: str, reader: str = "nfjax.spp") -> Iterator[None]:
    """Notes with an error from inside the model where it was raised: in which model, and in which of its modules."""
    with failures() as found:
        try:
            yield
        except Exception as error:
            where = f", inside {found[-1][1]}" if found and found[-1][0] is error else ""
            error.add_note(
                f"(raised by the model {name} while {reader} traced it{where}; is its input what it expects?)"
            )
            raise
