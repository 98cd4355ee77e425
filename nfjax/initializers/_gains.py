"""What activations do to the variance of a signal, and the factors that undo it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nfjax import _names

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class Gain:
    """What an activation g does to z ~ N(0, 1), as the factors that undo it.

    Attributes:
        forward: 1 / E[g(z)^2], keeps the second moment of a layer's input (eq. 1: 2 for ReLU).
        backward: 1 / E[g'(z)^2], keeps the variance of gradients (eq. 2: 2 for ReLU).
        channel: 1 / Var[g(z)], keeps each channel's variance when its weights sum to zero (eq. 3: 2 / (1 - 1/pi) for
            ReLU).
    """

    forward: float
    backward: float
    channel: float


def gain(activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Gain:
    """The gains of an activation, closed form for ReLU and the identity, else by quadrature over N(0, 1).

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise JAX function, kinks (if any) at 0.

    Raises:
        ValueError: The name is unknown, or a gain is not finite and positive.
    """
    return _gain(_names.lookup("activation", activation, ACTIVATIONS))


@functools.cache
def _gain(activation: Callable[[jax.Array], jax.Array]) -> Gain:
    if activation is jax.nn.relu:
        return Gain(2.0, 2.0, 2 / (1 - 1 / math.pi))
    if activation is ACTIVATIONS["linear"]:
        return Gain(1.0, 1.0, 1.0)
    second_moment, variance, slope_moment = normal_moments(activation)
    if not (math.isfinite(second_moment) and math.isfinite(slope_moment) and variance > 0 and slope_moment > 0):
        raise ValueError(
            f"activation {activation} has no finite gain: E[g^2] = {second_moment}, Var[g] = {variance}, "
            f"E[g'^2] = {slope_moment} over z ~ N(0, 1); all three must be finite and positive"
        )
    return Gain(1 / second_moment, 1 / slope_moment, 1 / variance)


def normal_moments(function: Callable[[jax.Array], jax.Array]) -> tuple[float, float, float]:
    """(E[g(z)^2], Var[g(z)], E[g'(z)^2]) over z ~ N(0, 1) of an elementwise function with kinks, if any, at 0."""
    # Gauss-Legendre on each side of 0, so that a kink there costs no accuracy; the density beyond 12 is below 1e-31.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = np.concatenate([6 * nodes - 6, 6 * nodes + 6])
    density = np.tile(6 * weights, 2) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    with jax.ensure_compile_time_eval():
        points = jnp.asarray(z, jnp.float32)
        value = np.asarray(function(points), np.float64)
        slope = np.asarray(jax.vmap(jax.grad(function))(points), np.float64)
    mean, second_moment, slope_moment = (float(density @ f) for f in (value, value**2, slope**2))
    return second_moment, second_moment - mean**2, slope_moment
