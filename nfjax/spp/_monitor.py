"""Signal propagation while a network trains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfjax._flax import ABSENT
from nfjax.spp import _tracing
from nfjax.spp._losses import Loss
from nfjax.spp._measuring import Measurement, prepare
from nfjax.spp._outputs import Output
from nfjax.spp._profile import Profile
from nfjax.spp._propagation import COTANGENT, other_mutable, profile, same, stream
from nfjax.spp._selection import Where
from nfjax.spp._tracing import Runnable


class Monitor:
    """`propagate` for one network again and again, compiled on the first call.

        monitor = spp.Monitor(x)
        ...
        profile = monitor(model)     # every N steps

    inputs, and what follows them: as for `propagate`. One call costs a forward pass and a backward pass without the
    gradients of the parameters, about two thirds of a training step on that batch.
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
        **kwargs: Any,
    ):
        self.inputs, self.kwargs, self.seed, self.mutable = inputs, kwargs, seed, mutable
        self.selection = {"where": where, "branch": branch, "output": output, "loss": loss}
        self._measurement: Measurement | None = None
        self._network: Runnable | None = None

    def __call__(self, model: Any, variables: Any = None, rngs: Any = ABSENT) -> Profile:
        """The profile of the model as it is now, for Linen with `variables`. Another network, or another mode of it,
        compiles again.
        """
        key = jax.random.key(self.seed)
        runnable = _tracing.runnable(model, self.inputs, self.kwargs, variables, rngs, self.mutable, key)
        if self._network is None or not same(self._network, runnable):
            # Only what decides whether another model fits is kept, not the parameters.
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), runnable.arrays)
            other = other_mutable(model, runnable, self.inputs, self.kwargs, rngs, self.seed)
            self._measurement = prepare(runnable, **self.selection, with_mutable=other)
            self._network = dataclasses.replace(runnable, arrays=shapes, modules={})
        started = self._measurement.start(runnable.arrays, stream(self.seed, COTANGENT))
        return profile(self._measurement, [self.seed], [self._measurement.read(started)])


def scalars(measured: Profile) -> dict[str, float]:
    """The forward and backward variance of every block by name, `forward_var/<path>` and `backward_var/<path>`."""
    return {
        f"{name}/{path}": float(value)
        for name in ("forward_var", "backward_var")
        for path, value in zip(measured.paths, getattr(measured, name), strict=True)
    }
