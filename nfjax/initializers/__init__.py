"""Weight initializers for networks without batch normalization.

Every initializer is called like those of `jax.nn.initializers`, `init(key, shape, dtype)`, for kernels of shape
`[*window, c_in, c_out]` (dense, 1-D to 3-D convolutions), in Flax NNX, Flax Linen and plain JAX, eagerly or under
`jit`, `vmap` and `eval_shape`.

    kernel_init = initializers.standardize(initializers.he_normal("fan_out"))
    kernel_init = initializers.brock_normal()
    kernel_init = initializers.he_effective_fan_out(stride=2, padding="SAME", spatial_size=32)
    kernel_init = initializers.he_normal("fan_out", feature_group_count=64)  # of a grouped or depthwise convolution
"""

from __future__ import annotations

from nfjax import _names
from nfjax.initializers.gains import ACTIVATIONS, Gain, gain
from nfjax.initializers.kernels import (
    Initializer,
    at_layer,
    brock_normal,
    check_initializer,
    he_effective_fan_out,
    he_normal,
    standardize,
)
from nfjax.initializers.taps import effective_taps

INITIALIZERS: dict[str, Initializer] = {
    "he_fan_in": standardize(he_normal("fan_in")),
    "he_fan_out": standardize(he_normal("fan_out")),
    "brock": brock_normal(),
    "he_effective_fan_out": he_effective_fan_out(),
}


def get(init: str | Initializer) -> Initializer:
    """The initializer of that name in `INITIALIZERS`, or `init` itself if it is one; ValueError otherwise."""
    found = _names.lookup("init", init, INITIALIZERS)
    check_initializer(found)
    return found


__all__ = [
    "ACTIVATIONS", "INITIALIZERS", "Gain", "Initializer", "at_layer", "brock_normal", "effective_taps", "gain", "get",
    "he_effective_fan_out", "he_normal", "standardize",
]  # fmt: skip
