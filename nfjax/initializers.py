"""Weight initializers for networks without batch normalization.

Every initializer is called like those of `jax.nn.initializers`, `init(key, shape, dtype)`, for kernels of shape
`[*window, c_in, c_out]` (dense, 1-D to 3-D convolutions), in Flax NNX, Flax Linen and plain JAX, eagerly or under
`jit`, `vmap` and `eval_shape`.

The random stream. A kernel is the first `prod(shape)` numbers of the sequence `normal(fold_in(key, 0)), normal(fold_in(key, 1)), ...`
in blocks of 2**16, reshaped in C order: it depends on the key and the number of elements only, and is the same traced and eager.

Eagerly, JAX compiles every operation once per shape, which takes most of the time of building a ResNet. Here one
sampler is compiled for one block and serves all shapes, and concrete kernels are standardized with NumPy on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Shape = Sequence[int]
Initializer = Callable[..., jax.Array]
Mode = Literal["fan_in", "fan_out"]
Padding = str | int | Sequence[int | tuple[int, int]]

_BLOCK = 2**16  # numbers per key of the stream
_MANY = 16  # blocks per call where a kernel has that many


def lookup(what: str, name: Any, table: dict[str, Any]) -> Any:
    """`table[name]`, or `name` itself if it is a callable; ValueError with the known names otherwise."""
    if callable(name):
        return name
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}: expected a callable or one of {', '.join(table)}")


# ---------------------------------------------------------------- activation gains


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

    forward: 1 / E[g(z)^2], keeps the second moment of a layer's input (eq. 1: 2 for ReLU).
    backward: 1 / E[g'(z)^2], keeps the variance of gradients (eq. 2: 2 for ReLU).
    channel: 1 / Var[g(z)], keeps each channel's variance when its weights sum to zero (eq. 3: 2 / (1 - 1/pi) for ReLU).
    """

    forward: float
    backward: float
    channel: float


def gain(activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Gain:
    """The gains of an activation, closed form for ReLU and the identity, else by quadrature over N(0, 1).

    activation: a name in `ACTIVATIONS` or an elementwise JAX function, kinks (if any) at 0.
    """
    return _gain(lookup("activation", activation, ACTIVATIONS))


@functools.cache
def _gain(activation: Callable[[jax.Array], jax.Array]) -> Gain:
    if activation is jax.nn.relu:
        return Gain(2.0, 2.0, 2 / (1 - 1 / math.pi))
    if activation is ACTIVATIONS["linear"]:
        return Gain(1.0, 1.0, 1.0)
    # Gauss-Legendre on each side of 0, so that a kink there costs no accuracy; the density beyond 12 is below 1e-31.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = np.concatenate([6 * nodes - 6, 6 * nodes + 6])
    density = np.tile(6 * weights, 2) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    with jax.ensure_compile_time_eval():
        points = jnp.asarray(z, jnp.float32)
        value = np.asarray(activation(points), np.float64)
        slope = np.asarray(jax.vmap(jax.grad(activation))(points), np.float64)
    mean, second_moment, slope_moment = (float(density @ f) for f in (value, value**2, slope**2))
    variance = second_moment - mean**2
    if not (math.isfinite(second_moment) and math.isfinite(slope_moment) and variance > 0 and slope_moment > 0):
        raise ValueError(
            f"activation {activation} has no finite gain: E[g^2] = {second_moment}, Var[g] = {variance}, "
            f"E[g'^2] = {slope_moment} over z ~ N(0, 1); all three must be finite and positive"
        )
    return Gain(1 / second_moment, 1 / slope_moment, 1 / variance)


# ---------------------------------------------------------------- sampling


@functools.partial(jax.jit, static_argnames="count")
def _sample_blocks(key: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """`count` blocks of the stream, from block `start` on."""
    blocks = start + jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (_BLOCK,), jnp.float32))(blocks).reshape(-1)


def _sample(key: jax.Array, shape: Shape) -> jax.Array | np.ndarray:
    """N(0, 1) in float32, untruncated: a NumPy array for a concrete key, a traced one for a traced key."""
    size = math.prod(shape)
    count = math.ceil(size / _BLOCK)
    if isinstance(key, jax.core.Tracer):
        return _sample_blocks(key, np.uint32(0), count)[:size].reshape(shape)
    # Two compiled sizes serve every kernel: many blocks together are drawn faster, single ones waste less.
    many = count - count % _MANY
    drawn = [_sample_blocks(key, np.uint32(i), _MANY) for i in range(0, many, _MANY)]
    drawn += [_sample_blocks(key, np.uint32(i), 1) for i in range(many, count)]
    out, start = _aligned_empty(size), 0
    for part in map(np.asarray, drawn):
        out[start : start + part.size] = part[: size - start]
        start += part.size
    return out.reshape(shape)


def _aligned_empty(size: int) -> np.ndarray:
    """float32 memory at the 64-byte boundary from which JAX on CPU takes over an array without a copy."""
    raw = np.empty(4 * size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + 4 * size].view(np.float32)


# ---------------------------------------------------------------- initializers


@dataclasses.dataclass(frozen=True)
class Normal:
    """Draws an untruncated normal kernel with mean 0 and the variance that `variance(shape)` gives.

    `jax.nn.initializers.he_normal` draws a TRUNCATED normal, hence this class.
    """

    variance: Callable[[Shape], float]

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        _check_kernel(shape)
        return _finish(_sample(key, shape) * np.float32(math.sqrt(self.variance(shape))), dtype, out_sharding)


@dataclasses.dataclass(frozen=True)
class HeVariance:
    """gain / n_in or gain / n_out (eq. 1 and 2)."""

    mode: Mode
    gain: Gain

    def __call__(self, shape: Shape) -> float:
        c_in, c_out = _check_kernel(shape)
        taps = math.prod(shape[:-2])
        return self.gain.forward / (taps * c_in) if self.mode == "fan_in" else self.gain.backward / (taps * c_out)


@dataclasses.dataclass(frozen=True)
class BrockVariance:
    """gamma^2 / n_in (eq. 3 and 11)."""

    gain: Gain

    def __call__(self, shape: Shape) -> float:
        c_in, _ = _check_kernel(shape)
        return self.gain.channel / (math.prod(shape[:-2]) * c_in)


@dataclasses.dataclass(frozen=True)
class EffectiveFanOutVariance:
    """gain / (c_out * mean number of outputs that one input position feeds)."""

    gain: Gain
    stride: int | tuple[int, ...]
    padding: Padding
    spatial_size: int | tuple[int, ...] | None

    def __call__(self, shape: Shape) -> float:
        _, c_out = _check_kernel(shape)
        return self.gain.backward / (c_out * effective_taps(shape[:-2], self.stride, self.padding, self.spatial_size))


def he_normal(mode: Mode = "fan_in", activation: str | Callable[[jax.Array], jax.Array] = "relu") -> Normal:
    """He et al. 2015, eq. 1 ("fan_in") and eq. 2 ("fan_out") of the paper, before standardization.

    The variance is 2 / n_in or 2 / n_out for ReLU, with n_in = k^2 c_in and n_out = k^2 c_out.
    Wrap it in `standardize` for the paper's scheme.
    """
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"unknown mode {mode!r}: expected 'fan_in' (eq. 1, forward) or 'fan_out' (eq. 2, backward)")
    return Normal(HeVariance(mode, gain(activation)))


@dataclasses.dataclass(frozen=True)
class Standardized:
    """`init`, shifted and scaled to exactly zero mean and exactly the wanted variance. See `standardize`."""

    init: Initializer
    variance: Callable[[Shape], float]
    per: Literal["kernel", "channel"] = "kernel"

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        _, c_out = _check_kernel(shape)
        size = math.prod(shape)
        if size // (c_out if self.per == "channel" else 1) < 2:
            whole = f"output channel of a kernel of shape {tuple(shape)}" if self.per == "channel" else f"kernel of shape {tuple(shape)}"
            raise ValueError(
                f"cannot standardize a {whole}: it has one element, whose variance is 0 whatever it is; "
                "use an initializer without standardize for this layer"
            )
        # A Normal starts from its sample: its own scale would be undone at once.
        kernel = _sample(key, shape) if isinstance(self.init, Normal) else self.init(key, shape, jnp.float32)
        if isinstance(kernel, jax.core.Tracer):
            kernel = _standardize_traced(kernel, self.variance(shape), self.per)
        else:
            kernel = kernel if isinstance(kernel, np.ndarray) else np.array(kernel)
            kernel = _standardize_values(kernel, self.variance(shape), self.per)
        return _finish(kernel, dtype, out_sharding)


def standardize(
    init: Initializer,
    per: Literal["kernel", "channel"] = "kernel",
    variance: float | Callable[[Shape], float] | None = None,
) -> Standardized:
    """Wraps an initializer so that the drawn kernel has exactly zero mean and exactly the wanted population variance.

    init: `(key, shape, dtype) -> kernel`. per: "kernel" for statistics over the whole kernel, "channel" for each output channel
    (the last axis) on its own. variance: a number or `shape -> number`; left out, that of `init` (any initializer
    of this module has one). The statistics are computed in float32, before the cast to `dtype`.

    Raises ValueError for a kernel of one element or of rank below 2, and where no variance is known.
    """
    if per not in ("kernel", "channel"):
        raise ValueError(f"unknown per={per!r}: expected 'kernel' or 'channel'")
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
    """Brock et al. 2020, eq. 3 and 11: each output channel has mean 0 and variance gamma^2 / n_in, gamma^2 = 2 / (1 - 1/pi) for ReLU."""
    return standardize(Normal(BrockVariance(gain(activation))), per="channel")


@dataclasses.dataclass(frozen=True)
class EffectiveFanOut(Standardized):
    """He's fan-out with the taps that a strided, zero-padded convolution really has. See `he_effective_fan_out`."""

    def at(self, stride: int | tuple[int, ...], padding: Padding, spatial_size: int | tuple[int, ...]) -> EffectiveFanOut:
        """This initializer for a layer with the given geometry."""
        variance = dataclasses.replace(self.variance, stride=stride, padding=padding, spatial_size=spatial_size)
        return EffectiveFanOut(Normal(variance), variance)


def he_effective_fan_out(
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    spatial_size: int | Sequence[int] | None = None,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
) -> EffectiveFanOut:
    """Variance 2 / n_out with n_out counted, not assumed: the mean number of outputs that one input element feeds.

    The paper's n_out = k^2 c_out holds for stride 1 and no border. A stride s leaves k^2 c_out / s^2, and zero padding
    drops the taps beyond the image (`effective_taps`). Beyond the paper; Henmi et al. 2020 (arXiv 2008.06885) is a relative for plain CNNs.
    Standardized over the whole kernel.

    stride, padding: as for the layer. spatial_size: height and width of the layer's INPUT in pixels;
    None means an image without borders, where only the stride counts.
    """
    stride = stride if isinstance(stride, int) else tuple(stride)
    spatial_size = spatial_size if spatial_size is None or isinstance(spatial_size, int) else tuple(spatial_size)
    variance = EffectiveFanOutVariance(gain(activation), stride, padding, spatial_size)
    return EffectiveFanOut(Normal(variance), variance)


def effective_taps(
    window: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    spatial_size: int | Sequence[int] | None = None,
) -> float:
    """The mean number of output positions that one input position feeds: at most `prod(window)`, less where strides or borders drop taps.

    window, stride, spatial_size: one entry per spatial axis, or one integer for all. padding: "SAME", "VALID", "CIRCULAR" (no tap is lost),
    an integer, or one integer or `(low, high)` per axis.
    """
    rank = len(window)
    strides = _per_axis("stride", stride, rank)
    if any(s < 1 for s in strides):
        raise ValueError(f"stride={stride} must be positive")
    if rank == 0 or spatial_size is None or (isinstance(padding, str) and padding.upper() == "CIRCULAR"):
        return math.prod(k / s for k, s in zip(window, strides, strict=True))
    sizes = _per_axis("spatial_size", spatial_size, rank)
    total = 1.0
    for k, s, size, (low, high) in zip(window, strides, sizes, _padding(padding, window, strides, sizes), strict=True):
        outputs = (size + low + high - k) // s + 1
        if size < 1 or outputs < 1:
            raise ValueError(f"a window of {k} with padding {(low, high)} does not fit an input of {size} pixels")
        positions = s * np.arange(outputs)[:, None] + np.arange(k)[None, :] - low
        total *= np.count_nonzero((positions >= 0) & (positions < size)) / size
    return total


def at_layer(init: Initializer, stride: int | tuple[int, ...], padding: Padding, spatial_size: int | tuple[int, ...]) -> Initializer:
    """The initializer for one convolution: `init` itself, unless it depends on the layer's geometry (`he_effective_fan_out`)."""
    return init.at(stride, padding, spatial_size) if hasattr(init, "at") else init


# ---------------------------------------------------------------- details


def _constant(value: float, shape: Shape) -> float:
    del shape
    return value


def _check_kernel(shape: Shape) -> tuple[int, int]:
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)} is no kernel: expected [*window, c_in, c_out], rank 2 or more, no empty axis")
    return shape[-2], shape[-1]


def _standardize_values(kernel: Any, variance: float, per: str) -> Any:
    """In place for a NumPy kernel. Averages in stages (c_in, window, c_out), so that float32 sums of millions of terms stay exact to rounding."""
    taps = kernel.reshape(-1, *kernel.shape[-2:])

    def over(means: Any) -> Any:  # [window, c_out], over c_in -> [c_out] or [1]
        means = means.mean(axis=0)
        return means if per == "channel" else means.mean(keepdims=True)

    taps -= over(taps.mean(axis=1))
    # On the host without a temporary of the kernel's size: fresh memory costs more than the arithmetic.
    squares = np.einsum("kio,kio->ko", taps, taps) / taps.shape[1] if isinstance(taps, np.ndarray) else (taps * taps).mean(axis=1)
    taps *= math.sqrt(variance) / over(squares) ** 0.5
    return taps.reshape(kernel.shape)


_standardize_traced = jax.jit(_standardize_values, static_argnames=("variance", "per"))


def _finish(kernel: Any, dtype: Any, out_sharding: Any) -> jax.Array:
    kernel = kernel.astype(jnp.float32 if dtype is None else dtype, copy=False)
    if isinstance(kernel, np.ndarray) or out_sharding is not None:
        return jax.device_put(kernel, out_sharding, may_alias=True)
    return kernel


def _per_axis(what: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"{what}={value} has {len(values)} entries for a window with {rank} axes")
    return values


def _padding(padding: Padding, window: Sequence[int], strides: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(f"unknown padding {padding!r}: expected 'SAME', 'VALID', 'CIRCULAR', an integer or one pair per axis")
        return [tuple(p) for p in jax.lax.padtype_to_pads(sizes, window, strides, padding.upper())]
    if isinstance(padding, int):
        padding = (padding,) * len(window)
    pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    if len(pairs) != len(window):
        raise ValueError(f"padding={padding} has {len(pairs)} entries for a window with {len(window)} axes")
    return pairs


# ---------------------------------------------------------------- the table


INITIALIZERS: dict[str, Initializer] = {
    "he_fan_in": standardize(he_normal("fan_in")),
    "he_fan_out": standardize(he_normal("fan_out")),
    "brock": brock_normal(),
    "he_effective_fan_out": he_effective_fan_out(),
}


def get(init: str | Initializer) -> Initializer:
    """The initializer of that name in `INITIALIZERS`, or `init` itself if it is a callable."""
    return lookup("init", init, INITIALIZERS)
