"""`propagate` and its relatives: a model in, a `Profile` out."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from nfjax._flax import ABSENT
from nfjax.spp import _tracing
from nfjax.spp._losses import Loss
from nfjax.spp._measuring import Measurement, Run, prepare
from nfjax.spp._mode import Mode
from nfjax.spp._outputs import Output
from nfjax.spp._profile import Profile
from nfjax.spp._selection import Where
from nfjax.spp._tracing import Runnable

GAUSSIAN = "gaussian"
# Streams of a seed of their own: an input or a parameter that the user draws from the same seed is another number.
COTANGENT, INPUT = 0x5F70A7, 0x5F70A8


def stream(seed: int, purpose: int) -> jax.Array:
    """The key of a seed for the cotangent (or the labels), or for the inputs."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def propagate(
    model: Any,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    where: Where | None = None,
    branch: Where = "branch",
    output: Output | None = None,
    cotangent: str = GAUSSIAN,
    loss: str | Loss | None = None,
    seed: int = 0,
    rngs: Any = ABSENT,
    mutable: Any = None,
    **kwargs: Any,
) -> Profile:
    """Variances of activations and gradients at every block of a Flax model, in one jitted pass forward and back.

    model: any `nnx.Module`, called as `model(*inputs, **kwargs)`, or any Linen module, with its `variables` (left out,
    drawn by `model.init` from `seed`), `rngs`, and `mutable` collections (left out, all but the parameters if it writes
    any). It is used as it is, in the mode it is in (`model.train()`, `model.eval()`, `train=True` among the kwargs),
    and left as it was.

    where: the blocks to measure, a class, several, a class name, or a predicate `(path, module) -> bool`. Left out: the
    innermost repeated classes that make a residual addition (encoder and decoder: both), and where there are none the
    one class of repeated modules that have parts of their own. branch: likewise, the residual branch inside a block, or
    the attribute's name.

    output: which array to measure of a block that returns several, a function of what it returns, `lambda out: out[1]`,
    an index, or a name or path such as "hidden" or "[0]['x']". Left out, it is chosen by use, the array that goes on
    into the next block and the model's output, and to which a gradient comes back (`outputs.choose` has the rule);
    `Profile.outputs` says which one it was. `Profile.mode` says in which mode the network ran.

    The gradient starts at the last block's output with a cotangent drawn from N(0, 1), or, with `loss`, at a scalar
    function of the model's output: `loss=f`, or "cross_entropy" on labels drawn at random. seed: of these draws.

    An argument of the model that has the name of one of these cannot be passed by keyword. Only `__call__` is measured,
    not other methods, and modules that are attributes of the model: others, held in a closure, have the path
    "(outside)/<class>".

    Raises ValueError where no block is selected or it is not clear which, where a block cannot be measured, and where
    no gradient reaches one; TypeError for what is no Flax model. An error from inside the model passes through.
    """
    _check(cotangent, loss)
    runnable = _runnable(model, variables, seed, inputs, kwargs, rngs, mutable)
    other = other_mutable(model, runnable, inputs, kwargs, rngs, seed)
    measurement = prepare(runnable, where, branch, loss, output, other)
    return profile(measurement, [seed], [measurement.read(measurement.start(runnable.arrays, stream(seed, COTANGENT)))])


def propagate_seeds(
    make: Callable[[int], Any],
    *inputs: Any,
    seeds: int | Sequence[int] = 5,
    where: Where | None = None,
    branch: Where = "branch",
    output: Output | None = None,
    cotangent: str = GAUSSIAN,
    loss: str | Loss | None = None,
    rngs: Any = ABSENT,
    mutable: Any = None,
    **kwargs: Any,
) -> Profile:
    """`propagate` for several seeds: a profile whose attributes are medians and whose `quantile` gives the spread.

    make: `seed -> model`, an `nnx.Module`, a Linen module, or `(linen_module, variables)`, always the same network with
    other parameters. seeds: how many, from 0, or which. inputs: as for `propagate`, or functions of a JAX key, which
    then draw a new input for each seed (`spp.noise(shape)`). The other arguments are those of `propagate`.

    The pass is compiled once per network, not once per seed or initializer: parameters are its arguments.
    """
    _check(cotangent, loss)
    seeds = tuple(seeds) if isinstance(seeds, Sequence) else tuple(range(operator.index(seeds)))
    if not seeds:
        raise ValueError("seeds is empty: expected a number of seeds, 1 or more, or a sequence of them")
    first: Runnable | None = None
    measurement: Measurement | None = None
    runs, started = [], None
    for seed in seeds:
        made = make(seed)
        model, variables = made if isinstance(made, tuple) else (made, None)
        keys = jax.random.split(stream(seed, INPUT), len(inputs) + 1)
        drawn = [jnp.asarray(x(key)) if callable(x) else x for x, key in zip(inputs, keys, strict=False)]
        runnable = _runnable(model, variables, seed, drawn, kwargs, rngs, mutable)
        if first is None or not same(first, runnable):
            with_mutable = other_mutable(model, runnable, drawn, kwargs, rngs, seed)
            other = prepare(runnable, where, branch, loss, output, with_mutable)
            if measurement is not None and (other.program is not measurement.program):
                raise ValueError(
                    f"make({seed}) returned another network than make({seeds[0]}): only the values of parameters may "
                    "depend on the seed"
                )
            first, measurement = runnable, other
        # While a pass runs, the parameters of the next seed are drawn.
        if started is not None:
            runs.append(measurement.read(started))
        started = measurement.start(runnable.arrays, stream(seed, COTANGENT))
    runs.append(measurement.read(started))
    return profile(measurement, seeds, runs)


def noise(shape: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
    """An input of `propagate_seeds`: N(0, 1) noise of this shape, another for each seed."""
    return lambda key: jax.random.normal(key, tuple(shape), jnp.float32)


def profile(measurement: Measurement, seeds: Sequence[int], runs: Sequence[Run]) -> Profile:
    """What `Measurement.read` gave for each seed, as a profile."""
    samples = {name: np.stack([run.statistics[name] for run in runs]) for name in runs[0].statistics}
    zeros: dict[str, tuple[str, ...]] = {}
    for run in runs:
        for path, names in run.zeros.items():
            zeros[path] = tuple(dict.fromkeys((*zeros.get(path, ()), *names)))
    return Profile(
        measurement.paths,
        measurement.shapes,
        measurement.dtypes,
        tuple(seeds),
        samples,
        outputs=measurement.outputs,
        mode=functools.reduce(Mode.merged, [run.mode for run in runs]),
        zeros=zeros,
    )


def other_mutable(
    model: Any, runnable: Runnable, inputs: Sequence[Any], kwargs: Mapping[str, Any], rngs: Any, seed: int
) -> Callable[[Any], Runnable] | None:
    """For `prepare`: a Linen model with its variables and other mutable collections; None for any other model."""
    if not isinstance(model, linen.Module):
        return None
    variables = runnable.arrays[0]
    return lambda mutable: _runnable(model, variables, seed, inputs, kwargs, rngs, mutable)


def _runnable(
    model: Any,
    variables: Mapping[str, Any] | None,
    seed: int,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    rngs: Any,
    mutable: Any,
) -> Runnable:
    return _tracing.runnable(model, inputs, kwargs, variables, rngs, mutable, jax.random.key(seed))


def same(a: Runnable, b: Runnable) -> bool:
    """Whether the compiled pass of one serves the other without a look at its program."""

    def shapes(model: Runnable) -> list[Any]:
        return [(np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(model.arrays)]

    try:
        return bool(a.network == b.network) and shapes(a) == shapes(b)
    except ValueError:  # a static attribute that is an array does not compare
        return False


def _check(cotangent: str, loss: str | Loss | None) -> None:
    if cotangent != GAUSSIAN:
        raise ValueError(
            f"unknown cotangent={cotangent!r}: expected {GAUSSIAN!r}, at the last block, or loss= for one that comes "
            "from the model's output"
        )
    if loss is not None and not (isinstance(loss, str) or callable(loss)):
        raise TypeError(f"loss={loss!r}: expected a function of the model's output or a name")
