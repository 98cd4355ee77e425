"""Any Flax model, NNX or Linen, with any call, as a function of arrays.

The user's model is left alone. An NNX model is copied (split and merged) inside the trace, and for the length of it the
`__call__` of its modules' classes tells the recorder of each call.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import errors as linen_errors
from flax import linen, nnx

# What notes the module calls of this context, if anything does: it has `modules` and `call(path, module, function)`.
recorder: contextvars.ContextVar[Any] = contextvars.ContextVar("recorder", default=None)


@dataclasses.dataclass(frozen=True)
class Runnable:
    """A model with its inputs as a function of arrays. arrays: parameters, other variables and inputs, a pytree.
    function: `arrays -> output`. network: what decides, together with the arrays' shapes, which function it is.
    modules: the user's own by path, where the function runs copies of them.
    """

    function: Callable[[Any], Any]
    arrays: Any
    name: str
    network: Any
    modules: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def runnable(
    model: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    variables: Mapping[str, Any] | None,
    rngs: Any,
    mutable: Any,
    key: jax.Array,
) -> Runnable:
    """The model called as `model(*inputs, **kwargs)`, NNX or Linen; for Linen with its variables, by default drawn from
    `key`.
    """
    if isinstance(model, nnx.Module) and rngs is not None:
        kwargs, rngs = {**kwargs, "rngs": rngs}, None  # an argument like any other
    leaves, tree = jax.tree.flatten((tuple(inputs), dict(kwargs)))
    dynamic = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, dynamic, strict=True) if is_array]

    def arguments(arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = iter(arrays)
        return jax.tree.unflatten(
            tree, [next(given) if is_array else leaf for leaf, is_array in zip(leaves, dynamic, strict=True)]
        )

    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError("variables= belongs to Linen modules; an nnx.Module holds its own")
        return _nnx(model, arguments, arrays)
    if isinstance(model, linen.Module):
        return _linen(model, arguments, arrays, variables, rngs, mutable, key)
    given = f"the class {model.__name__}" if isinstance(model, type) else class_name(model)
    raise TypeError(f"expected a Flax model, an nnx.Module or a linen.Module instance, not {given}")


def _nnx(model: nnx.Module, arguments: Callable[[Any], Any], arrays: Sequence[Any]) -> Runnable:
    graph, state = nnx.split(model)
    originals = {_join(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}

    def function(tree: Any) -> Any:
        state, arrays = tree
        copy = nnx.merge(graph, state)
        modules = [(path, node) for path, node in nnx.iter_graph(copy) if isinstance(node, nnx.Module)]
        for path, node in modules:
            # A static attribute of the copy: it survives the splits and merges of nnx.remat, nnx.scan and the like.
            object.__setattr__(node, _PATH, _join(path))
        args, kwargs = arguments(arrays)
        with _recorded({type(node) for _, node in modules}):
            return copy(*args, **kwargs)

    return Runnable(function, (state, list(arrays)), class_name(model), graph, originals)


_PATH = "_spp_path"
_patching = threading.RLock()


@contextlib.contextmanager
def _recorded(classes: Iterable[type]) -> Iterator[None]:
    """Calls of these classes' instances are noted by the recorder of this context, if it has one; as long as this
    lasts.
    """
    classes = [cls for cls in classes if any("__call__" in vars(base) for base in cls.__mro__)]
    with _patching:
        resolved = {cls: cls.__call__ for cls in classes}
        own = {cls: vars(cls).get("__call__") for cls in classes}
        try:
            for cls, call in resolved.items():
                cls.__call__ = _recording(cls, call)
            yield
        finally:
            for cls, call in own.items():
                if call is None:
                    del cls.__call__  # it was inherited
                else:
                    cls.__call__ = call


def _recording(cls: type, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        noting, call = recorder.get(), functools.partial(function, self, *args, **kwargs)
        # Held in a closure or made during the call, a module has no path in the model.
        path = vars(self).get(_PATH, f"(outside)/{cls.__name__}")
        # A subclass that comes here by super() was noted already, as itself.
        if noting is None or type(self) is not cls or not path:
            return call()
        return noting.call(path, noting.modules.get(path, self), call)

    return __call__


def _linen(
    model: linen.Module,
    arguments: Callable[[Any], Any],
    arrays: Sequence[Any],
    variables: Mapping[str, Any] | None,
    rngs: Any,
    mutable: Any,
    key: jax.Array,
) -> Runnable:
    if model.scope is not None:
        model, bound = model.unbind()
        variables = bound if variables is None else variables
    # Linen falls back on the "params" stream for any other that is missing: dropout and the like.
    rngs = {"params": key, **(rngs or {})}

    def initialize(arrays: Any) -> Any:
        args, kwargs = arguments(arrays)
        return model.init(rngs, *args, **kwargs)

    if variables is None:
        with explained(class_name(model)):
            variables = jax.jit(initialize)(list(arrays))

    def function(tree: Any, mutable: Any) -> Any:
        variables, rngs, arrays = tree
        args, kwargs = arguments(arrays)
        output = model.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
        return output if mutable is False else output[0]  # what it writes is dropped

    tree = (variables, rngs, list(arrays))
    if mutable is None:
        mutable = False
        try:
            with explained(class_name(model)):
                jax.eval_shape(functools.partial(function, mutable=False), tree)
        except linen_errors.ModifyScopeVariableError:  # batch norm in training mode writes its statistics
            mutable = linen.DenyList("params")
    return Runnable(functools.partial(function, mutable=mutable), tree, class_name(model), (model, repr(mutable)))


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Notes with an error from inside the model where it was raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"(raised by the model {name} while nfjax.spp traced it; is its input what it expects?)")
        raise


def class_name(module: Any) -> str:
    return type(module).__name__


def _join(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))
