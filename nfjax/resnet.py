"""Pre-activation ResNets, 18 to 152 layers, with any residual rule, with or without batch normalization.

x_l = c (h(x_{l-1}) + f_l(x_{l-1})), the branch f_l two (basic) or three (bottleneck) convolutions, each preceded by
(norm and) ReLU; no convolution has a bias. Before the first block there is neither ReLU nor norm. The head is (norm),
ReLU, global average pooling and a dense layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfjax import initializers
from nfjax import residual as residual_rules
from nfjax.residual import ConvFactory, Position

# PyTorch's defaults, whose momentum of 0.1 counts the other way; not stated by the paper.
NORMS: dict[str, Callable[..., nnx.Module]] = {
    "batch": functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5),
}


def convolution(
    in_features: int,
    out_features: int,
    kernel_size: int,
    stride: int,
    spatial_size: tuple[int, int],
    *,
    init: initializers.Initializer,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square 2-D convolution without bias that pads k // 2 zeros on every side, as PyTorch's ResNets do."""
    padding = ((kernel_size // 2, kernel_size // 2),) * 2
    # On CPU, XLA takes up to four times as long for a 1x1 convolution as for the matrix product that it is.
    product = kernel_size == 1 and jax.default_backend() == "cpu"
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=initializers.at_layer(init, stride, padding, spatial_size),
        conv_general_dilated=_matrix_product if product else jax.lax.conv_general_dilated,
        rngs=rngs,
    )


def _matrix_product(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], *_: Any, **settings: Any) -> jax.Array:
    """A 1x1 convolution without padding, called as `jax.lax.conv_general_dilated` is: [B, H, W, C], [1, 1, C, D] -> [B,
    H', W', D].
    """
    x = x[:, :: strides[0], :: strides[1]]
    precision = {name: settings.get(name) for name in ("precision", "preferred_element_type")}
    product = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0], **precision)
    return product.reshape(*x.shape[:-1], -1)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling with stride 2 and a border of 1, [B, H, W, C] -> [B, H', W', C]."""
    if jax.default_backend() != "cpu":
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    # On CPU, XLA takes eight times as long for the gradient of a window as for that of nine shifted images. Where
    # values are equal, these share the gradient that the first one would get.
    height, width = _strided(x.shape[1:3], 2)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    shifts = [(i, j) for i in range(3) for j in range(3)]
    shifted = [padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i, j in shifts]
    return functools.reduce(jnp.maximum, shifted)


def _strided(spatial_size: tuple[int, int], stride: int) -> tuple[int, int]:
    return tuple((n - 1) // stride + 1 for n in spatial_size)


class Activation(nnx.Module):
    """(Norm and) ReLU."""

    def __init__(self, features: int, norm: Callable[..., nnx.Module] | None, *, rngs: nnx.Rngs):
        self.norm = norm(features, rngs=rngs) if norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x if self.norm is None else self.norm(x))


class Branch(nnx.Module):
    """f without its first activation: convolutions, (norm and) ReLU between them; [B, H, W, C] -> [B, H', W', C']."""

    def __init__(self, convolutions: list[nnx.Module], activations: list[Activation]):
        self.convolutions = nnx.List(convolutions)
        self.activations = nnx.List(activations)

    def __call__(self, z: jax.Array) -> jax.Array:
        z = self.convolutions[0](z)
        for activation, conv in zip(self.activations, self.convolutions[1:], strict=True):
            z = conv(activation(z))
        return z


class Block(nnx.Module):
    """x_l = c (h(x_{l-1}) + f_l(x_{l-1})). A subclass says which convolutions its branch has."""

    expansion: int
    num_convolutions: int

    @classmethod
    def layout(cls, position: Position) -> list[tuple[int, int, int, int]]:
        """(in_features, out_features, kernel_size, stride) of each convolution of the branch."""
        raise NotImplementedError

    def __init__(
        self,
        position: Position,
        rule: Callable[..., residual_rules.Residual],
        norm: Any,
        conv: ConvFactory,
        *,
        rngs: nnx.Rngs,
    ):
        self.residual = rule(position, conv, rngs)
        self.activation = Activation(position.in_features, norm, rngs=rngs)
        convolutions, activations, size = [], [], position.spatial_size
        for i, (c_in, c_out, kernel_size, stride) in enumerate(self.layout(position)):
            if i > 0:
                activations.append(Activation(c_in, norm, rngs=rngs))
            layer = conv(c_in, c_out, kernel_size, stride, size, rngs=rngs)
            convolutions.append(self.residual.branch_convolution(i, layer))
            size = _strided(size, stride)
        self.branch = Branch(convolutions, activations)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.residual(x, self.activation, self.branch)


class BasicBlock(Block):
    """Two 3x3 convolutions, the first one strided."""

    expansion = 1
    num_convolutions = 2

    @classmethod
    def layout(cls, position: Position) -> list[tuple[int, int, int, int]]:
        c_in, c_out = position.in_features, position.out_features
        return [(c_in, c_out, 3, position.stride), (c_out, c_out, 3, 1)]


class BottleneckBlock(Block):
    """1x1, 3x3 and 1x1 convolutions, four times as many channels out as inside, the 3x3 strided."""

    expansion = 4
    num_convolutions = 3

    @classmethod
    def layout(cls, position: Position) -> list[tuple[int, int, int, int]]:
        c_in, c_out, inner = position.in_features, position.out_features, position.out_features // cls.expansion
        return [(c_in, inner, 1, 1), (inner, inner, 3, position.stride), (inner, c_out, 1, 1)]


class CifarStem(nnx.Module):
    """A 3x3 convolution."""

    image_size = 32

    def __init__(self, width: int, spatial_size: tuple[int, int], conv: ConvFactory, *, rngs: nnx.Rngs):
        self.conv = conv(3, width, 3, 1, spatial_size, rngs=rngs)
        self.spatial_size = spatial_size

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class ImageNetStem(nnx.Module):
    """A 7x7 convolution with stride 2, then 3x3 max-pooling with stride 2."""

    image_size = 224

    def __init__(self, width: int, spatial_size: tuple[int, int], conv: ConvFactory, *, rngs: nnx.Rngs):
        self.conv = conv(3, width, 7, 2, spatial_size, rngs=rngs)
        self.spatial_size = _strided(_strided(spatial_size, 2), 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(self.conv(x))


STEMS: dict[str, type[nnx.Module]] = {"cifar": CifarStem, "imagenet": ImageNetStem}

STAGES: dict[int, tuple[type[Block], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
}


class PreActResNet(nnx.Module):
    """A pre-activation ResNet, images [B, H, W, 3] -> logits [B, num_classes] in float32.

    depth: a key of `STAGES`. residual: a name in `residual.RESIDUALS` or a rule. norm: None or "batch" (or a callable
    `(features, dtype=, rngs=) -> layer`); with "batch", `model.train()` and `model.eval()` choose batch or running
    statistics. init: a name in `initializers.INITIALIZERS` or any `(key, shape, dtype) -> kernel`; it draws the
    convolutions, while the dense layer has variance 1 / n_in, standardized, and zero bias. stem: "cifar" or "imagenet".
    width: channels of the first stage, doubled in each of the next three. image_size: height and width in pixels that
    the network is initialized for, an integer or a pair (32 or 224 by default, by the stem); only
    `he_effective_fan_out` depends on it. dtype: of activations and arithmetic; parameters are float32. remat: whether
    the gradient computes what is inside a block anew instead of keeping it.

    `model.blocks` lists the residual blocks in execution order.
    """

    def __init__(
        self,
        depth: int,
        residual: str | Callable[..., residual_rules.Residual] = "idshort",
        norm: str | Callable[..., nnx.Module] | None = None,
        init: str | initializers.Initializer = "he_fan_out",
        num_classes: int = 10,
        stem: str = "cifar",
        width: int = 64,
        image_size: int | tuple[int, int] | None = None,
        dtype: Any = jnp.float32,
        remat: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        if depth not in STAGES:
            raise ValueError(f"unknown depth {depth!r}: expected one of {', '.join(map(str, STAGES))}")
        for name, value in (("num_classes", num_classes), ("width", width)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        rule = residual_rules.get(residual)
        norm = norm and functools.partial(initializers.lookup("norm", norm, NORMS), dtype=dtype)
        conv = functools.partial(convolution, init=initializers.get(init), dtype=dtype)
        make_stem = initializers.lookup("stem", stem, STEMS)
        block, stages = STAGES[depth]

        size = make_stem.image_size if image_size is None else image_size
        self.stem = make_stem(width, (size, size) if isinstance(size, int) else tuple(size), conv, rngs=rngs)
        size, features = self.stem.spatial_size, width
        blocks: list[Block] = []
        for stage, count in enumerate(stages):
            for i in range(count):
                position = Position(
                    index=len(blocks),
                    num_blocks=sum(stages),
                    stage=stage,
                    index_in_stage=i,
                    num_convolutions=block.num_convolutions,
                    in_features=features,
                    out_features=width * 2**stage * block.expansion,
                    stride=2 if stage > 0 and i == 0 else 1,
                    spatial_size=size,
                )
                blocks.append(block(position, rule, norm, conv, rngs=rngs))
                size, features = _strided(size, position.stride), position.out_features
        self.blocks = nnx.List(blocks)
        self.activation = Activation(features, norm, rngs=rngs)
        dense_init = initializers.standardize(initializers.he_normal("fan_in", "linear"))
        self.classifier = nnx.Linear(features, num_classes, kernel_init=dense_init, rngs=rngs)
        self.dtype, self.remat = dtype, remat

    def __call__(self, images: jax.Array) -> jax.Array:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {images.shape}: expected [B, H, W, 3], channels last")
        x = self.stem(images.astype(self.dtype))
        run = nnx.remat(_run) if self.remat else _run
        for block in self.blocks:
            x = run(block, x)
        # The mean over pixels and the small dense layer in float32: the logits keep their digits under bfloat16.
        features = self.activation(x).astype(jnp.float32).mean(axis=(1, 2))
        return self.classifier(features)


def _run(block: Block, x: jax.Array) -> jax.Array:
    return block(x)
