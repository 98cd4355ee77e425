"""The passes of one network with a factor for each of its kernels: the variances that follow from these factors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nfjax._flax import Runnable, bind
from nfjax.spp import _measuring, _outputs, _statistics, _tracing, _variables
from nfjax.spp._evaluation import BLOCK, BRANCH, evaluate
from nfjax.spp._flow import order
from nfjax.spp._measuring import Choice
from nfjax.spp._products import Kernel, tag_products
from nfjax.spp._statistics import NOTHING, Moments
from nfjax.spp._tracing import Tag


@dataclasses.dataclass(frozen=True)
class Unit:
    """What gets a factor of its own: a kernel, or one round's slice of a kernel that a loop goes through.

    Attributes:
        kernel: Its number.
        path: In the model, with the number of the slice in brackets.
        index: Of the slice, None for a whole kernel.
    """

    kernel: int
    path: str
    index: int | None = None


class Signal(NamedTuple):
    """What is measured at the blocks, each float64 [blocks].

    Attributes:
        forward: Variance of the activations.
        backward: Of the gradient.
        shares: Var[x_l - x] / Var[x_l] for the input x that has the output's shape; NaN where there is none.
    """

    forward: np.ndarray
    backward: np.ndarray
    shares: np.ndarray


class Passes:
    """A model whose kernels are multiplied by factors, compiled once for all of these.

    Attributes:
        kernels: In the order in which they are first used.
        units: Of the kernels, in the order in which they are first used.
        paths: Of the blocks; empty where only kernels are measured.
        others: Paths of the parameters of two and more axes that are no such kernels.
        quantized: (path, dtype) of those that are integers, whose scale is another's.
    """

    def __init__(self, model: Runnable, choice: Choice | None = None) -> None:
        """Traces the model.

        Args:
            model: With its inputs.
            choice: Of the blocks between which the signal is measured; None where only kernels are.

        Raises:
            ValueError: As `spp.propagate` does, where there is a choice.
        """
        self._model, self._leaves = model, jax.tree.leaves(model.arrays)
        slots = _variables.slots(model.arrays)
        blocks: Mapping[Tag, str] = {}
        if choice is None:
            traced = _tracing.trace(model)
        else:
            traced, calls, branches = _measuring.choose(model, choice)
            blocks = _outputs.choose(traced, calls, branches, choice.output, choice.loss)
            blocks = {tag: role for tag, role in blocks.items() if role == BLOCK}
        self.quantized = [
            (slot.name, str(leaf.dtype))
            for slot, leaf in zip(slots, self._leaves, strict=True)
            if slot.kind == _variables.PARAMETER and jnp.ndim(leaf) >= 2 and jnp.issubdtype(leaf.dtype, jnp.integer)
        ]
        first = len(traced.calls)
        self._traced, self.kernels, self.others = tag_products(traced, slots, self._leaves)
        self._products = {Tag(first + number, 0): BRANCH for number in range(len(self.kernels))}
        self._blocks = blocks
        ran = [tag.call - first for tag, _ in order(self._traced.jaxpr.jaxpr, self._products)]
        uses = [self._unit(kernel, ran[:place].count(kernel), ran.count(kernel)) for place, kernel in enumerate(ran)]
        self.units = list(dict.fromkeys(uses))
        self._uses = [self.units.index(unit) for unit in uses]
        self.paths = _outputs.numbered([traced.calls[tag.call].path for tag, _ in order(traced.jaxpr.jaxpr, blocks)])
        self._forward = self._compiled(self._measure_products)
        self._both = self._compiled(self._measure_blocks) if blocks else None

    def with_arrays(self, arrays: Any) -> Passes:
        """The same programs for a model with other arrays."""
        other = copy.copy(self)
        other._model, other._leaves = dataclasses.replace(self._model, arrays=arrays), jax.tree.leaves(arrays)
        return other

    # ------------------------------------------------------------ what is measured

    def products(self, factors: np.ndarray) -> np.ndarray:
        """The variance of what each unit returns, float64 [units]; the geometric mean over all its uses, without those
        in which it returns what does not vary, as a recurrent kernel does for the state of zeros that it begins with.
        """
        found = _statistics.on_host(self._forward(self._leaves, self._split(factors)))
        uses: list[list[float]] = [[] for _ in self.units]
        for unit, variance in zip(self._uses, found.var, strict=True):
            uses[unit].append(variance)
        varying = [[variance for variance in values if variance != 0] for values in uses]
        return np.array([np.exp(np.mean(np.log(values))) if values else 0.0 for values in varying])

    def blocks(self, factors: np.ndarray, key: jax.Array) -> Signal:
        """The signal at the blocks."""
        forward, backward, changes = self._both(self._leaves, self._split(factors), key)
        forward, backward = _statistics.on_host(forward), _statistics.on_host(backward)
        return Signal(forward.var, backward.var, _statistics.changes_on_host(changes))

    def multiplied(self, factors: np.ndarray) -> Any:
        """The arrays of the model with every kernel multiplied by its factor; all others are the same objects."""
        leaves = self._scaled(self._leaves, self._split(factors))
        return jax.tree.unflatten(jax.tree.structure(self._model.arrays), leaves)

    # ------------------------------------------------------------ the programs

    def _compiled(self, measure: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(bind(measure, self._traced.axes))

        def run(*args: Any) -> Any:
            with jax.disable_jit(False):
                return compiled(*args)

        return run

    def _measure_products(self, leaves: Sequence[jax.Array], factors: Sequence[jax.Array]) -> Moments:
        jaxpr = self._traced.jaxpr
        _, taken = evaluate(jaxpr.jaxpr, jaxpr.consts, self._scaled(leaves, factors), [], self._products)
        return jax.tree.map(lambda *fields: jnp.stack(fields), *taken.forward)

    def _measure_blocks(
        self, leaves: Sequence[jax.Array], factors: Sequence[jax.Array], key: jax.Array
    ) -> tuple[Moments, Moments, jax.Array]:
        jaxpr, number = self._traced.jaxpr, len(self.paths)
        leaves = self._scaled(leaves, factors)

        def run(sinks: list[Moments]) -> tuple[jax.Array, Any]:
            _, taken = evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, sinks, self._blocks)
            return taken.last, (taken.forward, jnp.stack(taken.changes))

        last, pull, (forward, changes) = jax.vjp(run, [NOTHING] * number, has_aux=True)
        start = jax.random.normal(key, last.shape, jnp.float32).astype(last.dtype)
        stacked = [jax.tree.map(lambda *fields: jnp.stack(fields), *found) for found in (forward, pull(start)[0])]
        return stacked[0], stacked[1], changes

    # ------------------------------------------------------------ factors

    def _unit(self, number: int, use: int, uses: int) -> Unit:
        """What gets the factor of the use-th of so many uses of a kernel."""
        kernel = self.kernels[number]
        if kernel.rounds is None:
            return Unit(number, kernel.path)
        index = use * kernel.rounds // uses
        index = kernel.rounds - 1 - index if kernel.reverse else index
        return Unit(number, f"{kernel.path}[{index}]", index)

    def _split(self, factors: np.ndarray) -> list[np.ndarray]:
        """The factors of each kernel, [] or [rounds]."""
        found = [np.ones(() if kernel.rounds is None else kernel.rounds, np.float32) for kernel in self.kernels]
        for unit, factor in zip(self.units, factors, strict=True):
            found[unit.kernel][() if unit.index is None else unit.index] = factor
        return found

    def _scaled(self, leaves: Sequence[Any], factors: Sequence[Any]) -> list[Any]:
        scaled = list(leaves)
        for kernel, factor in zip(self.kernels, factors, strict=True):
            scaled[kernel.leaf] = _times(scaled[kernel.leaf], factor, kernel)
        return scaled


def _times(leaf: Any, factor: Any, kernel: Kernel) -> jax.Array:
    if kernel.rounds is not None:
        factor = jnp.reshape(factor, (kernel.rounds, *[1] * (jnp.ndim(leaf) - 1)))
    return (jnp.asarray(leaf).astype(jnp.float32) * factor).astype(leaf.dtype)
