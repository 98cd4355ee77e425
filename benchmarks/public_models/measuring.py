"""One model: its signal as it is, after `rescale.lsuv`, after `rescale.balance`, and after AnyInit."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from benchmarks.public_models.networks import Example, Network
from nfjax import rescale, spp
from nfjax._flax import ABSENT, runnable
from nfjax.rescale import _models
from nfjax.spp import _measuring

Record = dict[str, Any]
LONGEST = 600  # characters of an error


@dataclasses.dataclass(frozen=True)
class Called:
    """A model with its call, and with parameters.

    Attributes:
        example: Of which `model` is the NNX module with these parameters.
        variables: Of a Linen model, None for NNX.
    """

    example: Example
    variables: Mapping[str, Any] | None

    @property
    def options(self) -> dict[str, Any]:
        """What nfjax's functions are given beside the model and its inputs."""
        given = dict(self.example.options)
        if self.variables is not None:
            given["variables"] = self.variables
        if self.example.mutable is not None:
            given["mutable"] = self.example.mutable
        return given

    def changed(self, found: Any) -> Called:
        """The same with what `rescale` gave back."""
        if self.variables is None:
            return Called(dataclasses.replace(self.example, model=found), None)
        return Called(self.example, found)


def measure(name: str, network: Network) -> Record:
    """The record of a model.

    Raises:
        ImportError: Its package is not there.
    """
    example = network.make()
    is_nnx = isinstance(example.model, nnx.Module)
    record: Record = {
        "model": name,
        "repository": network.repository,
        "class": type(example.model).__name__,
        "api": "NNX" if is_nnx else "Linen",
    }
    try:
        called = Called(example, None if is_nnx else _initialize(example))
        record["parameters"] = _count(called)
        record["blocks"], where = _blocks(called)
    except Exception as error:
        return record | {"error": _told(error)}
    # Compiled once for all sides.
    monitor = spp.Monitor(*example.inputs, where=where, mutable=example.mutable, **example.options)
    passes = _models.open_passes(_runnable(called))

    def side(run: Callable[[Callable[[Any], None]], Called]) -> Record:
        reports: list[Any] = []
        begin = time.process_time()
        try:
            found = run(reports.append)
            seconds = time.process_time() - begin
            profile = monitor(found.example.model, found.variables)
            kernels = passes.with_arrays(_runnable(found).arrays).products(np.ones(len(passes.units)))
        except Exception as error:
            return {"error": _told(error)}
        return _summaries(profile, kernels) | {"seconds": round(seconds, 2)} | (reports[0] if reports else {})

    sides = {
        "as it is": lambda read: called,
        "lsuv": lambda read: _rescale(called, rescale.lsuv, read),
        "balance": lambda read: _rescale(called, functools.partial(rescale.balance, where=where), read),
        "balance, shares held": lambda read: _rescale(
            called, functools.partial(rescale.balance, where=where, hold_shares=True), read
        ),
        "AnyInit": lambda read: _anyinit(called, read),
    }
    found = {"as it is": side(sides.pop("as it is"))}
    if "error" in found["as it is"]:
        return record | found["as it is"]
    return record | {"sides": found | {name: side(run) for name, run in sides.items()}}


def _rescale(called: Called, method: Callable[..., Any], read: Callable[[Any], None]) -> Called:
    example = called.example
    return called.changed(
        method(example.model, *example.inputs, report=lambda one: read(_unreached(one)), **called.options)
    )


def _runnable(called: Called, abstract: bool = False) -> Any:
    example, key = called.example, jax.random.key(0)
    options, mutable = example.options, example.mutable
    return runnable(example.model, example.inputs, options, called.variables, ABSENT, mutable, key, abstract)


def _initialize(example: Example) -> Any:
    """The variables of a Linen model, in which every array is a plain one."""
    made = runnable(example.model, example.inputs, example.options, None, ABSENT, example.mutable, jax.random.key(0))
    return linen.meta.unbox(dict(made.arrays[0]))


def _count(called: Called) -> int:
    tree = nnx.state(called.example.model, nnx.Param) if called.variables is None else called.variables["params"]
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def find_blocks(network: Network) -> str:
    """What is measured of a model by default, or why nothing is, from its shapes alone.

    Raises:
        ImportError: Its package is not there.
    """
    example = network.make()
    try:
        found, _ = _blocks(Called(example, None), abstract=True)
    except Exception as error:
        return _told(error)
    named = ", ".join(f"{name} ({count})" for name, count in found["classes"].items())
    return f"{named}, since {found['refusal']}" if "refusal" in found else named


def _blocks(called: Called, abstract: bool = False) -> tuple[Record, Any]:
    """(what is measured by default, or why nothing is and what is measured then, where=)."""
    where, found = None, {}
    made = _runnable(called, abstract)
    try:
        traced, blocks, _ = _measuring.choose(made, _measuring.Choice())
    except ValueError as error:
        found["refusal"] = str(error)
        named = re.search(r'where=("[^"]+"|\([^)]*\))', str(error))
        if named is None:
            raise
        where = found["where"] = tuple(re.findall(r'"([^"]+)"', named[1]))
        traced, blocks, _ = _measuring.choose(made, _measuring.Choice(where=where))
    classes = collections.Counter(type(traced.calls[call].module).__name__ for call in blocks)
    return found | {"classes": dict(classes)}, where


def _summaries(profile: Any, kernels: np.ndarray) -> Record:
    shares = profile.branch_share[np.isfinite(profile.branch_share)]
    return {
        "blocks": len(profile),
        "forward": _summary(profile.forward_var),
        "backward": _summary(profile.backward_var),
        "share": float(shares.min()) if len(shares) else None,
        "kernels": {"number": len(kernels), "smallest": float(kernels.min()), "largest": float(kernels.max())},
    }


def _summary(variances: np.ndarray) -> Record:
    """The first, the last, and the largest over the smallest."""
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = float(variances.max() / variances.min())
    return {"first": float(variances[0]), "last": float(variances[-1]), "worst": worst}


def _unreached(report: rescale.Report) -> Record:
    notes = collections.Counter(re.sub(r"[\d.e+-]+ after", "x after", row.note) for row in report.rows if row.note)
    return {"passes": report.passes, "notes": dict(notes), "others": list(report.others)}


def _anyinit(called: Called, read: Callable[[Any], None]) -> Called:
    """AnyInit's empirical mode. It knows models of one input: the others are bound here, which it sees nothing of."""
    import anyinit

    example = called.example
    if called.variables is None:
        anyinit.initialize(example.model, "empirical", example.inputs[0])  # which refuses it

    class OneInput(linen.Module):
        def apply(self, variables: Any, batch: Any, **options: Any) -> Any:  # type: ignore[override]
            return example.model.apply(variables, batch, *example.inputs[1:], **example.options, **options)

    found = anyinit.initialize(OneInput(), "empirical", example.inputs[0], params=called.variables)
    params = jax.tree.map(
        lambda new, old: np.asarray(new).astype(old.dtype), dict(found.params)["params"], called.variables["params"]
    )
    read({"notes": {str(line): 1 for line in found.warnings}, "others": [path for path, _ in found.unscaled]})
    return called.changed({**called.variables, "params": jax.tree.map(jax.numpy.asarray, params)})


def _told(error: BaseException) -> str:
    """Its beginning, without the folders of this machine."""
    text = re.sub(r"/[^\s:]*/(?=(site-packages|nfjax|benchmarks|examples)/)", "", f"{type(error).__name__}: {error}")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
