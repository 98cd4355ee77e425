"""Keyword arguments that are written as a text: "b2=0.95, sizes=(2, 2), act=silu"."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

_NAMES = {"none": None, "true": True, "false": False}


def parse(field: str, text: str) -> dict[str, Any]:
    """The keyword arguments in a text, {} of an empty one.

    Args:
        field: The setting that holds the text, for messages.
        text: "name=value, ..."; values are numbers, texts in quotes or bare names, none, true, false, and brackets of
            these.

    Raises:
        ValueError: The text is something else.
    """
    try:
        call = _call(f"f({text})")
        given = [(keyword.arg, _value(keyword.value)) for keyword in call.keywords]
    except (SyntaxError, ValueError, AttributeError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{field}={text!r}: expected name=value, separated by commas, such as --config.{field}='b1=0.9, b2=0.95'"
        ) from error
    names = [name for name, _ in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{field}={text!r} has {twice[0]!r} twice: expected each name once")
    return dict(given)


def call(field: str, function: Callable[..., Any], text: str, /, *args: Any, **settings: Any) -> Any:
    """`function(*args, **settings, **arguments)` with the arguments in a text, which win over `settings`.

    Raises:
        ValueError: The function takes no argument of such a name, or refuses its value; the message lists those it
            takes.
    """
    given = parse(field, text)
    taken = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    if unknown := [name for name in given if name not in taken and not anything]:
        known = ", ".join(list(taken)[len(args) :]) or "none"
        raise ValueError(f"{field} has {unknown[0]!r}, which {_name(function)} does not take: expected {known}")
    try:
        return function(*args, **(settings | given))
    except (TypeError, ValueError) as error:
        what = f"{field}={text!r}: {_name(function)} refuses it" if given else f"{_name(function)} cannot be called"
        raise ValueError(f"{what}: {error}") from error


def _name(function: Callable[..., Any]) -> str:
    return getattr(getattr(function, "func", function), "__name__", repr(function))  # of a partial, its function's


def _call(source: str) -> ast.Call:
    """The call of a function with keywords only that is all there is in a source, which has closed no bracket early."""
    call = ast.parse(source, mode="eval").body
    whole = isinstance(call.func, ast.Name) and ast.get_source_segment(source, call) == source
    if not whole or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(source)
    return call


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _NAMES.get(node.id.lower(), node.id)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(_value, node.elts))
    return ast.literal_eval(node)
