"""Pre-activation ResNets of any depth, with any residual rule, with or without batch normalization.

x_l = a h(x_{l-1}) + b f_l(x_{l-1} / beta), the branch f_l two (basic) or three (bottleneck) convolutions, each
preceded by (norm and) ReLU; no convolution has a bias. Before the first block there is neither ReLU nor norm. The head
is (norm), ReLU, global average pooling and a dense layer.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfjax import _names, initializers, layers
from nfjax import residual as residual_rules
from nfjax.layers import NORMS, Activation, ConvFactory
from nfjax.residual import Position, Residual, Rule, RuleFunction, Scheme

ActivationFactory = Callable[..., Activation]


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
    """x_l = a h(x_{l-1}) + b f_l(x_{l-1} / beta). A subclass says which convolutions its branch has."""

    expansion: int
    num_convolutions: int

    @classmethod
    def layout(cls, position: Position) -> list[tuple[int, int, int, int]]:
        """(in_features, out_features, kernel_size, stride) of each convolution of the branch."""
        raise NotImplementedError

    def __init__(
        self,
        position: Position,
        residual: RuleFunction,
        activation: ActivationFactory,
        conv: ConvFactory,
        *,
        rngs: nnx.Rngs,
    ):
        """Builds the block that stands at `position`.

        Args:
            position: Where it stands.
            residual: The rule.
            activation: `(features, rngs=) -> layer`.
            conv: `(in_features, out_features, kernel_size, stride, spatial_size, rngs=) -> layer`.
            rngs: Of the kernels.
        """
        rule = residual(position)
        if not isinstance(rule, Rule):
            raise TypeError(f"residual={residual} returned {rule!r}: expected a residual.Rule")
        self.residual = Residual(rule, position, conv, rngs)
        self.activation = activation(position.in_features, rngs=rngs)
        convolutions, activations, size = [], [], position.spatial_size
        for i, (c_in, c_out, kernel_size, stride) in enumerate(self.layout(position)):
            if i > 0:
                activations.append(activation(c_in, rngs=rngs))
            layer = conv(c_in, c_out, kernel_size, stride, size, rngs=rngs)
            if rule.branch_scales is not None:
                layer.kernel[...] = layer.kernel[...] * rule.branch_scales[i]
            convolutions.append(layer)
            size = layers.strided(size, stride)
        self.branch = Branch(convolutions, activations)

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b, beta = self.residual.coefficients(x.dtype)
        z = self.activation(x / beta)
        h = x if self.residual.shortcut is None else self.residual.shortcut(z)
        return a * h + b * self.branch(z)


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
        self.spatial_size = layers.strided(layers.strided(spatial_size, 2), 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.max_pool(self.conv(x))


STEMS: dict[str, type[nnx.Module]] = {"cifar": CifarStem, "imagenet": ImageNetStem}
BLOCKS: dict[str, type[Block]] = {"basic": BasicBlock, "bottleneck": BottleneckBlock}

# depth -> (block, blocks in each stage); 18 to 152 are He et al.'s.
STAGES: Mapping[int, tuple[type[Block], tuple[int, ...]]] = types.MappingProxyType(
    {
        10: (BasicBlock, (1, 1, 1, 1)),
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (BottleneckBlock, (3, 4, 6, 3)),
        101: (BottleneckBlock, (3, 4, 23, 3)),
        152: (BottleneckBlock, (3, 8, 36, 3)),
    }
)


class PreActResNet(nnx.Module):
    """A pre-activation ResNet, images [B, H, W, 3] -> logits [B, num_classes] in float32.

    `model.blocks` lists the residual blocks in execution order. With batch norm, `model.train()` and `model.eval()`
    choose batch or running statistics.
    """

    def __init__(
        self,
        depth: int | None = None,
        residual: str | RuleFunction = "idshort",
        norm: str | layers.Norm | None = None,
        init: str | initializers.Initializer = "he_fan_out",
        num_classes: int = 10,
        stem: str | Callable[..., nnx.Module] = "cifar",
        width: int = 64,
        image_size: int | tuple[int, int] | None = None,
        dtype: Any = jnp.float32,
        remat: bool = False,
        *,
        stage_sizes: Sequence[int] | None = None,
        block: str | type[Block] | None = None,
        activation: str | layers.Elementwise = "relu",
        conv: ConvFactory | None = None,
        head_init: initializers.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds the network.

        Args:
            depth: A key of `STAGES`, which says what the stages are.
            residual: A name in `residual.RESIDUALS`, or a function `position -> Rule`.
            norm: None, a name in `layers.NORMS`, or a callable `(features, dtype=, rngs=) -> layer`.
            init: A name in `initializers.INITIALIZERS`, which stands for the variant with this activation's gain, or
                one in `initializers.OF_JAX` or any `(key, shape, dtype) -> kernel`, which are taken as they are; it
                draws the convolutions.
            num_classes: Of the logits.
            stem: A name in `STEMS`, "cifar" or "imagenet", or a class called like them.
            width: Channels of the first stage, doubled in each of the next ones.
            image_size: Height and width in pixels that the network is initialized for, an integer or a pair; that of
                the stem, 32 or 224, if left out. Only `he_effective_fan_out` depends on it.
            dtype: Of activations and arithmetic; parameters are float32.
            remat: Whether the gradient computes what is inside a block anew instead of keeping it.
            stage_sizes: Blocks in each stage, instead of those of a depth.
            block: "basic", "bottleneck", or a subclass of `Block`; that of the depth if left out.
            activation: A name in `initializers.ACTIVATIONS`, or an elementwise function.
            conv: `(in_features, out_features, kernel_size, stride, spatial_size, *, init, dtype, rngs) -> layer`; that
                of the rule or the norm if left out, else `layers.convolution`.
            head_init: Draws the kernel of the dense layer; that of the rule if left out, else variance 1 / n_in,
                standardized. Its bias is 0.
            rngs: Of the parameters.

        Raises:
            ValueError: A name or a number that is not known; the message says what is.
        """
        for name, value in (("num_classes", num_classes), ("width", width)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        make_block, sizes = stages(depth, stage_sizes, block)
        rule = residual_rules.get(residual)
        function = _names.lookup("activation", activation, initializers.ACTIVATIONS)
        scheme = rule if isinstance(rule, Scheme) else Scheme(rule)
        norm = norm and _names.lookup("norm", norm, NORMS)
        of_norm = norm.conv if isinstance(norm, layers.NormWithConvolution) else None
        conv = conv or scheme.conv or of_norm or layers.convolution
        conv = functools.partial(conv, init=initializers.get(init, function), dtype=dtype)
        if scheme.scaled_activation:
            function = layers.Scaled(function, math.sqrt(initializers.gain(function).channel))
        norm = norm and functools.partial(norm, dtype=dtype)
        act = functools.partial(Activation, norm=norm, function=function, biases=scheme.biases)
        make_stem = _names.lookup("stem", stem, STEMS)

        size = make_stem.image_size if image_size is None else image_size
        self.stem = make_stem(width, (size, size) if isinstance(size, int) else tuple(size), conv, rngs=rngs)
        size, features = self.stem.spatial_size, width
        blocks: list[Block] = []
        for stage, count in enumerate(sizes):
            for i in range(count):
                position = Position(
                    stage_sizes=sizes,
                    stage=stage,
                    index_in_stage=i,
                    num_convolutions=make_block.num_convolutions,
                    in_features=features,
                    out_features=width * 2**stage * make_block.expansion,
                    stride=2 if stage > 0 and i == 0 else 1,
                    spatial_size=size,
                )
                blocks.append(make_block(position, rule, act, conv, rngs=rngs))
                size, features = layers.strided(size, position.stride), position.out_features
        self.blocks = nnx.List(blocks)
        self.activation = act(features, rngs=rngs)
        dense_init = (
            head_init or scheme.head_init or initializers.standardize(initializers.he_normal("fan_in", "linear"))
        )
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


def stages(
    depth: int | None, stage_sizes: Sequence[int] | None = None, block: str | type[Block] | None = None
) -> tuple[type[Block], tuple[int, ...]]:
    """The class of the blocks, and how many each stage has.

    Args:
        depth: As for `PreActResNet`.
        stage_sizes: Likewise.
        block: Likewise.

    Raises:
        ValueError: Not exactly one of depth and stage sizes is given, or one of them is none.
    """
    if (depth is None) == (stage_sizes is None):
        raise ValueError(f"depth={depth!r}, stage_sizes={stage_sizes!r}: expected one of the two")
    if stage_sizes is None:
        of_depth, sizes = _names.lookup("depth", depth, STAGES, callables=False)
        return of_depth if block is None else _names.lookup("block", block, BLOCKS), sizes
    sizes = tuple(stage_sizes)
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"stage_sizes={stage_sizes!r}: expected a positive number of blocks for each stage")
    if block is None:
        raise ValueError(f"stage_sizes={stage_sizes!r} needs a block: expected one of {', '.join(BLOCKS)}, or a class")
    return _names.lookup("block", block, BLOCKS), sizes


resnet10 = functools.partial(PreActResNet, 10)
resnet18 = functools.partial(PreActResNet, 18)
resnet34 = functools.partial(PreActResNet, 34)
resnet50 = functools.partial(PreActResNet, 50)
resnet101 = functools.partial(PreActResNet, 101)
resnet152 = functools.partial(PreActResNet, 152)
