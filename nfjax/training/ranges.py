"""What a single setting may be: its kind, which is that of its default, and the values of that kind that make sense.

Each module that reads settings says in a table `RANGES` what they may be, and in a function `check` what several of
them have to agree on; `checks` asks them all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nfjax import config as configs

LARGEST = float(np.finfo(np.float32).max)  # what settings become on the device
LAST_STEP = 2**31 - 1  # steps are counted in int32


@dataclasses.dataclass(frozen=True)
class Range:
    """The values of one field.

    Attributes:
        fits: Whether a number of the right kind may be used.
        wanted: The sentence that follows "name=value ".
        check: Instead of these, for what is more than a number: `(name, value)`, raises ValueError.
    """

    fits: Callable[[Any], bool] = lambda value: True
    wanted: str = "expected numbers"
    check: Callable[[str, Any], None] | None = None


def whole(least: int, most: int, wanted: str = "") -> Range:
    """Whole numbers from `least` to `most`."""
    return Range(lambda value: least <= value <= most, wanted or f"must be a whole number from {least} to {most}")


SHARE = Range(lambda value: 0 <= value <= 1, "must be a share, from 0 to 1")
UP_TO_ONE = Range(lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
INTERVAL = whole(1, LAST_STEP, f"must be positive, and at most {LAST_STEP}")


def check(config: Any, ranges: Mapping[str, Range]) -> None:
    """Raises ValueError that names the first field which is missing, of another kind, or out of its range."""
    known = configs.base()
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"the config is of type {type(config).__name__}: expected a ConfigDict, one of nfjax.config (`from nfjax "
            "import config as base; config = base.cifar()`) with what differs"
        )
    for name, default, kind in leaves(known):
        check_value(name, _read(config, name), default, kind, ranges.get(name))
    for name, _, _ in leaves(config):
        _read(known, name, "the config has a field that nothing reads")


def check_value(name: str, value: Any, default: Any, kind: type, span: Range | None = None) -> None:
    """Raises ValueError unless `value` may be given to the field `name`, whose kind, default and range these are."""
    if value is None:
        if default is not None:
            raise ValueError(f"{name}=None: expected a value, such as --config.{name}={default}")
        return
    if kind is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError(f"{name}={value!r}: expected numbers in brackets, such as --config.{name}='(0.5, 1.0)'")
        span.check(name, value)
    elif kind in (int, float):
        check_number(name, value, kind, span)
        if span is not None and not span.fits(value):  # model.depth is a name in a table
            raise ValueError(f"{_wanted(name, value, span)}{_such_as(name, default)}")
    elif not isinstance(value, kind):
        wanted = {bool: "true or false", str: "a text"}[kind]
        raise ValueError(f"{name}={value!r}: expected {wanted}{_such_as(name, default)}")
    elif value == "" and default != "":
        raise ValueError(f"{name}='' is empty: expected a name{_such_as(name, default)}")


def check_number(name: str, value: Any, kind: type, span: Range | None = None) -> None:
    """Raises ValueError unless `value` is a number of this kind, int or float, and finite in float32."""
    allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{name}={value!r}: expected a {'whole ' if kind is int else ''}number")
    if kind is float and not abs(value) <= LARGEST:  # nor what is no number at all
        raise ValueError(f"{_wanted(name, value, span)}, and finite (in float32)")


def check_numbers(name: str, values: Any) -> tuple[float, ...]:
    """The values as a tuple. Raises ValueError unless each of them is a finite number."""
    for value in values:
        check_number(name, value, float)
    return tuple(values)


def leaves(config: ConfigDict, above: str = "") -> Iterator[tuple[str, Any, type]]:
    """(name, value, kind) of every field; the kind is that of a placeholder where the value is None."""
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value, config.get_type(name)


def _wanted(name: str, value: Any, span: Range | None) -> str:
    wanted = (span or Range()).wanted
    return f"{name}={value}{':' if wanted.startswith('expected') else ''} {wanted}"


def _such_as(name: str, default: Any) -> str:
    return "" if default is None else f", such as --config.{name}={default}"


def _read(config: ConfigDict, name: str, otherwise: str = "the config lacks a field") -> Any:
    try:
        return functools.reduce(lambda node, part: node[part], name.split("."), config)
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            f"{otherwise}, {name}: a config file starts from one of nfjax.config, such as base.cifar(), and changes "
            "what differs"
        ) from None
