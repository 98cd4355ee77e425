"""A name in a table, or the thing itself: the only place that says which names there are."""

from __future__ import annotations

from collections.abc import Mapping
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
