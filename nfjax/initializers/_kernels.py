"""The initializers: the variance that each wants, and the exact statistics that `standardize` gives them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nfjax.initializers._checks import Shape, check_dtype, check_groups, check_kernel, per_group, size_at
from nfjax.initializers._gains import Gain, gain
from nfjax.initializers._standardizing import standardize_traced, standardize_values
from nfjax.initializers._stream import sample
from nfjax.initializers._taps import Padding, effective_taps

Initializer = Callable[..., jax.Array]
Mode = Literal["fan_in", "fan_out"]


@dataclasses.dataclass(frozen=True)
class Normal:
    """Draws an untruncated normal kernel with mean 0 and the variance that `variance(shape)` gives.

    `jax.nn.initializers.he_normal` draws a TRUNCATED normal, hence this class.
    """

    variance: Callable[[Shape], float]

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        check_kernel(shape)
        check_dtype(dtype)
        return _finish(sample(key, shape) * np.float32(math.sqrt(self.variance(shape))), dtype, out_sharding)


@dataclasses.dataclass(frozen=True)
class HeVariance:
    """gain / n_in or gain / n_out (eq. 1 and 2)."""

    mode: Mode
    gain: Gain
    groups: int = 1
    in_axis: int = -2
    out_axis: int = -1

    def __call__(self, shape: Shape) -> float:
        check_kernel(shape)
        c_in, c_out = (size_at(shape, axis) for axis in (self.in_axis, self.out_axis))
        taps, fed = math.prod(shape) // (c_in * c_out), per_group(shape, c_out, self.groups)
        return self.gain.forward / (taps * c_in) if self.mode == "fan_in" else self.gain.backward / (taps * fed)


@dataclasses.dataclass(frozen=True)
class BrockVariance:
    """gamma^2 / n_in (eq. 3 and 11)."""

    gain: Gain

    def __call__(self, shape: Shape) -> float:
        c_in, _ = check_kernel(shape)
        return self.gain.channel / (math.prod(shape[:-2]) * c_in)


@dataclasses.dataclass(frozen=True)
class EffectiveFanOutVariance:
    """gain / (c_out * mean number of outputs that one input position feeds)."""

    gain: Gain
    stride: int | tuple[int, ...]
    padding: Padding
    spatial_size: int | tuple[int, ...] | None
    groups: int = 1

    def __call__(self, shape: Shape) -> float:
        _, c_out = check_kernel(shape)
        fed = per_group(shape, c_out, self.groups)
        return self.gain.backward / (fed * effective_taps(shape[:-2], self.stride, self.padding, self.spatial_size))


def he_normal(
    mode: Mode = "fan_in",
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    *,
    feature_group_count: int = 1,
    in_axis: int = -2,
    out_axis: int = -1,
) -> Normal:
    """He et al. 2015, eq. 1 ("fan_in") and eq. 2 ("fan_out") of the paper, before standardization.

    The variance is 2 / n_in or 2 / n_out for ReLU, with n_in = k^2 c_in and n_out = k^2 c_out.
    Wrap it in `standardize` for the paper's scheme.

    Args:
        mode: Which signal keeps its variance.
        activation: In front of the layer, a name in `ACTIVATIONS` or an elementwise function.
        feature_group_count: Groups of the convolution, as Flax and JAX call it. Its kernel, of shape
            `[..., c_in / groups, c_out]`, does not show them: each input channel feeds the outputs of its own group,
            n_out = k^2 c_out / groups (for a depthwise convolution k^2 times its multiplier), while n_in is that of the
            shape.
        in_axis: Where the input channels are, for kernels of another layout, as in `jax.nn.initializers`: -1 for a
            transposed convolution with `transpose_kernel=True`.
        out_axis: Likewise of the output channels, -2 there.

    Raises:
        ValueError: The mode is unknown or, when a kernel is drawn, the groups do not divide c_out.
    """
    groups = check_groups(feature_group_count)
    if not isinstance(in_axis, int) or not isinstance(out_axis, int) or in_axis == out_axis:
        raise ValueError(f"in_axis={in_axis!r}, out_axis={out_axis!r}: expected two different axes, such as -2 and -1")
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"unknown mode {mode!r}: expected 'fan_in' (eq. 1, forward) or 'fan_out' (eq. 2, backward)")
    return Normal(HeVariance(mode, gain(activation), groups, in_axis, out_axis))


@dataclasses.dataclass(frozen=True)
class Standardized:
    """`init`, shifted and scaled to exactly zero mean and exactly the wanted variance. See `standardize`."""

    init: Initializer
    variance: Callable[[Shape], float]
    per: Literal["kernel", "channel"] = "kernel"

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        _, c_out = check_kernel(shape)
        size = math.prod(shape)
        if size // (c_out if self.per == "channel" else 1) < 2:
            whole = (
                f"output channel of a kernel of shape {tuple(shape)}"
                if self.per == "channel"
                else f"kernel of shape {tuple(shape)}"
            )
            raise ValueError(
                f"cannot standardize a {whole}: it has one element, whose variance is 0 whatever it is; "
                "use an initializer without standardize for this layer"
            )
        check_dtype(dtype)
        variance = self.variance(shape)
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"variance {variance} of a kernel of shape {tuple(shape)} must be finite and positive")
        # A Normal starts from its sample: its own scale would be undone at once.
        drawn = sample(key, shape) if isinstance(self.init, Normal) else self.init(key, shape, jnp.float32)
        if getattr(drawn, "shape", None) != tuple(shape):
            found = type(drawn).__name__ if not hasattr(drawn, "shape") else f"an array of shape {drawn.shape}"
            raise ValueError(f"{self.init} drew {found}: expected an array of shape {tuple(shape)}")
        if isinstance(drawn, jax.core.Tracer):
            kernel = standardize_traced(drawn, variance, self.per)
        else:
            own = isinstance(self.init, Normal)  # else somebody may still hold the array
            kernel = standardize_values(drawn if own else np.array(drawn, np.float32), variance, self.per)
            if not np.isfinite(kernel.sum()):
                raise ValueError(f"cannot standardize what {self.init} drew: it is constant, or not finite")
        return _finish(kernel, dtype, out_sharding)


def standardize(
    init: Initializer,
    per: Literal["kernel", "channel"] = "kernel",
    variance: float | Callable[[Shape], float] | None = None,
) -> Standardized:
    """Wraps an initializer so that the drawn kernel has exactly zero mean and exactly the wanted population variance.

    The statistics are computed in float32, before the cast to `dtype`.

    Args:
        init: `(key, shape, dtype) -> kernel`.
        per: "kernel" for statistics over the whole kernel, "channel" for each output channel (the last axis) on its
            own.
        variance: A number or `shape -> number`; left out, that of `init` (any initializer of this module has one).

    Returns:
        `(key, shape, dtype) -> kernel`.

    Raises:
        ValueError: It is no initializer (one that was not called, such as `jax.nn.initializers.he_normal`), or no
            variance is known; when a kernel is drawn, it has one element, or rank below 2.
    """
    check_initializer(init)
    if per not in ("kernel", "channel"):
        raise ValueError(f"unknown per={per!r}: expected 'kernel' or 'channel'")
    if variance is None and isinstance(init, Standardized) and init.per == per:
        return init
    if variance is None:
        variance = getattr(init, "variance", None)
        if variance is None:
            raise ValueError(f"{init} does not say the variance it draws with; pass standardize(init, variance=...)")
    if not callable(variance):
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"variance={variance} must be finite and positive")
        variance = functools.partial(_constant, float(variance))
    return Standardized(init, variance, per)


def brock_normal(activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Standardized:
    """Brock et al. 2020, eq. 3 and 11 of the paper: each output channel has mean 0 and variance gamma^2 / n_in.

    gamma^2 = 2 / (1 - 1/pi) for ReLU. Of a grouped convolution n_in is that of the kernel's shape, whatever the number
    of groups.

    Args:
        activation: In front of the layer, a name in `ACTIVATIONS` or an elementwise function.
    """
    return standardize(Normal(BrockVariance(gain(activation))), per="channel")


@dataclasses.dataclass(frozen=True)
class EffectiveFanOut(Standardized):
    """He's fan-out with the taps that a strided, zero-padded convolution really has. See `he_effective_fan_out`."""

    def at(
        self, stride: int | tuple[int, ...], padding: Padding, spatial_size: int | tuple[int, ...]
    ) -> EffectiveFanOut:
        """This initializer for a layer with the given geometry."""
        variance = dataclasses.replace(self.variance, stride=stride, padding=padding, spatial_size=spatial_size)
        return EffectiveFanOut(Normal(variance), variance)


def he_effective_fan_out(
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    spatial_size: int | Sequence[int] | None = None,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    *,
    feature_group_count: int = 1,
) -> EffectiveFanOut:
    """Variance 2 / n_out with n_out counted, not assumed: the mean number of outputs that one input element feeds.

    The paper's n_out = k^2 c_out holds for stride 1 and no border. A stride s leaves k^2 c_out / s^2, and zero padding
    drops the taps beyond the image (`effective_taps`). Beyond the paper; Henmi et al. 2020 (arXiv 2008.06885) is a
    relative for plain CNNs. Standardized over the whole kernel.

    Args:
        stride: Of the layer.
        padding: Of the layer.
        spatial_size: Height and width of the layer's INPUT in pixels; None means an image without borders, where only
            the stride counts.
        activation: In front of the layer, a name in `ACTIVATIONS` or an elementwise function.
        feature_group_count: As in `he_normal`.

    Raises:
        ValueError: An argument cannot be used.
    """
    stride = stride if isinstance(stride, int) else tuple(stride)
    spatial_size = spatial_size if spatial_size is None or isinstance(spatial_size, int) else tuple(spatial_size)
    groups = check_groups(feature_group_count)
    variance = EffectiveFanOutVariance(gain(activation), stride, padding, spatial_size, groups)
    return EffectiveFanOut(Normal(variance), variance)


@dataclasses.dataclass(frozen=True)
class DeltaOrthogonal:
    """An orthogonal matrix in the middle of the window, zeros around it. See `delta_orthogonal`."""

    gain: Gain

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        channels = check_kernel(shape)
        check_dtype(dtype)
        matrix = jax.nn.initializers.orthogonal(math.sqrt(self.gain.backward))(key, channels, jnp.float32)
        middle = tuple((k - 1) // 2 for k in shape[:-2])
        return _finish(jnp.zeros(shape, jnp.float32).at[middle].set(matrix), dtype, out_sharding)


def at_layer(
    init: Initializer, stride: int | tuple[int, ...], padding: Padding, spatial_size: int | tuple[int, ...]
) -> Initializer:
    """The initializer for one convolution: `init` itself, unless it depends on the layer's geometry
    (`he_effective_fan_out`).

    Args:
        init: An initializer.
        stride: Of the layer.
        padding: Of the layer.
        spatial_size: Height and width of its input in pixels.
    """
    return init.at(stride, padding, spatial_size) if hasattr(init, "at") else init


def behind(init: Initializer, activation: str | Callable[[jax.Array], jax.Array]) -> Initializer:
    """The initializer for layers behind this activation: `init` with that one's gain, or `init` itself where it has no
    gain (it is not of this module).

    Args:
        init: An initializer.
        activation: A name in `ACTIVATIONS` or an elementwise function.
    """
    if isinstance(init, DeltaOrthogonal):
        return DeltaOrthogonal(gain(activation))
    if not isinstance(init, Normal | Standardized) or not hasattr(init.variance, "gain"):
        return init
    variance = dataclasses.replace(init.variance, gain=gain(activation))
    changes = {"init": behind(init.init, activation)} if isinstance(init, Standardized) else {}
    return dataclasses.replace(init, variance=variance, **changes)


# ---------------------------------------------------------------- by name


def he_fan_in(activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Standardized:
    """The paper's first rule (eq. 1), standardized: the whole kernel has mean 0 and variance gain / n_in, which keeps
    the second moment of the signal on its way forward.

    Args:
        activation: In front of the layer, a name in `ACTIVATIONS` or an elementwise function.
    """
    return standardize(he_normal("fan_in", activation))


def he_fan_out(activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Standardized:
    """The paper's scheme (eq. 2), standardized: the whole kernel has mean 0 and variance gain / n_out, which keeps the
    variance of the gradient on its way back.

    Args:
        activation: In front of the layer, a name in `ACTIVATIONS` or an elementwise function.
    """
    return standardize(he_normal("fan_out", activation))


def brock(activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Standardized:
    """`brock_normal`, by the name that it has in `INITIALIZERS`.

    Args:
        activation: In front of the layer, a name in `ACTIVATIONS` or an elementwise function.
    """
    return brock_normal(activation)


def delta_orthogonal(activation: str | Callable[[jax.Array], jax.Array] = "relu") -> DeltaOrthogonal:
    """Xiao et al. 2018: in the middle of the window an orthogonal matrix times the square root of the backward gain, as
    `jax.nn.initializers.orthogonal` draws it, and zeros around it.

    Where there are fewer channels out than in, its columns are orthonormal, and a part of the signal is lost (JAX's
    initializer of this name refuses such a kernel).

    Args:
        activation: In front of the layer, a name in `ACTIVATIONS` or an elementwise function.
    """
    return DeltaOrthogonal(gain(activation))


def _constant(value: float, shape: Shape) -> float:
    del shape
    return value


def check_initializer(init: Any, what: str = "init") -> None:
    """ValueError for what cannot be called as `init(key, shape, dtype)`, or draws no array.

    Tried without computing anything. An initializer that is made for certain shapes may raise here: it is left alone.
    """
    if isinstance(init, Normal | Standardized | DeltaOrthogonal):
        return
    name = getattr(init, "__qualname__", repr(init))
    if not callable(init):
        raise ValueError(f"{what}={name}: expected an initializer, a function (key, shape, dtype) -> kernel")
    advice = f"an initializer draws a kernel by (key, shape, dtype); was it not called, as in {name}()?"
    shape, found = (3, 3, 2, 2), []
    makers = (
        he_normal,
        brock_normal,
        he_fan_in,
        he_fan_out,
        brock,
        he_effective_fan_out,
        delta_orthogonal,
        standardize,
    )
    if init in makers:
        raise ValueError(f"{what}={name}: {advice}")
    try:
        inspect.signature(init).bind(None, shape, jnp.float32)
    except TypeError as error:
        raise ValueError(f"{what}={name} cannot be called with key, shape and dtype ({error}): {advice}") from None
    except ValueError:  # no signature is known of what is not written in Python
        return

    def draw(key: jax.Array) -> None:
        drawn = init(key, shape, jnp.float32)
        found.append("" if hasattr(drawn, "dtype") else type(drawn).__name__)

    with contextlib.suppress(Exception):
        jax.eval_shape(draw, jax.random.key(0))
    if found and found[0]:
        raise ValueError(f"{what}={name} returns a {found[0]}: {advice}")


def _finish(kernel: Any, dtype: Any, out_sharding: Any) -> jax.Array:
    kernel = kernel.astype(jnp.float32 if dtype is None else dtype, copy=False)
    if isinstance(kernel, np.ndarray) or out_sharding is not None:
        return jax.device_put(kernel, out_sharding, may_alias=True)
    return kernel
