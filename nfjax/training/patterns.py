"""Parameters chosen by their paths, which are those of parameters.txt: "blocks/3/branch/convolutions/1/kernel".

A pattern is a path, or the beginning of one: "stem", "blocks/0". In each of its parts, * stands for any characters and
? for one; a part ** stands for any number of parts, as in "**/bias". Several are separated by commas.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

HEAD = "head"  # stands for what depends on the number of classes, whatever it is called; see `networks.head`
LISTED = 40  # paths in a message


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf, "blocks/3/alpha", from its keys in a pytree."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, in the order of the tree."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """The pytree of `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(path_of(keys), leaf), tree)


def held(frozen: Sequence[str], before: Any, after: Any) -> Any:
    """`after`, with the leaves whose paths match as they are in `before`, a pytree of the same structure."""
    if not frozen:
        return after
    return jax.tree_util.tree_map_with_path(
        lambda keys, old, new: old if matches(frozen, path_of(keys)) else new, before, after
    )


def matches(patterns: Iterable[str], path: str) -> bool:
    """Whether one of the patterns is the path, or the beginning of it."""
    return any(_compiled(pattern).fullmatch(path) for pattern in patterns)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    def of_part(part: str) -> str:
        return "".join({"*": "[^/]*", "?": "[^/]"}.get(letter, re.escape(letter)) for letter in part)

    parts = pattern.strip("/").split("/")
    found = "".join("(?:[^/]+/)*" if part == "**" else f"{of_part(part)}/" for part in parts)
    return re.compile(f"{found}.*" if parts[-1] == "**" else f"{found[:-1]}(?:/.*)?")


def parse(field: str, text: str | None) -> tuple[str, ...]:
    """The patterns in a text, separated by commas; none of None.

    Raises:
        ValueError: There is a text, and no pattern in it.
    """
    found = tuple(filter(None, (part.strip().strip("/") for part in (text or "").split(","))))
    if text is not None and not found:
        raise ValueError(f"{field}={text!r} has no pattern: expected some, such as --config.{field}='stem,blocks/0'")
    return found


def parse_factors(field: str, text: str | None) -> dict[str, float]:
    """{pattern: factor} of a text "head=10, blocks=1".

    Raises:
        ValueError: It has another form, or a factor that is no positive number.
    """
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        pattern, equals, number = (word.strip() for word in part.rpartition("="))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not (equals and pattern) or not 0 < factor < math.inf:
            raise ValueError(
                f"{field}={text!r} has {part!r}: expected pattern=factor, positive numbers, separated by commas, such "
                f"as --config.{field}='head=10,blocks=1'"
            )
        if pattern in found:
            raise ValueError(f"{field}={text!r} has {pattern!r} twice: expected each pattern once")
        found[pattern] = factor
    return found


def check(field: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Raises ValueError for a pattern that no path matches; the message lists what there is."""
    paths = list(paths)
    for pattern in patterns:
        if not any(matches((pattern,), path) for path in paths):
            raise ValueError(
                f"{field}: no parameter matches {pattern!r}: expected the path of one, or its beginning, with * and ? "
                f"for what varies and ** for any number of parts. There are {outline(paths)}"
            )


def outline(paths: Sequence[str]) -> str:
    """What a network consists of: "stem, blocks/0, blocks/1, classifier", and an example of a whole path."""
    found = list(dict.fromkeys(block_of(path) for path in paths))
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"{', '.join(found[:LISTED])}{more}; a whole path is {max(paths, key=len)}"


def block_of(path: str) -> str:
    """The part of the network in which a parameter lies: up to the first number, "blocks/3", else what the model itself
    calls it, "stem".
    """
    parts = (path.rpartition("/")[0] or path).split("/")
    return "/".join(parts[: next((i for i, part in enumerate(parts) if is_numbered(part)), 0) + 1])


def is_numbered(part: str) -> bool:
    """Whether a name ends in a number, as that of a module in a list does, and one that Linen has named."""
    return part[-1:].isdigit()


def with_head(patterns: Mapping[str, Any] | Iterable[str], head: Sequence[str], paths: Iterable[str]) -> dict[str, Any]:
    """The patterns, as keys of a dict, with those of the head's parameters in place of `HEAD`; where the network itself
    calls something so, nothing else is meant.
    """
    given = dict(patterns) if isinstance(patterns, Mapping) else dict.fromkeys(patterns)
    if HEAD not in given or any(matches((HEAD,), path) for path in paths):
        return given
    found: dict[str, Any] = {}
    for pattern, value in given.items():
        found |= dict.fromkeys(head, value) if pattern == HEAD else {pattern: value}
    return found
