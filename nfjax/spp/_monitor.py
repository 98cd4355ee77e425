"""Signal propagation: a model in, a `Profile` out.

`Monitor` is what measures; `propagate` is one call of it, and `propagate_seeds` a loop over it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfjax._flax import ABSENT, Runnable, runnable
from nfjax.spp._losses import Loss
from nfjax.spp._measuring import Choice, Measurement, choose, prepare
from nfjax.spp._outputs import Output
from nfjax.spp._profile import Profile
from nfjax.spp._selection import BLOCKS, LAYERS, Where

GAUSSIAN = "gaussian"
# Streams of a seed of their own: an input or a parameter that the user draws from the same seed is another number.
COTANGENT, INPUT = 0x5F70A7, 0x5F70A8


def stream(seed: int, purpose: int) -> jax.Array:
    """The key of a seed for the cotangent (or the labels), or for the inputs."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


class Monitor:
    """Measures one network again and again, compiled on the first call::

        monitor = spp.Monitor(x)
        ...
        profile = monitor(model)     # every N steps

    One call costs a forward pass and a backward pass without the gradients of the parameters, about two thirds of a
    training step on that batch. Another network, or another mode of it, compiles again.
    """

    def __init__(
        self,
        *inputs: Any,
        where: Where | None = None,
        branch: Where = "branch",
        output: Output | None = None,
        loss: str | Loss | None = None,
        seed: int = 0,
        mutable: Any = None,
        level: str = BLOCKS,
        **kwargs: Any,
    ):
        """Says what will be measured; nothing is computed yet.

        Args:
            *inputs: As for `propagate`, likewise what follows.
            where: The blocks.
            branch: The residual branch inside a block.
            output: Which array of a block that returns several.
            loss: Where the gradient starts.
            seed: Of what is drawn at random.
            mutable: Of a Linen model.
            level: "block" or "layer".
            **kwargs: Of the model's call.

        Raises:
            TypeError: The loss is neither a name nor a function.
            ValueError: There is no such level.
        """
        if level not in (BLOCKS, LAYERS):
            raise ValueError(f"unknown level={level!r}: expected {BLOCKS!r} or {LAYERS!r}")
        if loss is not None and not (isinstance(loss, str) or callable(loss)):
            raise TypeError(f"loss={loss!r}: expected a function of the model's output or a name")
        self.inputs, self.kwargs, self.seed, self.mutable = inputs, kwargs, seed, mutable
        self.choice = Choice(where, branch, output, loss, level)
        self._prepared: tuple[Any, Measurement] | None = None

    def __call__(self, model: Any, variables: Mapping[str, Any] | None = None, rngs: Any = ABSENT) -> Profile:
        """Measures the model as it is now.

        Args:
            model: An NNX or Linen module.
            variables: Of a Linen module; drawn from the seed if left out.
            rngs: As for `propagate`.

        Returns:
            The profile.

        Raises:
            ValueError: As `propagate` does, likewise TypeError.
        """
        return self._measure(model, variables, rngs, kernels=False)

    def _measure(self, model: Any, variables: Mapping[str, Any] | None, rngs: Any, kernels: bool) -> Profile:
        measurement, arrays = self.prepare(model, variables, rngs, self.inputs, self.seed)
        started = measurement.start(arrays, stream(self.seed, COTANGENT))
        return measurement.profile([self.seed], [measurement.read(started, kernels)])

    def check(self, model: Any, variables: Mapping[str, Any] | None = None, rngs: Any = ABSENT) -> None:
        """Whether the blocks can be found, from shapes alone: arrays may be `jax.ShapeDtypeStruct`.

        Args:
            model: As in a call, likewise variables and rngs.
            variables: Likewise.
            rngs: Likewise.

        Raises:
            ValueError: As a call does where `where` selects nothing, or is left out and the blocks are not clear.
        """
        key = jax.random.key(self.seed)
        called = runnable(model, self.inputs, self.kwargs, variables, rngs, self.mutable, key, abstract=True)
        choose(called, self.choice)

    def prepare(
        self, model: Any, variables: Mapping[str, Any] | None, rngs: Any, inputs: Sequence[Any], seed: int
    ) -> tuple[Measurement, Any]:
        """The compiled pass of this model, and the arrays to start it with.

        Args:
            model: As in a call, likewise variables and rngs.
            variables: Likewise.
            rngs: Likewise.
            inputs: Instead of the monitor's own, of the same shapes.
            seed: Likewise.
        """
        called = runnable(model, inputs, self.kwargs, variables, rngs, self.mutable, jax.random.key(seed))
        network = _network(called)
        if self._prepared is None or not _same(self._prepared[0], network):
            # Only what decides whether another model fits is kept, not the parameters.
            self._prepared = network, prepare(called, self.choice)
        return self._prepared[1], called.arrays


def _network(called: Runnable) -> Any:
    """What decides whether the compiled pass of one model serves another, without a look at its program."""
    return called.network, [(np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(called.arrays)]


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except ValueError:  # a static attribute that is an array does not compare
        return False


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
    level: str = BLOCKS,
    **kwargs: Any,
) -> Profile:
    """Variances of activations and gradients at every block of a Flax model, in one jitted pass forward and back.

    The model is used as it is, in the mode it is in (`model.train()`, `model.eval()`, `train=True` among the kwargs),
    and left as it was. Only `__call__` is measured, not other methods, and modules that are attributes of the model:
    others, held in a closure, have the path "(outside)/<class>".

    Args:
        model: Any `nnx.Module`, called as `model(*inputs, **kwargs)`, or any Linen module.
        *inputs: Arrays, or pytrees of them; flags, numbers and names go to the model as they are.
        variables: Of a Linen module; drawn by `model.init` from `seed` if left out.
        where: The blocks to measure: a class, several, a class name, or a predicate `(path, module) -> bool`. Left out,
            the innermost repeated classes that make a residual addition (encoder and decoder: both), and where there
            are none the one class of repeated modules that have parts of their own.
        branch: The residual branch inside a block, likewise, or the attribute's name.
        output: Which array to measure of a block that returns several: a function of what it returns, such as
            `lambda out: out[1]`, an index, or a name or path such as "hidden" or "[0]['x']". Left out, it is chosen
            by use: the array that goes on into the next block and the model's output, and to which a gradient comes
            back. `Profile.outputs` says which one it was.
        cotangent: "gaussian": the gradient starts at the last block's output, drawn from N(0, 1).
        loss: Starts it at a scalar function of the model's output instead: that function, or "cross_entropy" on labels
            drawn at random.
        seed: Of these draws.
        rngs: Of the model's call.
        mutable: Collections that a Linen module may write; left out, all but the parameters if it writes any.
        level: "block"; or "layer": with `where` left out, every convolution, dense layer, norm, attention and whatever
            else holds parameters, or with it, what it selects, is measured, whether a gradient reaches it or not.
        **kwargs: Of the model's call. An argument of the model that has the name of one of these cannot be passed by
            keyword.

    Returns:
        The profile, one entry per block; `Profile.mode` says in which mode the network ran.

    Raises:
        ValueError: No block is selected or it is not clear which; a block cannot be measured; no gradient reaches one.
        TypeError: It is no Flax model, or variables, arrays or the loss are none. An error from inside the model passes
            through.
    """
    _check(cotangent)
    options = {"where": where, "branch": branch, "output": output, "loss": loss, "seed": seed, "mutable": mutable}
    monitor = Monitor(*inputs, **options, level=level, **kwargs)
    return monitor._measure(model, variables, rngs, kernels=True)


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
    level: str = BLOCKS,
    **kwargs: Any,
) -> Profile:
    """`propagate` for several seeds.

    The pass is compiled once per network, not once per seed or initializer: parameters are its arguments.

    Args:
        make: `seed -> model`, an `nnx.Module`, a Linen module, or `(linen_module, variables)`, always the same network
            with other parameters.
        *inputs: As for `propagate`, or functions of a JAX key, which then draw a new input for each seed
            (`spp.noise(shape)`).
        seeds: How many, from 0, or which.
        where: As for `propagate`, likewise what follows.
        branch: The residual branch inside a block.
        output: Which array of a block that returns several.
        cotangent: "gaussian".
        loss: Where the gradient starts.
        rngs: Of the model's call.
        mutable: Of a Linen model.
        level: "block" or "layer".
        **kwargs: Of the model's call.

    Returns:
        A profile whose attributes are medians and whose `quantile` gives the spread.

    Raises:
        ValueError: There is no seed, or `make` returns different networks; otherwise as `propagate`.
    """
    _check(cotangent)
    seeds = tuple(seeds) if isinstance(seeds, Sequence) else tuple(range(operator.index(seeds)))
    if not seeds:
        raise ValueError("seeds is empty: expected a number of seeds, 1 or more, or a sequence of them")
    options = {"where": where, "branch": branch, "output": output, "loss": loss, "mutable": mutable, "level": level}
    monitor = Monitor(*inputs, **options, **kwargs)
    first: Measurement | None = None
    runs, started = [], None
    for seed in seeds:
        made = make(seed)
        model, variables = made if isinstance(made, tuple) else (made, None)
        keys = jax.random.split(stream(seed, INPUT), len(inputs) + 1)
        drawn = [jnp.asarray(x(key)) if callable(x) else x for x, key in zip(inputs, keys, strict=False)]
        measurement, arrays = monitor.prepare(model, variables, rngs, drawn, seed)
        first = first or measurement
        if measurement.program is not first.program:
            raise ValueError(
                f"make({seed}) returned another network than make({seeds[0]}): only the values of parameters may "
                "depend on the seed"
            )
        # While a pass runs, the parameters of the next seed are drawn.
        if started is not None:
            runs.append(measurement.read(started, kernels=not runs))
        started = measurement.start(arrays, stream(seed, COTANGENT))
    runs.append(measurement.read(started, kernels=not runs))
    return measurement.profile(seeds, runs)


def noise(shape: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
    """An input of `propagate_seeds`: N(0, 1) noise of this shape, another for each seed."""
    return lambda key: jax.random.normal(key, tuple(shape), jnp.float32)


def scalars(measured: Profile) -> dict[str, float]:
    """The forward and backward variance of every block by name, `forward_var/<path>` and `backward_var/<path>`."""
    return {
        f"{name}/{path}": float(value)
        for name in ("forward_var", "backward_var")
        for path, value in zip(measured.paths, getattr(measured, name), strict=True)
    }


def _check(cotangent: str) -> None:
    if cotangent != GAUSSIAN:
        raise ValueError(
            f"unknown cotangent={cotangent!r}: expected {GAUSSIAN!r}, at the last block, or loss= for one that comes "
            "from the model's output"
        )
