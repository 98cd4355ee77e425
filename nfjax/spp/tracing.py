"""A model's forward pass as a jaxpr in which the output of every module call is tagged.

A tag is an identity operation with a name, which survives whatever JAX transformation surrounds it: `remat`, `scan`,
`vmap`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.ad_checkpoint import checkpoint_name

from nfjax._calls import class_name, within
from nfjax._calls import recorder as _recorder
from nfjax._flax import Runnable, attempt, explained
from nfjax._flax import runnable as runnable

_TAG = "nfjax.spp/"
# Each trace has a context of its own, part of the key of JAX's caches: a function that the model jits is traced anew,
# and its tagged trace is never served to anybody else.
_trace_context = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module. path: where the module stands in the model, joined by "/". parent: the call that it is part
    of, as an index into `Trace.calls`. dtype: of the output that is measured, None if none is a floating-point array.
    """

    path: str
    module: Any
    parent: int | None
    dtype: Any

    @property
    def what(self) -> str:
        """For messages: class and path."""
        return f"{class_name(self.module)} {self.path!r}"


@dataclasses.dataclass(frozen=True)
class Trace:
    """jaxpr: of the flat arrays to the flat output. calls: the module calls; the tags of the jaxpr are indices into it.
    out_tree: the structure of the model's output. axes: the axis names that are to be bound where it runs.
    """

    jaxpr: Any
    calls: Sequence[Call]
    out_tree: Any
    axes: tuple[str, ...] = ()


class Recorder:
    """Notes the module calls of one trace, and tags their outputs."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.modules = modules
        self.calls: list[Call] = []
        self._active: list[int] = []

    def call(self, path: str, module: Any, function: Callable[[], Any]) -> Any:
        index = len(self.calls)
        parent = self._active[-1] if self._active else None
        self.calls.append(Call(path, module, parent, None))
        self._active.append(index)
        try:
            output = function()
        finally:
            self._active.pop()
        leaves, tree = jax.tree.flatten(output)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating):
                leaves[i] = checkpoint_name(leaf, f"{_TAG}{index}")
                self.calls[index] = dataclasses.replace(self.calls[index], dtype=leaf.dtype)
                break
        return jax.tree.unflatten(tree, leaves)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        token = _recorder.set(self)
        try:
            with linen.intercept_methods(self._intercept):
                yield
        finally:
            _recorder.reset(token)

    def _intercept(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path = () if context.module.scope is None else context.module.path
        if context.method_name != "__call__" or not path or _recorder.get() is not self:
            return call(*args, **kwargs)
        return self.call(within(path), context.module, lambda: call(*args, **kwargs))


def trace(model: Runnable) -> Trace:
    """Traces the model, every module call tagged; nothing is computed."""
    traced, axes = attempt(model, _trace)
    return dataclasses.replace(traced, axes=axes)


def _trace(model: Runnable) -> Trace:
    leaves, tree = jax.tree.flatten(model.arrays)
    out_tree = None

    def flat(*leaves: Any) -> Any:
        nonlocal out_tree
        # Whatever is no array (a name, a number) has a place holder, so that the structure stays.
        output, out_tree = jax.tree.flatten(model.function(jax.tree.unflatten(tree, leaves)))
        return [leaf if isinstance(leaf, jax.Array | np.ndarray) else jnp.zeros((0,)) for leaf in output]

    recorder = Recorder(model.modules)
    with explained(model.name), recorder.recording(), _trace_context(recorder):
        jaxpr = jax.make_jaxpr(flat)(*leaves)
    return Trace(jaxpr, tuple(recorder.calls), out_tree)


def tag(eqn: Any) -> int | None:
    """The index of the call whose output this equation tags."""
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    return int(name.removeprefix(_TAG)) if isinstance(name, str) and name.startswith(_TAG) else None
