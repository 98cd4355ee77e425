"""The calls of a model's modules, seen from outside while it runs: which module, where in the model, and which failed.

A module's place is a static fact about it that has to survive whatever copies Flax and JAX make of it inside the model
(`nnx.remat`, `nnx.scan`, `nnx.clone`, `jax.checkpoint`): a copy is another object, of other arrays. No attribute is
added. What carries the place is the table by which Flax itself remembers which attributes of a module are data, and
which goes with every copy: for the length of a trace, the table of the traced copy also has the module's path.
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
from flax import linen, nnx
from flax.typing import HashableMapping

# What notes the module calls of this context, if anything does: it has `modules` and `call(path, module, function)`.
recorder: contextvars.ContextVar[Any] = contextvars.ContextVar("recorder", default=None)
_TABLE = "_pytree__nodes"


# ---------------------------------------------------------------- where a module stands


class _Placed(HashableMapping):
    """Flax's table of a module's attributes, with the module's path. Tables of two places differ, so that JAX serves no
    trace of one module to another.
    """

    def __init__(self, table: Mapping[str, bool], path: str) -> None:
        super().__init__(table)
        self.path = path

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Placed) and self.path == other.path and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((self.path, super().__hash__()))

    def update(self, other: Mapping[str, bool]) -> _Placed:
        return _Placed(super().update(other), self.path)


def placed(module: nnx.Module, path: str) -> None:
    """Lets the copies of a traced copy of a module know its path."""
    table = vars(module).get(_TABLE)
    if isinstance(table, HashableMapping):
        object.__setattr__(module, _TABLE, _Placed(table, path))


@dataclasses.dataclass
class _Run:
    """One run of a model. paths: of its modules, by identity. within: the path of the NNX module that is running."""

    paths: Mapping[int, str]
    within: str = ""

    def path(self, module: nnx.Module) -> str:
        if (path := self.paths.get(id(module))) is not None:
            return path
        table = vars(module).get(_TABLE)
        # Held in a closure or made during the call, a module has no path in the model.
        return table.path if isinstance(table, _Placed) else f"(outside)/{class_name(module)}"


_run: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("run", default=None)


def within(path: Sequence[str]) -> str:
    """The path of a Linen module in the whole model, which may be an NNX one with Linen modules inside
    (`nnx.bridge.ToNNX`).
    """
    run = _run.get()
    return join([run.within, *path] if run is not None and run.within else path)


# ---------------------------------------------------------------- NNX


_patching = threading.RLock()


@contextlib.contextmanager
def nnx_calls(modules: Sequence[tuple[str, nnx.Module]]) -> Iterator[None]:
    """Calls of modules of these classes are noted by the recorder of this context, if it has one, and errors located;
    as long as this lasts. modules: a model's own, with their paths.
    """
    token = _run.set(_Run({id(module): path for path, module in modules}))
    try:
        with _patched({type(module) for _, module in modules}):
            yield
    finally:
        _run.reset(token)


@contextlib.contextmanager
def _patched(classes: Iterable[type]) -> Iterator[None]:
    classes = [cls for cls in classes if any("__call__" in vars(base) for base in cls.__mro__)]
    with _patching:
        resolved = {cls: cls.__call__ for cls in classes}
        own = {cls: vars(cls).get("__call__") for cls in classes}
        changed = []
        try:
            for cls, call in resolved.items():
                cls.__call__ = _observed(cls, call)
                changed.append(cls)
            yield
        finally:
            for cls in changed:
                if own[cls] is None:
                    del cls.__call__  # it was inherited
                else:
                    cls.__call__ = own[cls]


def _observed(cls: type, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        run = _run.get()
        # Another thread may use the class meanwhile. A subclass that comes here by super() was noted already, as
        # itself.
        if run is None or type(self) is not cls or not (path := run.path(self)):
            return function(self, *args, **kwargs)
        noting, call = recorder.get(), functools.partial(function, self, *args, **kwargs)
        outer, run.within = run.within, path
        try:
            with _located(self, path, args, kwargs):
                return call() if noting is None else noting.call(path, noting.modules.get(path, self), call)
        finally:
            run.within = outer

    return __call__


# ---------------------------------------------------------------- Linen


def linen_calls() -> contextlib.AbstractContextManager[None]:
    """Errors from inside Linen modules are located, as long as this lasts."""
    return linen.intercept_methods(_intercept)


def _intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if module.scope is None or not module.path:
        return call(*args, **kwargs)
    with _located(module, within(module.path), args, kwargs):
        return call(*args, **kwargs)


# ---------------------------------------------------------------- errors

_failures: contextvars.ContextVar[list[tuple[Exception, str]] | None] = contextvars.ContextVar("failures", default=None)


@contextlib.contextmanager
def failures() -> Iterator[list[tuple[Exception, str]]]:
    """Of each error that leaves a module while this lasts, the innermost module that raised it, and with what it was
    called.
    """
    found: list[tuple[Exception, str]] = []
    token = _failures.set(found)
    try:
        yield found
    finally:
        _failures.reset(token)


@contextlib.contextmanager
def _located(module: Any, path: str, args: Any, kwargs: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found = _failures.get()
        if found is not None and not any(known is error for known, _ in found):
            given = ", ".join([*map(_shown, args), *(f"{name}={_shown(value)}" for name, value in kwargs.items())])
            found.append((error, f"{class_name(module)} {path!r} called with ({given})"))
        raise


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list | dict):
        arrays = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
        return f"{class_name(value)} of {', '.join(map(_shown, arrays[:4]))}{', ...' if len(arrays) > 4 else ''}"
    return class_name(value)


def class_name(module: Any) -> str:
    return type(module).__name__


def join(path: Iterable[Any]) -> str:
    return "/".join(map(str, path))
