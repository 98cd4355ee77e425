"""Singular values of the Jacobians of a model's blocks, by random probes (`_probes`)."""

from __future__ import annotations

import dataclasses
import math
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from nfjax import compilation
from nfjax._flax import ABSENT, Runnable, bind, runnable
from nfjax.spp import _flow, _json, _outputs, _tracing, _variables
from nfjax.spp._evaluation import BLOCK, check_supported
from nfjax.spp._measuring import Choice, choose
from nfjax.spp._mode import Mode
from nfjax.spp._outputs import Output
from nfjax.spp._probes import Probes, Products, draw, join, singular_values
from nfjax.spp._selection import Where
from nfjax.spp._tracing import Tag, Trace

PROBES = 0x5F70A9  # the stream of a seed from which the probes are drawn


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Jacobians:
    """Singular values of the Jacobian J = d(output) / d(input) of each block, one entry per block in execution order.

    J is that of the whole batch at once, with n_in numbers in and n_out numbers out: batch norm couples the examples.
    Where a block treats each example on its own, the mean is that over the examples, and the largest is the largest of
    any example. Parameters, random numbers and a block's other inputs are held fixed.

    A block with all singular values 1 is a dynamical isometry (Pennington et al. 2017): it preserves the length of
    every perturbation and of every gradient. A mean square of 1 alone preserves them on average.

    Attributes:
        paths: Where each block stands in the model; a block that runs several times is numbered.
        inputs: With respect to what; of a block that is given several arrays, which one.
        outputs: Of what; of a block that returns several arrays, which one.
        input_shapes: Of these arrays.
        output_shapes: Likewise.
        dtypes: Of the outputs.
        mean_square: The sum of the squared singular values / n_in, float64 [blocks]: by what factor the block
            multiplies the variance of a gradient of independent components. Times n_in / n_out, it is that for the
            variance of a perturbation on the way forward.
        mean_square_error: The standard error of that over the probes, NaN for one probe.
        largest: The largest singular value, float64 [blocks]. It is a lower bound, as close as the iterations bring it.
        last_growth: By what share of itself `largest` grew in the last iteration; where it is small, more iterations
            would bring little. NaN for one iteration.
        reasons: By path, why a block's numbers are NaN.
        probes: How many.
        iterations: How many.
        mode: In which mode the network ran.
    """

    paths: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...] | None, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    mean_square: np.ndarray
    mean_square_error: np.ndarray
    largest: np.ndarray
    last_growth: np.ndarray
    reasons: Mapping[str, str]
    probes: int
    iterations: int
    mode: Mode = dataclasses.field(default_factory=Mode)

    def __len__(self) -> int:
        return len(self.paths)

    def to_json(self, path: str | pathlib.Path | None = None) -> str:
        """As JSON, where what is not finite stands as null, "inf" or "-inf".

        Args:
            path: A file that is written, too.

        Returns:
            The text.

        Raises:
            OSError: The file cannot be written.
        """

        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _json.write({**content, "mode": {"text": str(self.mode), **dataclasses.asdict(self.mode)}}, path)

    def __repr__(self) -> str:
        lines = [["", "block", "input", "output", "mean square", "", "largest", "last growth"]]
        for i, path in enumerate(self.outputs):
            shape = "x".join(map(str, self.output_shapes[i]))
            error = "" if np.isnan(self.mean_square_error[i]) else f"+- {self.mean_square_error[i]:.1g}"
            growth = "" if np.isnan(self.last_growth[i]) else f"{self.last_growth[i]:.1%}"
            numbers = (f"{self.mean_square[i]:.3g}", error, f"{self.largest[i]:.3g}", growth)
            lines.append([str(i), path, self.inputs[i] or "none", shape, *numbers])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        align = [str.rjust, str.ljust, str.ljust, str.ljust, str.rjust, str.ljust, str.rjust, str.rjust]
        table = [
            "  ".join(a(cell, w) for a, cell, w in zip(align, line, widths, strict=True)).rstrip() for line in lines
        ]
        head = (
            f"Singular values of the Jacobians of {len(self)} blocks, {'/'.join(sorted(set(self.dtypes)))}, "
            f"of the whole batch at once ({self.probes} probes, {self.iterations} iterations)"
        )
        reasons = [f"{path}: NaN, {reason}" for path, reason in self.reasons.items()]
        return "\n".join([head, *filter(None, [str(self.mode)]), *table, *reasons])


def jacobians(
    model: Any,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    where: Where | None = None,
    output: Output | None = None,
    probes: int = 4,
    iterations: int = 8,
    seed: int = 0,
    rngs: Any = ABSENT,
    mutable: Any = None,
    **kwargs: Any,
) -> Jacobians:
    """The mean squared and the largest singular value of the Jacobian of every block, without forming any Jacobian.

    The mean is estimated by the squared norm of J v over n_in, for vectors v of random signs (Hutchinson 1990), the
    largest by Lanczos's method on J^T J (Golub and Kahan 1965), which starts at a random vector. In all, each block is
    multiplied `probes` + `iterations` times by its Jacobian, each as much work as its forward pass, and `iterations`
    times by the transpose, each as much as its backward pass without the gradients of the parameters.

    The model is used as it is, in the mode it is in, and left as it was.

    Args:
        model: Any `nnx.Module`, called as `model(*inputs, **kwargs)`, or any Linen module.
        *inputs: Of the model, as for `propagate`.
        variables: Of a Linen model; drawn by `model.init` from `seed` if left out.
        where: The blocks, as for `propagate`.
        output: Which array of a block that returns several, as for `propagate`; left out, the one that goes on into the
            next block and the model's output. Of a block that is given several, the input is the array by which blocks
            are connected: the first that comes from another block, preferably of the output's shape; where there is
            none, the first of the output's shape, or the first at all. `Jacobians.inputs` says which one it was.
        probes: How many random vectors estimate the mean square.
        iterations: How many bring the largest close.
        seed: Of the random vectors.
        rngs: Of the model's call.
        mutable: Collections that a Linen module may write, as for `propagate`.
        **kwargs: Of the model's call.

    Returns:
        The singular values, one entry per block; NaN, with a reason, for a block that is given no floating-point array.

    Raises:
        ValueError: No block is selected or it is not clear which; a block stands where it cannot be cut out, or it
            cannot be differentiated; `probes` or `iterations` is not positive.
        TypeError: It is no Flax model, or variables or arrays are none. An error from inside the model passes through.
    """
    counts = _count("probes", probes), _count("iterations", iterations)
    called = runnable(model, inputs, kwargs, variables, rngs, mutable, jax.random.key(seed))
    with jax.disable_jit(False):  # what is only traced shows nobody more without jit
        return _measure(called, Choice(where, output=output), *counts, seed)


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more")
    return number


def _measure(model: Runnable, choice: Choice, probes: int, iterations: int, seed: int) -> Jacobians:
    traced, blocks, _ = choose(model, choice)
    jaxpr, calls = traced.jaxpr, traced.calls
    chosen = _outputs_of(traced, blocks, choice.output)
    check_supported(jaxpr.jaxpr, calls, chosen)
    given = _inputs_of(traced, chosen)
    ran = _flow.order(jaxpr.jaxpr, dict.fromkeys(chosen, BLOCK))
    inputs = {tag: one.tag for tag, one in given.items() if math.prod(one.aval.shape)}
    measured = [i for i, (tag, _) in enumerate(ran) if tag in inputs]
    leaves = jax.tree.leaves(model.arrays)
    longest = max((math.prod(one.aval.shape) for one in given.values()), default=0)

    def run(leaves: Sequence[jax.Array], key: jax.Array) -> Products:
        signs, normal, shifts = draw(jax.random.fold_in(key, PROBES), probes, longest, len(measured))
        walk = Probes(inputs, calls, iterations, signs, normal)
        return join(walk.evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, shifts)[1])

    key = jax.random.key(seed)
    found = np.full((4, len(ran)), np.nan)
    if measured:
        lowered = jax.jit(bind(run, traced.axes), keep_unused=True).lower(leaves, key)
        program = compilation.compile_once(lowered, placed=[str(getattr(leaf, "sharding", None)) for leaf in leaves])
        products = jax.tree.map(lambda x: np.asarray(x, np.float64), program(leaves, key))
        found[:, measured] = singular_values(products)
    tags = [tag for tag, _ in ran]
    paths = _outputs.numbered([calls[tag.call].path for tag in tags])
    reasons = {}
    for i, (path, tag) in enumerate(zip(paths, tags, strict=True)):
        if tag not in given:
            reasons[path] = "it is given no floating-point array"
        elif tag not in inputs:
            reasons[path] = f"it is given an empty array, {given[tag]}"
        elif not np.isfinite(found[[0, 2], i]).all():
            reasons[path] = "its Jacobian is not finite"
    slots = _variables.slots(model.arrays)
    mode = _variables.mode(traced, slots, model.arrays)
    return Jacobians(
        paths=paths,
        inputs=tuple(str(given[tag]) if tag in given else "" for tag in tags),
        outputs=tuple(path + _outputs.leaf_path(calls, tag) for path, tag in zip(paths, tags, strict=True)),
        input_shapes=tuple(given[tag].aval.shape if tag in given else None for tag in tags),
        output_shapes=tuple(shape for _, shape in ran),
        dtypes=tuple(str(_outputs.dtype(calls, tag)) for tag in tags),
        mean_square=found[0],
        mean_square_error=found[1],
        largest=found[2],
        last_growth=found[3],
        reasons=reasons,
        probes=probes,
        iterations=iterations,
        mode=dataclasses.replace(mode, initial=_variables.initial(mode, slots, leaves)),
    )


# ---------------------------------------------------------------- of what, with respect to what


def _outputs_of(traced: Trace, blocks: Sequence[int], output: Output | None) -> list[Tag]:
    """The tag of every block's output, chosen as for `propagate`. No gradient need reach it from the last block."""
    there = {tag for tag in _flow.executions_of(traced.jaxpr.jaxpr) if not tag.entry}
    if output is not None:
        return [_outputs._named(output, traced.calls[block], block) for block in blocks]
    candidates = {block: _outputs._candidates(traced.calls[block], block, there) for block in blocks}
    ranked = _outputs._ranked(traced, candidates, [1] * len(traced.jaxpr.out_avals))
    return [tags[0] for tags in ranked.values()]


@dataclasses.dataclass(frozen=True)
class _Given:
    """The input of a block: its tag, its shape and dtype, and which it is of how many."""

    tag: Tag
    aval: Any
    place: int
    total: int

    def __str__(self) -> str:
        shape = "x".join(map(str, self.aval.shape)) or "scalar"
        return f"{shape} (array {self.place} of {self.total})" if self.total > 1 else shape


def _inputs_of(traced: Trace, chosen: Sequence[Tag]) -> dict[Tag, _Given]:
    """For the outputs of blocks, their inputs; without those that are given none."""
    blocks = {tag.call for tag in chosen}

    def at_tag(tag: Tag, marks: int) -> int:
        # Of another array that a block returns, what lies inside of the block is no connection between blocks.
        return marks if tag.entry or tag.call not in blocks else int(tag in chosen)

    jaxpr = traced.jaxpr.jaxpr
    arrived = _flow.follow(jaxpr, [0] * len(jaxpr.invars), _flow.gradient, at_tag).at
    # The first block is not fed by another: what is connected is decided for all calls of a class together.
    fed = [tag for tag, marks in arrived.items() if tag.entry and marks]
    connected = {(type(traced.calls[tag.call].module), tag.number) for tag in fed}
    entries, shapes = _entries(jaxpr), dict(_flow.order(jaxpr, dict.fromkeys(chosen, BLOCK)))
    found = {}
    for output in chosen:
        cls = type(traced.calls[output.call].module)
        # An array that is given several times, as to attention, is one input.
        candidates = {variable: tag for tag, variable in reversed(entries.items()) if tag.call == output.call}
        arrays = sorted((tag, variable.aval) for variable, tag in candidates.items())
        if arrays:
            tag, aval = max(
                arrays,
                key=lambda array: (
                    (cls, array[0].number) in connected,
                    array[1].shape == shapes.get(output),
                    -array[0].number,
                ),
            )
            place = [tag for tag, _ in arrays].index(tag) + 1
            found[output] = _Given(tag, aval, place, len(arrays))
    return found


def _entries(jaxpr: Any) -> dict[Tag, Any]:
    """The variables that calls are given, by tag, in order."""
    found = {}
    for eqn in jaxpr.eqns:
        tag = _tracing.tag(eqn)
        if tag is not None and tag.entry and not isinstance(eqn.invars[0], Literal):
            found[tag] = eqn.invars[0]
        for inner in jaxprs_in_params(eqn.params):
            found |= _entries(inner)
    return found
