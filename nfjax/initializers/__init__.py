"""Weight initializers for networks without batch normalization.

Every initializer is called like those of `jax.nn.initializers`, `init(key, shape, dtype)`, for kernels of shape
`[*window, c_in, c_out]` (dense, 1-D to 3-D convolutions), in Flax NNX, Flax Linen and plain JAX, eagerly or under
`jit`, `vmap` and `eval_shape`::

    kernel_init = initializers.he_fan_out()  # the paper's; standardize(he_normal("fan_out")) is the same
    kernel_init = initializers.brock_normal()
    kernel_init = initializers.he_effective_fan_out(stride=2, padding="SAME", spatial_size=32)
    kernel_init = initializers.he_normal("fan_out", feature_group_count=64)  # of a grouped or depthwise convolution
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from nfjax import _names
from nfjax.initializers._gains import ACTIVATIONS, Gain, gain
from nfjax.initializers._kernels import (
    Initializer,
    at_layer,
    behind,
    brock,
    brock_normal,
    check_initializer,
    delta_orthogonal,
    he_effective_fan_out,
    he_fan_in,
    he_fan_out,
    he_normal,
    standardize,
)
from nfjax.initializers._taps import effective_taps

# Behind a ReLU; each is what the function of that name returns.
INITIALIZERS: dict[str, Initializer] = {
    "he_fan_in": he_fan_in(),
    "he_fan_out": he_fan_out(),
    "brock": brock(),
    "he_effective_fan_out": he_effective_fan_out(),
    "delta_orthogonal": delta_orthogonal(),
}
# JAX's own by the names that they have there. They know of no activation, and are taken as they are.
OF_JAX: dict[str, Initializer] = {
    name: getattr(jax.nn.initializers, name)()
    for name in ("glorot_normal", "glorot_uniform", "he_uniform", "lecun_normal", "lecun_uniform", "orthogonal")
}


def get(init: str | Initializer, activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Initializer:
    """An initializer by its name, or as it is.

    Args:
        init: A name in `INITIALIZERS` or `OF_JAX`, or any `(key, shape, dtype) -> kernel`.
        activation: In front of the layers, a name in `ACTIVATIONS` or an elementwise function: whose gain is meant by a
            name. An initializer that is given itself has its own.

    Raises:
        ValueError: It is neither, or the activation has no finite gain.
    """
    found = _names.lookup("init", init, INITIALIZERS | OF_JAX)
    check_initializer(found)
    return behind(found, activation) if isinstance(init, str) else found


__all__ = [
    "ACTIVATIONS", "INITIALIZERS", "OF_JAX", "Gain", "Initializer", "at_layer", "behind", "brock", "brock_normal",
    "delta_orthogonal", "effective_taps", "gain", "get", "he_effective_fan_out", "he_fan_in", "he_fan_out", "he_normal",
    "standardize",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
