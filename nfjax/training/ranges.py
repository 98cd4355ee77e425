"""What each single setting may be: its kind, and the values of that kind with which a run can work.

`assembly.check` asks this first; what several settings have to agree on stands there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nfjax import config as base

LARGEST = float(np.finfo(np.float32).max)  # what settings become on the device
LAST_STEP = 2**31 - 1  # steps are counted in int32


@dataclasses.dataclass(frozen=True)
class Range:
    """fits: whether a value of the right kind may be used. wanted: the sentence that follows "name=value "."""

    fits: Callable[[Any], bool]
    wanted: str


def _whole(least: int, most: int, wanted: str = "") -> Range:
    return Range(lambda value: least <= value <= most, wanted or f"must be a whole number from {least} to {most}")


_SHARE = Range(lambda value: 0 <= value <= 1, "must be a share, from 0 to 1")
_MIXING = Range(lambda value: value >= 0, "expected 0, for no mixing, or a positive number")
_CLIPPING = Range(lambda value: np.float32(value) > 0, "must be positive, or none for no clipping")
_UP_TO_ONE = Range(lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
_INTERVAL = _whole(1, LAST_STEP, f"must be positive, and at most {LAST_STEP}")

RANGES: dict[str, Range] = {
    "seed": _whole(0, 2**32 - 1, f"must be from 0 to {2**32 - 1}"),
    "batch_size": _whole(1, 2**24, "must be positive, and at most 16777216 images"),
    "epochs": _whole(1, 10**6, "must be positive, and at most 1000000"),
    "model.width": _whole(1, 2**16, "must be a positive integer, and at most 65536 channels"),
    "data.share": Range(lambda value: 0 < value <= 1, "must be more than 0, and at most 1 for all images"),
    "data.image_size": _whole(1, 2**14, "must be a positive number of pixels, at most 16384"),
    "data.resize": _whole(1, 2**14, "must be a positive number of pixels, at most 16384, or none for data.image_size"),
    "data.workers": _whole(1, 4096, "must be at least 1, and at most 4096; none for one a core"),
    "data.ahead": _whole(1, 10**6, "must be at least 1, and at most 1000000 batches"),
    "data.max_skipped": _SHARE,
    "augment.crop_padding": _whole(0, 2**14, "must be 0 or more pixels, for no crop or for a crop"),
    "augment.rand_operations": _whole(0, 32, "must be 0 (for none) or more, and at most 32"),
    "augment.rand_magnitude": _whole(0, 30),
    "augment.rand_fill": _whole(0, 255),
    "augment.erasing_probability": Range(lambda value: 0 <= value <= 1, "must be a probability, from 0 to 1"),
    "augment.mixup_alpha": _MIXING,
    "augment.cutmix_alpha": _MIXING,
    "optim.learning_rate": Range(lambda value: np.float32(value) > 0, "must be positive"),
    "optim.reference_batch_size": _whole(1, 2**24, "must be positive, or none for no scaling"),
    "optim.warmup_epochs": Range(lambda value: value >= 0, "must be 0 or more"),
    "optim.momentum": _UP_TO_ONE,
    "optim.weight_decay": Range(lambda value: value >= 0, "must be 0 (for none) or more"),
    "optim.clip_norm": _CLIPPING,
    "optim.adaptive_clip": _CLIPPING,
    "optim.label_smoothing": _UP_TO_ONE,
    "steps_per_dispatch": _whole(1, LAST_STEP, "must be positive"),
    "train.accumulate_steps": _whole(1, 2**24, "must be positive"),
    "train.state_shards": _whole(1, 2**24, "must be positive"),
    "log.every_steps": _INTERVAL,
    "log.signal_every_steps": _INTERVAL,
    "checkpoint.every_epochs": _INTERVAL,
    "checkpoint.every_steps": _INTERVAL,
    "checkpoint.keep": _INTERVAL,
}
PAIRS = ("augment.resized_crop_scale", "augment.resized_crop_ratio")
COLOURS = ("data.mean", "data.std")
STAGES = "model.stage_sizes"
MOST_BLOCKS = 2048  # of a network, with which tracing still takes minutes only


def check(config: Any) -> None:
    """ValueError that names the first field which is missing, of another kind, or out of its range."""
    known = base.base()
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"the config is of type {type(config).__name__}: expected a ConfigDict, one of nfjax.config (`from nfjax "
            "import config as base; config = base.cifar()`) with what differs"
        )
    for name, default, kind in _leaves(known):
        check_value(name, _read(config, name), default, kind)
    for name, _, _ in _leaves(config):
        _read(known, name, "the config has a field that nothing reads")


def check_value(name: str, value: Any, default: Any, kind: type) -> None:
    """ValueError unless `value` may be given to the field `name`, whose kind and default these are."""
    if value is None:
        if default is not None:
            raise ValueError(f"{name}=None: expected a value, such as --config.{name}={default}")
        return
    if kind is tuple:
        _check_tuple(name, value)
    elif kind in (int, float):
        _check_number(name, value, kind)
        span = RANGES.get(name)  # model.depth is a name in a table
        if span is not None and not span.fits(value):
            raise ValueError(f"{_wanted(name, value)}{_such_as(name, default)}")
    elif not isinstance(value, kind):
        wanted = {bool: "true or false", str: "a text"}[kind]
        raise ValueError(f"{name}={value!r}: expected {wanted}{_such_as(name, default)}")
    elif value == "" and default != "":
        raise ValueError(f"{name}='' is empty: expected a name{_such_as(name, default)}")


def _check_number(name: str, value: Any, kind: type) -> None:
    allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{name}={value!r}: expected a {'whole ' if kind is int else ''}number")
    if kind is float and not abs(value) <= LARGEST:  # nor what is no number at all
        raise ValueError(f"{_wanted(name, value)}, and finite (in float32)")


def _check_tuple(name: str, values: Any) -> None:
    if not isinstance(values, tuple | list):
        raise ValueError(f"{name}={values!r}: expected numbers in brackets, such as --config.{name}='(0.5, 1.0)'")
    if name == STAGES:
        _check_stages(values)
        return
    if name in PAIRS and len(values) != 2:
        raise ValueError(
            f"{name}={tuple(values)}: expected the smallest and the largest, such as --config.{name}='(0.5, 1.0)'"
        )
    if name in COLOURS and len(values) != 3:
        raise ValueError(
            f"{name}={tuple(values)}: expected three numbers, for red, green and blue, such as "
            f"--config.{name}='(0.5, 0.5, 0.5)'"
        )
    for value in values:
        _check_number(name, value, float)
    values = tuple(values)
    if name in PAIRS:
        share = name == PAIRS[0]
        if not 0 < values[0] <= values[1] or (share and values[1] > 1):
            wanted = "0 < low <= high" + (" <= 1, shares of the area" if share else ", width / height")
            raise ValueError(f"{name}={values}: expected {wanted}")
        return
    if name == COLOURS[1] and min(np.float32(values)) <= 0:
        raise ValueError(f"{name}={values}: expected three positive numbers")
    if min(values) < 0 or max(values) > 1:
        scaled = ", ".join(f"{value / 255:.4f}" for value in values)
        hint = f"; on the scale from 0 to 255? divided by it: --config.{name}='({scaled})'" if max(values) > 1 else ""
        raise ValueError(f"{name}={values}: expected three numbers of pixels in [0, 1]{hint}")


def _check_stages(values: Any) -> None:
    for value in values:
        _check_number(STAGES, value, int)
    if not values or min(values) < 1 or sum(values) > MOST_BLOCKS or len(values) > 8:
        raise ValueError(
            f"{STAGES}={tuple(values)}: expected the blocks of one to eight stages, {MOST_BLOCKS} in all at most, such "
            f"as --config.{STAGES}='(2, 2, 2)'"
        )


def _wanted(name: str, value: Any) -> str:
    wanted = RANGES[name].wanted if name in RANGES else "expected numbers"
    return f"{name}={value}{':' if wanted.startswith('expected') else ''} {wanted}"


def _such_as(name: str, default: Any) -> str:
    return "" if default is None else f", such as --config.{name}={default}"


def _leaves(config: ConfigDict, above: str = "") -> Iterator[tuple[str, Any, type]]:
    """(name, value, kind) of every field; the kind is that of a placeholder where the value is None."""
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value, config.get_type(name)


def _read(config: ConfigDict, name: str, otherwise: str = "the config lacks a field") -> Any:
    try:
        return functools.reduce(lambda node, part: node[part], name.split("."), config)
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            f"{otherwise}, {name}: a config file starts from one of nfjax.config, such as base.cifar(), and changes "
            "what differs"
        ) from None
