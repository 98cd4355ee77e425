"""A model's forward pass as a jaxpr in which the outputs of every module call are tagged.

A tag is an identity operation with a name, which survives whatever JAX transformation surrounds it: `remat`, `scan`,
`vmap`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name

from nfjax._calls import class_name, within
from nfjax._calls import recorder as _recorder
from nfjax._flax import Runnable, attempt, explained
from nfjax.spp._mode import dropping

_TAG = "nfjax.spp/"
# Each trace has a context of its own, part of the key of JAX's caches: a function that the model jits is traced anew,
# and its tagged trace is never served to anybody else.
_trace_context = jax.make_user_context(None)


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
    write, None for a model that is not Linen's. axes: the axis names that are to be bound where it runs.
    """

    jaxpr: Any
    calls: Sequence[Call]
    out_tree: Any
    mutable: Any
    axes: tuple[str, ...] = ()


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
        given = filter(_traced, jax.tree.leaves((args, kwargs), is_leaf=_opaque))
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
        # Unbound: the scope of a bound module holds traced values, which must not outlive their trace.
        module = context.module.clone(parent=None)
        return self.call(within(path), module, functools.partial(call, *args, **kwargs))


def _tagged(output: Any, index: int) -> tuple[Any, tuple[Any, ...], Any]:
    """The output of a call with its floating-point arrays tagged, then `Call.returned` and `Call.tree`."""
    places, tree = jax.tree_util.tree_flatten_with_path(output)
    leaves = [leaf for _, leaf in places]
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray) and _floating(leaf)]
    traced = list(filter(_traced, arrays))
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


def _traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.core.Tracer) and isinstance(leaf, jax.Array)


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _opaque(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Variable)


def trace(model: Runnable) -> Trace:
    """Traces the model, every module call tagged; nothing is computed."""
    traced, axes = attempt(model, _trace)
    return dataclasses.replace(traced, axes=axes)


def _trace(model: Runnable) -> Trace:
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


def tag(eqn: Any) -> Tag | None:
    """What this equation tags, if it is a tag."""
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    if not isinstance(name, str) or not name.startswith(_TAG):
        return None
    call, kind, number = re.split("([<>])", name.removeprefix(_TAG))
    return Tag(int(call), int(number), kind == "<")
