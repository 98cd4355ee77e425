"""The variances that the paper's analysis predicts for our networks, in closed form, beside what is measured.

A convolution with zero-mean weights of variance v multiplies, rule by rule:

- forward (rule 1, eq. 1): E[y^2] = v n_in E[z^2], and E[z^2] = E[x^2] / 2 behind a ReLU. Where each output channel's
  weights sum to zero (eq. 3), the mean of z drops out: E[y^2] = v n_in Var[z], Var[z] = E[x^2] (1 - 1/pi) / 2.
- backward (rule 2, eq. 2): Var[dL/dz] = v n_out Var[dL/dy], and half of it passes the ReLU.
- another activation g in place of ReLU, with dynamic tanh or erf in front of it: E[g(x)^2] and E[g'(x)^2] over a normal
  x of that variance, by quadrature.
- sum (rule 3, eq. 5): independent terms add, a^2 in front of the shortcut's and b^2 in front of the branch's, both
  ways; beta^2 divides what the branch reads, and what flows back through it.

n_in = taps c_in and n_out = taps c_out, with the taps that strides and zero padding leave, counted exactly. A
transition is thereby a block like any other: its stride leaves a quarter of the taps to the way back. v is the kernels'
own.

Where it breaks. Each element is taken to be normal with mean 0, independent of the gradient; borders are averaged over
the image, not followed; and the channel means of a kernel that is standardized as a whole are sampled anew in every
block, which adds a spread that no mean value shows. Batch norm's gradient is taken without the terms that project out
mean and scale, and with the variance within channels as its divisor; group norm's likewise, with that within groups,
each image as good as the whole batch. Max-pooling has no closed form: behind the
ImageNet stem, forward variances are NaN.

How far the measurement then lies, at 32x32 pixels (results/figure2.md, figure6.md): within sampling error over a few
bottleneck blocks; the gradient at the first block 1.2 to 1.3 times above the closed form over ResNet-18 and -50 with
He's fan-out, 3 times over ResNet-101, with Brock's 1.4, 1.7 and 5 times, with batch norm 0.7 to 0.9 times; the
activations at the last block within a factor of 2 or 3, with Brock's scheme up to 4 times above.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfjax import layers, resnet
from nfjax.initializers import effective_taps
from nfjax.initializers._gains import normal_moments

# Behind a ReLU, of x ~ N(0, q): E[z^2] / q, and (E z)^2 / E[z^2].
_HALF = 0.5
_MEAN_SHARE = 1 / math.pi


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The closed-form variances of a network, one entry per block in execution order.

    Attributes:
        paths: Of the blocks.
        forward_var: Of the block outputs, for an input with variance 1.
        backward_var: Of the gradient there, for one with variance 1 at the last block.
    """

    paths: tuple[str, ...]
    forward_var: np.ndarray
    backward_var: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Signal:
    """At one place: second moment of an element, the share of it that is the squared mean of its channel, size in
    pixels.
    """

    moment: float
    mean_share: float
    size: tuple[int, int]


class NoClosedFormError(Exception):
    """Of this layer, or block."""


def predict(model: nnx.Module, input_shape: Sequence[int]) -> Prediction | None:
    """The paper's variances for one of our networks, from the variances of its kernels.

    Args:
        model: A `resnet.PreActResNet`.
        input_shape: [B, H, W, 3] or [H, W, 3].

    Returns:
        The prediction; None where a part of the network has no closed form: a block that is no sum with coefficients,
        a norm or a stem of one's own.

    Raises:
        TypeError: It is another model.
        ValueError: The shape is none of images.
    """
    try:
        return _predict(model, input_shape)
    except NoClosedFormError:
        return None


def _predict(model: nnx.Module, input_shape: Sequence[int]) -> Prediction:
    if not isinstance(model, resnet.PreActResNet):
        raise TypeError(f"spp.predict knows the networks of nfjax.resnet only, not {type(model).__name__}")
    if len(input_shape) not in (3, 4) or input_shape[-1] != 3:
        raise ValueError(f"input_shape={tuple(input_shape)}: expected [B, H, W, 3] or [H, W, 3]")
    signal = _Signal(1.0, 0.0, tuple(input_shape[-3:-1]))
    if isinstance(model.stem, resnet.CifarStem):
        signal, _ = _convolve(model.stem.conv, signal)
    elif isinstance(model.stem, resnet.ImageNetStem):
        signal = _Signal(math.nan, 0.0, model.stem.spatial_size)
    else:
        raise NoClosedFormError(model.stem)
    forward, gains = [], []
    for block in model.blocks:
        signal, gain = _block(block, signal)
        forward.append(signal.moment)
        gains.append(gain)
    # The gradient at a block's output is what the blocks behind it multiply it by.
    backward = np.cumprod([1.0, *reversed(gains[1:])])[::-1]
    return Prediction(tuple(f"blocks/{i}" for i in range(len(gains))), np.array(forward), backward)


def _block(block: resnet.Block, x: _Signal) -> tuple[_Signal, float]:
    """The signal behind a block, and what the block multiplies the gradient's variance by."""
    if type(block).__call__ is not resnet.Block.__call__ or type(block.branch).__call__ is not resnet.Branch.__call__:
        raise NoClosedFormError(block)
    a, b, beta = (float(coefficient) ** 2 for coefficient in block.residual.coefficients())
    z, through_activation = _activate(block.activation, dataclasses.replace(x, moment=x.moment / beta))
    through_activation /= beta
    branch, branch_gain = z, through_activation
    for i, convolution in enumerate(block.branch.convolutions):
        if i > 0:
            branch, gain = _activate(block.branch.activations[i - 1], branch)
            branch_gain *= gain
        branch, gain = _convolve(convolution, branch)
        branch_gain *= gain
    shortcut, shortcut_gain = x, 1.0
    if block.residual.shortcut is not None:
        shortcut, shortcut_gain = _convolve(block.residual.shortcut, z)
        shortcut_gain *= through_activation
    parts = a * shortcut.moment, b * branch.moment
    moment = sum(parts)
    mean_share = (parts[0] * shortcut.mean_share + parts[1] * branch.mean_share) / moment if moment else 0.0
    return _Signal(moment, mean_share, branch.size), a * shortcut_gain + b * branch_gain


def _activate(activation: layers.Activation, x: _Signal) -> tuple[_Signal, float]:
    """(Norm and) activation: what passes of the second moment, and of the gradient."""
    if type(activation) is not layers.Activation or any(
        bias is not None and bias[...] != 0 for bias in (activation.before, activation.behind)
    ):
        raise NoClosedFormError(activation)
    function, norm, moment, through = activation.function, activation.norm, x.moment, 1.0
    if isinstance(norm, nnx.BatchNorm | nnx.GroupNorm):
        # The means of channels whose statistics are taken together are part of their variance.
        together = norm.group_size if isinstance(norm, nnx.GroupNorm) else 1
        moment, through = 1.0, 1 / (x.moment * (1 - x.mean_share / together))
    elif isinstance(norm, layers.DynamicTanh):
        if (norm.scale[...] != 1).any() or (norm.bias[...] != 0).any():
            raise NoClosedFormError(norm)
        function = _Chain(norm.squashed, function)
    elif norm is not None:
        raise NoClosedFormError(norm)
    second, slope, mean_share = _of_normal(function, moment)
    return _Signal(second, mean_share, x.size), slope * through


@dataclasses.dataclass(frozen=True)
class _Chain:
    """One elementwise function behind another."""

    first: layers.Elementwise
    second: layers.Elementwise

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


def _of_normal(function: layers.Elementwise, moment: float) -> tuple[float, float, float]:
    """(E[g(x)^2], E[g'(x)^2], E[g(x)]^2 / E[g(x)^2]) over x ~ N(0, moment)."""
    if isinstance(function, layers.Scaled):
        second, slope, mean_share = _of_normal(function.function, moment)
        return function.factor**2 * second, function.factor**2 * slope, mean_share
    if function is jax.nn.relu:
        return _HALF * moment, _HALF, _MEAN_SHARE
    if not math.isfinite(moment):
        return math.nan, math.nan, 0.0
    deviation = math.sqrt(moment)
    second, variance, slope = normal_moments(lambda z: function(deviation * z))
    return second, slope / moment if moment else math.nan, 1 - variance / second if second else 0.0


def _convolve(convolution: Any, z: _Signal) -> tuple[_Signal, float]:
    if not isinstance(convolution, nnx.Conv):
        raise NoClosedFormError(convolution)
    standardized = isinstance(convolution, layers.StandardizedConv)
    kernel = np.asarray(convolution.standardized() if standardized else convolution.kernel[...], np.float64)
    variance = float(np.mean(kernel**2))
    sums = kernel.sum(axis=(0, 1, 2)) / math.prod(kernel.shape[:-1])
    zero_sum = bool(np.max(np.abs(sums)) < 1e-4 * math.sqrt(variance))
    window, strides = convolution.kernel_size, tuple(np.broadcast_to(convolution.strides, (2,)).tolist())
    fed = effective_taps(window, strides, convolution.padding, z.size)  # outputs that an input position feeds
    size = tuple((n - 1) // s + 1 for n, s in zip(z.size, strides, strict=True))
    read = fed * math.prod(z.size) / math.prod(size)  # inputs that an output position reads
    c_in, c_out = kernel.shape[-2:]
    moment = variance * c_in * read * z.moment
    # Weights that sum to zero see no common mean; others turn it into different means of the output channels.
    if zero_sum:
        return _Signal(moment * (1 - z.mean_share), 0.0, size), variance * c_out * fed
    return _Signal(moment, z.mean_share, size), variance * c_out * fed
