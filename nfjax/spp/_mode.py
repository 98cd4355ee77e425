"""In which mode a network ran: what its norms normalized with, whether anything was dropped, what it could write."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_RATES = ("rate", "dropout_rate", "drop_rate", "drop_prob", "dropout_prob", "dropout")


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a network ran; modules by their path in it.

    Attributes:
        batch: Modules that keep statistics (batch norm and its kin) on which the output did not depend: they took the
            batch's.
        running: Those on whose statistics it did.
        initial: Those of `running` whose statistics are as they begin, means 0 and variances 1.
        dropout_on: Dropout and its kin that dropped; those with rate 0 are left out.
        dropout_off: Those that did not.
        random: The keys of random numbers on which the output depended, by stream or place.
        mutable: For Linen, the collections that the model could write, such as "none" or "all but params"; None for
            NNX.
        mutable_decides: Whether it was that which decided between batch and running statistics.
    """

    batch: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    dropout_on: tuple[str, ...] = ()
    dropout_off: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    mutable: str | None = None
    mutable_decides: bool = False

    def __str__(self) -> str:
        """One line; empty where the network has no mode: nothing that keeps statistics, nothing random."""
        parts = []
        if self.batch:
            parts.append(f"batch statistics in {_number(self.batch)}")
        if self.running:
            parts.append(f"running statistics in {_number(self.running)}{self._initial()}")
        if self.dropout_on:
            parts.append(f"dropout on in {len(self.dropout_on)}")
        if self.dropout_off:
            parts.append(f"dropout off{f' in {len(self.dropout_off)}' if self.dropout_on else ''}")
        if self.random and not self.dropout_on:
            parts.append("random numbers drawn")
        if parts and self.mutable is not None:
            parts.append(f"mutable: {self.mutable}{', which decides' if self.mutable_decides else ''}")
        return "; ".join(parts)

    def _initial(self) -> str:
        if not self.initial:
            return ""
        return ", still initial" if self.initial == self.running else f", {len(self.initial)} of them still initial"

    def merged(self, other: Mode) -> Mode:
        """Of the same network with other values: `initial` where either was."""
        either = {*self.initial, *other.initial}
        return dataclasses.replace(self, initial=tuple(path for path in self.running if path in either))

    def caveat(self) -> str | None:
        """What `untrained` says, in one text."""
        return None if (told := self.untrained()) is None else "{}. {}".format(told[0], f"T{told[1][1:]}")

    def untrained(self) -> tuple[str, str] | None:
        """(what a verdict leaves out, the way out) where norms ran on statistics that are still initial."""
        if not self.initial:
            return None
        if self.mutable is None:
            way = "call model.train() first, or pass use_running_average=False or the model's own flag for training"
        elif self.mutable_decides:
            way = 'pass mutable=["batch_stats"], which decides the mode of this model'
        else:
            way = "pass the model's own flag for training, such as train=True"
        what = (
            f"{len(self.initial)} of {_number((*self.batch, *self.running))} ran on running statistics that are still "
            "initial (mean 0, variance 1): they normalize nothing, and the verdict is about that mode"
        )
        return what, f"to measure the network as it trains, {way}; as it is used, load trained statistics"


def _number(paths: Sequence[str]) -> str:
    return f"{len(paths)} norm{'s' if len(paths) != 1 else ''}"


def dropping(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool | None:
    """Whether a call of a dropout-like module, one with a rate above zero and a flag `deterministic`, drops; None for
    any other module. As Flax decides it: the argument of the call goes before the module's attribute.
    """
    rates = [_attribute(module, name) for name in _RATES]
    if not any(isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0 for rate in rates):
        return None
    try:
        given = args if args and args[0] is module else (module, *args)
        bound = inspect.signature(type(module).__call__).bind(*given, **kwargs)
        argument = bound.arguments.get("deterministic")
    except (TypeError, ValueError):  # an error of the model's, which it raises itself
        argument = kwargs.get("deterministic")
    for flag in (argument, _attribute(module, "deterministic")):
        if isinstance(flag, bool | np.bool_):
            return not flag
    return None


def _attribute(module: Any, name: str) -> Any:
    """Without getattr, which sets up a Linen module that does not have it."""
    return vars(module).get(name, getattr(type(module), name, None))
