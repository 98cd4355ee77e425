"""A model's forward pass as a jaxpr in which the outputs of every module call are tagged.

The user's model is left alone. An NNX model is copied (split and merged) inside the trace, and for the length of it the
`__call__` of its modules' classes tags what it returns; Linen's `intercept_methods` does the same for a Linen module. A
tag is an identity operation with a name, which survives whatever JAX transformation surrounds it: `remat`, `scan`,
`vmap`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors as linen_errors
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name

from nfjax.spp.mode import dropping

_TAG = "nfjax.spp/"
# Each trace has a context of its own, part of the key of JAX's caches: a function that the model jits is traced anew,
# and its tagged trace is never served to anybody else.
_trace_context = jax.make_user_context(None)
_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


class Tag(NamedTuple):
    """What a tagged equation stands for: array number `number` among those that call `call` returns, or, with `entry`,
    among those that it is given.
    """

    call: int
    number: int
    entry: bool = False

    @property
    def name(self) -> str:
        return f"{_TAG}{self.call}{'<' if self.entry else '>'}{self.number}"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array in what a call returns. path: in the call's output, as JAX writes it, such as "[0]['x']"; empty for the
    output itself. number: of its tag, the same for an array that stands in several places; None for one that is not
    floating-point.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    number: int | None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.path or 'the output itself'} ({self.dtype} {list(self.shape)})"


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module. path: where the module stands in the model, joined by "/". parent: the call that it is part
    of, as an index into `Trace.calls`. dtype: of the first floating-point array that it returns, None if there is none.
    returned: the leaves of its output, each array as a `Leaf`; tree: their structure. dropping: `mode.dropping`.
    """

    path: str
    module: Any
    parent: int | None
    dtype: Any
    returned: Sequence[Any] = ()
    tree: Any = None
    dropping: bool | None = None

    @property
    def what(self) -> str:
        """For messages: class and path."""
        return f"{class_name(self.module)} {self.path!r}"

    @property
    def leaves(self) -> list[Leaf]:
        """The tagged arrays in what it returns, in order; one that stands in several places, more than once."""
        return [leaf for leaf in self.returned if isinstance(leaf, Leaf) and leaf.number is not None]


@dataclasses.dataclass(frozen=True)
class Trace:
    """jaxpr: of the flat arrays to the flat output. calls: the module calls; the tags of the jaxpr are indices into it.
    out_tree: the structure of the model's output. mutable: Linen's filter of the collections that the model could
    write, None for a model that is not Linen's.
    """

    jaxpr: Any
    calls: Sequence[Call]
    out_tree: Any
    mutable: Any


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


class Recorder:
    """Notes the module calls of one trace, and tags what they are given and what they return."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.modules = modules
        self.calls: list[Call] = []
        self.mutable: Any = None
        self._active: list[int] = []

    def call(self, path: str, module: Any, function: Callable[[], Any]) -> Any:
        """Runs `function`, a call of `module`; a functools.partial shows what is given to it."""
        index = len(self.calls)
        parent = self._active[-1] if self._active else None
        args, kwargs = getattr(function, "args", ()), getattr(function, "keywords", {})
        self.calls.append(Call(path, module, parent, None, dropping=dropping(module, args, kwargs)))
        given = [leaf for leaf in jax.tree.leaves((args, kwargs), is_leaf=_opaque) if isinstance(leaf, jax.core.Tracer)]
        for number, leaf in enumerate(filter(_floating, given)):
            # The module gets what it was given, and not the tagged one: it may compare or keep it.
            checkpoint_name(leaf, Tag(index, number, entry=True).name)
        self._active.append(index)
        try:
            output = function()
        finally:
            self._active.pop()
        output, returned, tree = _tagged(output, index)
        call = dataclasses.replace(self.calls[index], returned=returned, tree=tree)
        self.calls[index] = dataclasses.replace(call, dtype=call.leaves[0].dtype if call.leaves else None)
        return output

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        token = _recorder.set(self)
        try:
            with linen.intercept_methods(self._intercept):
                yield
        finally:
            _recorder.reset(token)

    def _intercept(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        scope = context.module.scope
        path = () if scope is None else context.module.path
        if scope is not None and not path and self.mutable is None:
            self.mutable = scope.mutable
        if context.method_name != "__call__" or not path or _recorder.get() is not self:
            return call(*args, **kwargs)
        return self.call("/".join(path), context.module, functools.partial(call, *args, **kwargs))


def _tagged(output: Any, index: int) -> tuple[Any, tuple[Any, ...], Any]:
    """The output of a call with its floating-point arrays tagged, then `Call.returned` and `Call.tree`."""
    places, tree = jax.tree_util.tree_flatten_with_path(output)
    leaves = [leaf for _, leaf in places]
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray) and _floating(leaf)]
    traced = [leaf for leaf in arrays if isinstance(leaf, jax.core.Tracer)]
    numbers: dict[int, int] = {}
    for leaf in traced or arrays:  # beside others, a constant stays what it is
        numbers.setdefault(id(leaf), len(numbers))
    tags: dict[int, jax.Array] = {}
    returned = []
    for i, (place, leaf) in enumerate(places):
        number = numbers.get(id(leaf))
        if number is not None:
            if number not in tags:
                tags[number] = checkpoint_name(leaf, Tag(index, number).name)
            leaves[i] = tags[number]
        if isinstance(leaf, jax.Array | np.ndarray):
            leaf = Leaf(jax.tree_util.keystr(place), np.shape(leaf), leaf.dtype, number)
        returned.append(leaf)
    return jax.tree.unflatten(tree, leaves), tuple(returned), tree


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _opaque(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Variable)


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
        recorder, call = _recorder.get(), functools.partial(function, self, *args, **kwargs)
        # Held in a closure or made during the call, a module has no path in the model.
        path = vars(self).get(_PATH, f"(outside)/{cls.__name__}")
        # A subclass that comes here by super() was noted already, as itself.
        if recorder is None or type(self) is not cls or not path:
            return call()
        return recorder.call(path, recorder.modules.get(path, self), call)

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


def trace(model: Runnable) -> Trace:
    """Traces the model once, every module call tagged; nothing is computed."""
    leaves, tree = jax.tree.flatten(model.arrays)

    def flat(*leaves: Any) -> Any:
        # Whatever is no array (a name, a number) has a place holder, so that the structure stays.
        return jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, jax.Array | np.ndarray) else jnp.zeros((0,)),
            model.function(jax.tree.unflatten(tree, leaves)),
        )

    recorder = Recorder(model.modules)
    with explained(model.name), recorder.recording(), _trace_context(recorder):
        jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    return Trace(jaxpr, tuple(recorder.calls), jax.tree.structure(out), recorder.mutable)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Notes with an error from inside the model where it was raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"(raised by the model {name} while nfjax.spp traced it; is its input what it expects?)")
        raise


def tag(eqn: Any) -> Tag | None:
    """What this equation tags, if it is a tag."""
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    if not isinstance(name, str) or not name.startswith(_TAG):
        return None
    call, kind, number = re.split("([<>])", name.removeprefix(_TAG))
    return Tag(int(call), int(number), kind == "<")


def class_name(module: Any) -> str:
    return type(module).__name__


def _join(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))
