"""A name in a table, or the thing itself."""

from typing import Any


def lookup(what: str, name: Any, table: dict[str, Any]) -> Any:
    """`table[name]`, or `name` itself if it is a callable; ValueError with the known names otherwise."""
    if callable(name):
        return name
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}: expected a callable or one of {', '.join(table)}")
