"""The PyTorch side of signal_propagation.py: hooks on the blocks, `torch.autograd.grad` at their outputs.

The worker reads a curve on each line of its standard input, and writes its seconds, its first-to-last ratios and its
peak memory in GiB. The argument is the memory format, "contiguous" or "channels_last".
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time

import torch
from torch import nn

STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def convolution(c_in: int, c_out: int, k: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, and without PyTorch's own initialization, which `initialize` would only overwrite."""
    return nn.utils.skip_init(nn.Conv2d, c_in, c_out, k, stride, k // 2, bias=False)


class Branch(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, norm: bool):
        super().__init__()
        inner = c_out // 4
        self.first = convolution(c_in, inner, 1)
        self.second = convolution(inner, inner, 3, stride)
        self.third = convolution(inner, c_out, 1)
        self.norm2 = nn.BatchNorm2d(inner) if norm else nn.Identity()
        self.norm3 = nn.BatchNorm2d(inner) if norm else nn.Identity()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.second(torch.relu(self.norm2(self.first(z))))
        return self.third(torch.relu(self.norm3(z)))


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, rule: str, norm: bool):
        super().__init__()
        self.c = 1.0 if rule == "identity" else math.sqrt(0.5)
        self.norm = nn.BatchNorm2d(c_in) if norm else nn.Identity()
        self.branch = Branch(c_in, c_out, stride, norm)
        convolutional = rule == "convshort" or stride != 1 or c_in != c_out
        self.shortcut = convolution(c_in, c_out, 1, stride) if convolutional else None
        self.alpha = nn.Parameter(torch.ones(())) if rule == "learnscalar" and not convolutional else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.relu(self.norm(x))
        skip = self.shortcut(z) if self.shortcut is not None else x if self.alpha is None else self.alpha * x
        total = skip + self.branch(z)
        return total if self.c == 1.0 else self.c * total


def network(depth: int, rule: str, norm: bool) -> tuple[nn.Module, list[Block]]:
    """The stem and the blocks: what stands behind the last block has no part in the measurement."""
    layers, blocks, channels = [convolution(3, 64, 3)], [], 64
    for stage, count in enumerate(STAGES[depth]):
        for i in range(count):
            blocks.append(Block(channels, 256 * 2**stage, 2 if stage and i == 0 else 1, rule, norm))
            channels = 256 * 2**stage
    return nn.Sequential(*layers, *blocks), blocks


@torch.no_grad()
def initialize(model: nn.Module, init: str) -> None:
    """Normal weights, standardized after sampling."""
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        weight = module.weight.normal_()
        c_out, c_in, k, _ = weight.shape
        axes = (1, 2, 3) if init == "brock" else (0, 1, 2, 3)
        variance = {
            "he_fan_in": 2 / (k * k * c_in),
            "he_fan_out": 2 / (k * k * c_out),
            "brock": 2 / (1 - 1 / math.pi) / (k * k * c_in),
        }[init]
        weight.sub_(weight.mean(axes, keepdim=True))
        weight.mul_(math.sqrt(variance) / weight.square().mean(axes, keepdim=True).sqrt())


def channel_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Variance of the tensor, average squared channel mean, average channel variance."""
    variances, means = torch.var_mean(x, (0, 2, 3), correction=0)
    squared = means.square().mean()
    return variances.mean() + squared - means.mean().square(), squared, variances.mean()


def run(depth: int, rule: str, norm: str | None, init: str, seed: int, layout: torch.memory_format) -> list[float]:
    """The first-to-last ratios, forward and backward."""
    torch.manual_seed(seed)
    model, blocks = network(depth, rule, bool(norm))
    initialize(model, init)
    model = model.requires_grad_(False).to(memory_format=layout)
    x = torch.randn(32, 3, 32, 32).contiguous(memory_format=layout).requires_grad_(True)
    outputs, forward, branches = [], [], []

    def note(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
        outputs.append(output)
        forward.append(channel_statistics(output.detach()))

    hooks = [block.register_forward_hook(note) for block in blocks]
    hooks += [
        block.branch.register_forward_hook(lambda _, __, y: branches.append(channel_statistics(y.detach())))
        for block in blocks
    ]
    y = model(x)
    gradients = torch.autograd.grad(y, outputs, torch.randn_like(y))
    backward = [channel_statistics(g) for g in gradients]
    for hook in hooks:
        hook.remove()
    assert len(branches) == len(blocks)
    return [float(values[0][0] / values[-1][0]) for values in (forward, backward)]


def main() -> None:
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[sys.argv[1]]
    for line in sys.stdin:
        depth, rule, norm, init, seeds = json.loads(line)
        start = time.perf_counter()
        ratios = [run(depth, rule, norm, init, seed, layout) for seed in range(seeds)]
        seconds = time.perf_counter() - start
        medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([seconds, *medians, peak, torch.__version__]), flush=True)


if __name__ == "__main__":
    main()
