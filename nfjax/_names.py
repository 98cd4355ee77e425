"""A name in a table, or the thing itself: the only place that says which names there are."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lookup(what: str, name: Any, table: Mapping[str, Any], callables: bool = True) -> Any:
    """`table[name]`, or `name` itself if it is a callable and those are taken.

    Args:
        what: The name of the argument, for messages.
        name: That was given.
        table: What there is by name.
        callables: Whether a callable stands for itself.

    Raises:
        ValueError: It is neither; the message lists the names.
    """
    if callables and callable(name):
        return name
    try:
        if name in table:
            return table[name]
    except TypeError:  # a list, a dict: nothing that could be a name
        pass
    expected = "a callable or one of" if callables else "one of"
    raise ValueError(f"unknown {what} {name!r}: expected {expected} {', '.join(map(str, table))}")


def find(what: str, name: Any, table: Mapping[str, Any]) -> Any:
    """What a setting names: "package.module:function" is `imported`, all else is looked up in `table`.

    Args:
        what: The name of the setting, for messages.
        name: That was given.
        table: What there is by name.

    Raises:
        ValueError: There is neither.
    """
    if isinstance(name, str) and ":" in name:
        return imported(what, name)
    try:
        return lookup(what, name, table, callables=callable(name))
    except ValueError as error:
        raise ValueError(f"{error}; or package.module:function for one of your own") from None


def imported(what: str, name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names; the current folder is looked in first.

    Args:
        what: The name of the argument, for messages.
        name: That was given.

    Raises:
        ValueError: It has another form, or there is no such module or function; the message says what there is. An
            error that the module itself raises passes through.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and all(part.isidentifier() for part in (*module_name.split("."), attribute))):
        raise ValueError(f"{what}={name}: expected package.module:function, such as my_package.my_module:make_model")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{what}={name}: there is no module {error.name!r} here or among those installed"
            ) from None
        raise
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_")
            and (inspect.isfunction(value) or (inspect.isclass(value) and value.__module__ == module_name))
        ]
        raise ValueError(
            f"{what}={name}: {module_name} has no function {attribute!r}; it has {', '.join(known) or 'none'}"
        )
    return function
