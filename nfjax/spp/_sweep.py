"""The coordinate check: what happens to activations and updates when a network is made wider, or deeper.

The same network at several widths, each for a few steps on the same batch (Yang et al. 2022, "Tensor Programs V",
appendix D.1).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from nfjax import _names
from nfjax._flax import ABSENT, Runnable, runnable
from nfjax.spp._losses import Loss
from nfjax.spp._measuring import Choice
from nfjax.spp._monitor import COTANGENT, INPUT, stream
from nfjax.spp._outputs import Output
from nfjax.spp._selection import Where
from nfjax.spp._sweep_fit import QUANTITIES
from nfjax.spp._sweep_result import Sweep
from nfjax.spp._sweep_steps import LOSS, OPTIMIZERS, RATES, Course, Optimizer, prepare

Rate = float | Callable[..., float]
_SEEDS = 5


def sweep(
    make: Callable[..., Any],
    *inputs: Any,
    widths: Sequence[float] | None = None,
    depths: Sequence[float] | None = None,
    values: Mapping[str, Sequence[float]] | None = None,
    steps: int = 3,
    optimizer: str | Optimizer | Callable[[float], Optimizer] = "sgd",
    learning_rate: Rate | None = None,
    loss: str | Loss = "cross_entropy",
    seeds: int | Sequence[int] | None = None,
    where: Where | None = None,
    output: Output | None = None,
    rngs: Any = ABSENT,
    mutable: Any = None,
    **kwargs: Any,
) -> Sweep:
    """A coordinate check: sizes of activations, outputs and updates after the first optimizer steps, against width,
    depth or another number::

        sweep = spp.sweep(make, x, widths=(64, 128, 256, 512))
        print(sweep.diagnose())
        spp.plot_sweep(sweep).savefig("sweep.png")

    In a network whose best learning rate does not depend on its width (muP), nothing that is measured after the first
    steps does. Each network takes its steps on one batch, always the same, with the same dropout masks; what a model
    writes besides (running statistics) is dropped. The models are left as they were. A step is compiled once for each
    value, and serves all seeds.

    Args:
        make: `make(value)`, or `make(value, seed)`: an `nnx.Module`, a Linen module, or `(linen_module, variables)`.
            The seed is given to a parameter named `seed`, as `nnx.Rngs` to one named `rngs`, or to a second one without
            a default.
        *inputs: Of the model's call: arrays, or functions of a JAX key, which draw one for each seed
            (`spp.noise(shape)`); the same for all values.
        widths: To be compared, two or more; or
        depths: Likewise; or
        values: Of anything else by its name, `values={"heads": (2, 4, 8)}`.
        steps: Of the optimizer; with 0, only the start is measured.
        optimizer: "sgd", "adam", an optax optimizer or any object that has its `init` and `update`, or a function of
            the value that returns one. Parameters are a dictionary by path.
        learning_rate: A number, or a function of the value, or of the value and a parameter's path ("layers/0/kernel"),
            as muP has it. Left out, 0.1 for "sgd" and 0.001 for "adam"; an optimizer of one's own has its own.
        loss: "cross_entropy" on labels drawn at random, or a function of the model's output that returns a scalar.
        seeds: How many, from 0, or which; 5 where every seed gives other parameters.
        where: The blocks, as for `propagate`.
        output: Which array of a block that returns several, likewise.
        rngs: Of the model's call.
        mutable: Of a Linen model.
        **kwargs: Of the model's call.

    Returns:
        The sizes, with their exponents and verdict.

    Raises:
        ValueError: There are not two values; a learning rate or number of steps is none; `make` returns different
            networks for two seeds; otherwise as `propagate`.
        TypeError: As `propagate`.
    """
    name, numbers = _swept(widths, depths, values)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(f"steps={steps!r}: expected an integer, 0 or more")
    if not (isinstance(loss, str) or callable(loss)):
        raise TypeError(f"loss={loss!r}: expected a function of the model's output or a name")
    call, seeded = _caller(make)
    chosen = _seeds(seeds, lambda: seeded or _drawn(call(numbers[0], 0), inputs))
    batches = [_batch(inputs, seed) for seed in chosen]
    courses, results = [], []
    for value in numbers:
        rule, rate = _rule(optimizer, learning_rate, value)
        course, network, runs = None, None, []
        for seed, batch in zip(chosen, batches, strict=True):
            try:
                made = call(value, seed)
                model, variables = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
                called = runnable(model, batch, kwargs, variables, rngs, mutable, jax.random.key(seed))
                if course is None or not _same(network, called):
                    other = prepare(called, Choice(where, "branch", output, loss), rule if steps else None)
                    course, network = course or other, called
                    if other.program is not course.program:
                        raise ValueError(
                            f"make({value:g}, {seed}) returned another network than make({value:g}, {chosen[0]}): only "
                            "the values of parameters may depend on the seed"
                        )
                rates = [rate(path) for path in course.parameters]
                runs.append(course.run(called.arrays, rates, steps, stream(seed, COTANGENT)))
            except Exception as error:
                error.add_note(f"(raised for {name} {value:g} in the sweep of nfjax.spp)")
                raise
        courses.append(course)
        results.append({quantity: np.stack([run[quantity] for run in runs]) for quantity in runs[0]})
    return Sweep(
        name=name,
        values=numbers,
        seeds=chosen,
        steps=int(steps),
        setting=_setting(steps, optimizer, learning_rate, loss),
        paths={quantity: tuple(_paths(course, quantity) for course in courses) for quantity in QUANTITIES},
        samples={quantity: tuple(found[quantity] for found in results) for quantity in QUANTITIES},
        losses=np.stack([found[LOSS][:, :, 0] for found in results]),
        mode=courses[0].mode,
    )


def _paths(course: Course, quantity: str) -> tuple[str, ...]:
    if quantity == "kernel_change":
        return course.kernels
    return course.paths if quantity.startswith("activation") else ("",)


def _same(network: Runnable, other: Runnable) -> bool:
    """Whether the compiled step of one model serves another, without a look at its program."""

    def shapes(called: Runnable) -> Any:
        return jax.tree.map(lambda leaf: (np.shape(leaf), leaf.dtype), called.arrays)

    try:
        return bool(network.network == other.network) and shapes(network) == shapes(other)
    except ValueError:  # a static attribute that is an array does not compare
        return False


# ---------------------------------------------------------------- what is asked for


def _swept(
    widths: Sequence[float] | None, depths: Sequence[float] | None, values: Mapping[str, Sequence[float]] | None
) -> tuple[str, tuple[float, ...]]:
    """Name and values, ascending."""
    if not isinstance(values, Mapping | None):
        raise ValueError(f"values={values!r}: expected numbers by their name, such as values={{'heads': (2, 4, 8)}}")
    given = {"width": widths, "depth": depths, **(values or {})}
    given = {name: numbers for name, numbers in given.items() if numbers is not None}
    if len(given) != 1:
        raise ValueError(
            f"to be swept: {' and '.join(given) or 'nothing'}; expected one of widths=(64, 128, 256), "
            "depths=(4, 8, 16) and values={'heads': (2, 4, 8)}"
        )
    ((name, numbers),) = given.items()
    if not isinstance(numbers, Sequence | np.ndarray) or isinstance(numbers, str):
        raise ValueError(f"{name} {numbers!r}: expected two or more different numbers, such as (64, 128, 256)")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float | np.number) or not 0 < number < math.inf:
            raise ValueError(f"{name} {number!r}: expected positive numbers, whose logarithm is taken")
    numbers = sorted(number.item() if isinstance(number, np.number) else number for number in numbers)
    if len(set(numbers)) < max(len(numbers), 2):
        raise ValueError(f"{name} {', '.join(map(str, numbers))}: expected two or more different numbers")
    return name, tuple(numbers)


def _caller(make: Callable[..., Any]) -> tuple[Callable[[float, int], Any], bool]:
    """`(value, seed) -> model`, and whether the seed reaches `make`."""
    if not callable(make) or isinstance(make, nnx.Module | linen.Module):
        raise TypeError(f"make is of type {type(make).__name__}: expected a function of the value that returns a model")
    try:
        called = make.__init__ if isinstance(make, type) else make  # a class of NNX does not show what it takes
        parameters = list(inspect.signature(called).parameters.values())[1 if isinstance(make, type) else 0 :]
    except (TypeError, ValueError):
        parameters = []
    names = {parameter.name for parameter in parameters[1:] if parameter.kind is not parameter.VAR_POSITIONAL}
    if "seed" in names:
        return lambda value, seed: make(value, seed=seed), True
    if "rngs" in names:
        return lambda value, seed: make(value, rngs=nnx.Rngs(seed)), True
    positional = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    if len(positional) == 2:
        return lambda value, seed: make(value, seed), True
    return lambda value, seed: make(value), False


def _drawn(made: Any, inputs: Sequence[Any]) -> bool:
    """Whether a seed gives other parameters, which a Linen module without variables has drawn, or other inputs."""
    return isinstance(made, linen.Module) or any(map(callable, inputs))


def _seeds(seeds: int | Sequence[int] | None, vary: Callable[[], bool]) -> tuple[int, ...]:
    given = _SEEDS if seeds is None else seeds
    if isinstance(given, bool) or not isinstance(given, int | np.integer | Sequence):
        raise ValueError(f"seeds={seeds!r}: expected a number of seeds, 1 or more, or a sequence of them")
    chosen = tuple(given) if isinstance(given, Sequence) else tuple(range(given))
    if not chosen:
        raise ValueError("seeds is empty: expected a number of seeds, 1 or more, or a sequence of them")
    if len(chosen) > 1 and not vary():
        if seeds is None:
            return chosen[:1]
        raise ValueError(
            f"make takes no seed, so that {len(chosen)} seeds would measure the same parameters {len(chosen)} times: "
            "give it a parameter named seed or rngs"
        )
    return chosen


def _batch(inputs: Sequence[Any], seed: int) -> list[Any]:
    keys = jax.random.split(stream(seed, INPUT), len(inputs) + 1)
    return [jnp.asarray(x(key)) if callable(x) else x for x, key in zip(inputs, keys, strict=False)]


# ---------------------------------------------------------------- optimizer and learning rate


def _is_optimizer(thing: Any) -> bool:
    return callable(getattr(thing, "init", None)) and callable(getattr(thing, "update", None))


def _rule(optimizer: Any, learning_rate: Rate | None, value: float) -> tuple[Optimizer, Callable[[str], float]]:
    """The optimizer of a value, and `path -> learning rate`."""
    if isinstance(optimizer, str):
        rule = _names.lookup("optimizer", optimizer, OPTIMIZERS)
        rate = RATES[optimizer] if learning_rate is None else learning_rate
        return rule, lambda path: _checked(_rate(rate, value, path))
    if learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate!r} goes with optimizer='sgd' and 'adam'; an optimizer of your own has its "
            "own: optimizer=lambda width: optax.adam(1 / width)"
        )
    rule = optimizer if _is_optimizer(optimizer) else optimizer(value) if callable(optimizer) else None
    if not _is_optimizer(rule):
        raise ValueError(
            f"optimizer={optimizer!r}: expected {', '.join(map(repr, OPTIMIZERS))}, an optimizer with init and update "
            "as optax has them, or a function of the value that returns one"
        )
    return rule, lambda path: 1.0


def _rate(rate: Any, value: float, path: str) -> Any:
    if not callable(rate):
        return rate
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in inspect.signature(rate).parameters.values() if p.kind in kinds and p.default is p.empty]
    return rate(value, path) if len(needed) > 1 else rate(value)


def _checked(rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number | np.ndarray | jax.Array):
        raise ValueError(f"learning_rate={rate!r}: expected a number, or a function that returns one")
    if not 0 <= float(rate) < math.inf:
        raise ValueError(f"learning_rate={float(rate)!r}: expected a finite number, 0 or more")
    return float(rate)


def _setting(steps: int, optimizer: Any, learning_rate: Rate | None, loss: str | Loss) -> str:
    """In words."""

    def named(thing: Any) -> str:
        return thing if isinstance(thing, str) else getattr(thing, "__name__", type(thing).__name__)

    words = f"{steps} step{'s' if steps != 1 else ''} of {named(optimizer)}"
    if isinstance(optimizer, str):
        rate = RATES[optimizer] if learning_rate is None else learning_rate
        words += f", learning rate {f'by {named(rate)}' if callable(rate) else f'{float(rate):g}'}"
    return f"{words}, {named(loss)}".replace("<lambda>", "a function")
