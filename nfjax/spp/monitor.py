"""Signal propagation while a network trains."""

from __future__ import annotations

from typing import Any

import jax

from nfjax.spp import tracing
from nfjax.spp.measuring import Loss, Measurement, prepare
from nfjax.spp.profile import Profile
from nfjax.spp.propagation import profile
from nfjax.spp.selection import Where


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
        loss: str | Loss | None = None,
        seed: int = 0,
        **kwargs: Any,
    ):
        self.inputs, self.kwargs, self.seed = inputs, kwargs, seed
        self.selection = {"where": where, "branch": branch, "loss": loss}
        self._measurement: Measurement | None = None

    def __call__(self, model: Any, variables: Any = None, rngs: Any = None) -> Profile:
        """The profile of the model as it is now; always the same network, for Linen with `variables`."""
        runnable = tracing.runnable(model, self.inputs, self.kwargs, variables, rngs, jax.random.key(self.seed))
        if self._measurement is None:
            self._measurement = prepare(runnable, **self.selection)
        started = self._measurement.start(runnable.arrays, jax.random.key(self.seed))
        return profile(self._measurement, [self.seed], [self._measurement.read(started)])


def scalars(measured: Profile) -> dict[str, float]:
    """The forward and backward variance of every block by name, `forward_var/<path>` and `backward_var/<path>`."""
    return {
        f"{name}/{path}": float(value)
        for name in ("forward_var", "backward_var")
        for path, value in zip(measured.paths, getattr(measured, name), strict=True)
    }
