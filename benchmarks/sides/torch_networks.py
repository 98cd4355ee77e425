"""The networks of nfjax, written in PyTorch with the same names, and other people's that a user might take instead.

Only for the PyTorch side of the benchmarks: no part of nfjax imports PyTorch.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import numpy as np
import torch
from torch import nn

BASIC = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STAGES = BASIC | BOTTLENECK
HALF = math.sqrt(0.5)


def convolution(c_in: int, c_out: int, k: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, and without PyTorch's own initialization, which `load` overwrites."""
    return nn.utils.skip_init(nn.Conv2d, c_in, c_out, k, stride, k // 2, bias=False)


class Activation(nn.Module):
    def __init__(self, features: int, norm: bool):
        super().__init__()
        self.norm = nn.BatchNorm2d(features) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x if self.norm is None else self.norm(x))


class Branch(nn.Module):
    def __init__(self, convolutions: list[nn.Module], activations: list[nn.Module]):
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.activations = nn.ModuleList(activations)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.convolutions[0](z)
        for activation, conv in zip(self.activations, self.convolutions[1:], strict=True):
            z = conv(activation(z))
        return z


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, rule: str):
        super().__init__()
        self.c = 1.0 if rule in ("identity", "conv") else HALF
        convolutional = rule in ("conv", "convshort") or stride != 1 or c_in != c_out
        self.shortcut = convolution(c_in, c_out, 1, stride) if convolutional else None
        self.alpha = nn.Parameter(torch.ones(())) if rule == "learnscalar" and not convolutional else None

    def forward(self, x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        skip = self.shortcut(z) if self.shortcut is not None else x if self.alpha is None else self.alpha * x
        return skip + y if self.c == 1.0 else self.c * (skip + y)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, inner: int, stride: int, rule: str, norm: bool, basic: bool):
        super().__init__()
        self.residual = Residual(c_in, c_out, stride, rule)
        self.activation = Activation(c_in, norm)
        if basic:
            convolutions = [convolution(c_in, c_out, 3, stride), convolution(c_out, c_out, 3)]
            activations = [Activation(c_out, norm)]
        else:
            convolutions = [convolution(c_in, inner, 1), convolution(inner, inner, 3, stride)]
            convolutions += [convolution(inner, c_out, 1)]
            activations = [Activation(inner, norm), Activation(inner, norm)]
        self.branch = Branch(convolutions, activations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.activation(x)
        return self.residual(x, z, self.branch(z))


class Stem(nn.Module):
    def __init__(self, width: int, imagenet: bool):
        super().__init__()
        self.conv = convolution(3, width, 7, 2) if imagenet else convolution(3, width, 3)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x if self.pool is None else self.pool(x)


class PreActResNet(nn.Module):
    """nfjax.resnet.PreActResNet, with the same names for the same parameters; images [B, 3, H, W]."""

    def __init__(self, depth: int, rule: str, norm: bool, classes: int, imagenet: bool, width: int = 64):
        super().__init__()
        basic = depth in BASIC
        self.stem = Stem(width, imagenet)
        blocks, features = [], width
        for stage, count in enumerate(STAGES[depth]):
            inner = width * 2**stage
            for i in range(count):
                c_out = inner if basic else 4 * inner
                blocks.append(Block(features, c_out, inner, 2 if stage and not i else 1, rule, norm, basic))
                features = c_out
        self.blocks = nn.ModuleList(blocks)
        self.activation = Activation(features, norm)
        self.classifier = nn.Linear(features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.activation(x).mean((2, 3)))


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """He's normal initialization with the fan-out, where no parameters of nfjax are loaded."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def load(model: nn.Module, path: str) -> None:
    """The parameters that nfjax has drawn, from an .npz file; raises ValueError where the networks differ."""
    named = dict(model.named_parameters())
    with np.load(path) as arrays:
        for name, array in arrays.items():
            layer, _, kind = name.rpartition(".")
            renamed = f"{layer}.{'weight' if kind in ('kernel', 'scale') else kind}"
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
            parameter = named.pop(renamed)
            values = torch.from_numpy(np.ascontiguousarray(array if axes is None else array.transpose(axes)))
            if values.shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(values.shape)}, here {tuple(parameter.shape)}")
            parameter.copy_(values)
    if named:
        raise ValueError(f"no values for {', '.join(named)}")


# (depth, norm) -> the network of timm that stands closest: batch norm, or weights standardized at run time.
TIMM = {(50, True): "resnetv2_50", (50, False): "nf_resnet50"}


def timm_network(name: str, classes: int) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError, AttributeError):
        without_extension()
        import timm
    return timm.create_model(name, num_classes=classes)


def torchvision_transforms() -> types.ModuleType:
    """torchvision.transforms, also where its compiled part does not fit the PyTorch that is there."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError, AttributeError):
        without_extension()
        from torchvision import transforms
    return transforms


def without_extension() -> None:
    """Lets torchvision be imported without its compiled part, which fits one version of PyTorch only."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    found = importlib.util.find_spec("torchvision")
    if found is None:
        raise ModuleNotFoundError("torchvision is not installed in PyTorch's interpreter")
    package = types.ModuleType("torchvision")
    package.__path__ = list(found.submodule_search_locations)
    extension = types.ModuleType("torchvision.extension")
    extension._HAS_OPS = False
    extension._assert_has_ops = extension._has_ops = extension._load_library = _nothing
    sys.modules |= {"torchvision": package, "torchvision.extension": extension}


def _nothing(*_: object, **__: object) -> bool:
    return False
