"""PyTorch: training steps and epochs, starting, signal propagation, of the networks in torch_networks.

Everything that is known to be fast: channels last, autocast, the fused optimizer, cuDNN's search for the best
convolution, TF32 where nfjax has it as well; with "compile" the normalisation, the network and the loss in one graph.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import turns
from benchmarks.sides import torch_networks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10
PADDING, SIZE = 4, 32

torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision("high")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(os.cpu_count()))

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def on_device(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network on the device, ready to train, and what trains it."""
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    return model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)


def loss_of(model: nn.Module, dtype: str, mode: str) -> Loss:
    """`(images [B, 3, H, W], labels [B]) -> loss`; uint8 images are normalised, others are already."""
    mean = torch.tensor([0.5, 0.5, 0.5], device=DEVICE).view(1, 3, 1, 1)
    std = torch.tensor([0.25, 0.25, 0.25], device=DEVICE).view(1, 3, 1, 1)

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = (images.float() / 255 - mean) / std if images.dtype == torch.uint8 else images
        with torch.autocast(DEVICE.type, DTYPES[dtype], enabled=dtype != "float32"):
            logits = model(x)
        return functional.cross_entropy(logits.float(), labels)

    compiled = {"compile": None, "autotune": "max-autotune"}
    return torch.compile(loss, mode=compiled[mode]) if mode in compiled else loss


def train(loss: Loss, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One step; the loss."""
    torch.compiler.cudagraph_mark_step_begin()  # what a graph returned in the step before may be overwritten
    value = loss(images, labels)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()
    return value.detach().clone()  # a graph may use the memory of its result again


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def machine() -> dict[str, str]:
    kind = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    return {"device": kind, "platform": DEVICE.type, "version": f"PyTorch {torch.__version__}"}


class Steps:
    """Training steps on one batch. mode: eager, compile or autotune; library: "timm" for its network."""

    def __init__(self, mode: str, library: str = ""):
        self.mode, self.timm = mode, library == "timm"
        self.losses: list[torch.Tensor] = []

    def has_timm(self) -> bool:
        return importlib.util.find_spec("timm") is not None

    def prepare(
        self, depth: int, residual: str, norm: str | None, image: int, classes: int, batch: int, dtype: str, width: int,
        parameters: str, warm: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Builds the network with the parameters from the file, and takes steps to warm up, compiling in the first."""
        start = time.perf_counter()
        if self.timm:
            model = torch_networks.timm_network(torch_networks.TIMM[depth, bool(norm)], classes)
        else:
            model = torch_networks.PreActResNet(depth, residual, bool(norm), classes, image >= 224, width)
            torch_networks.load(model, parameters)
        model, self.optimizer = on_device(model)
        rng = np.random.default_rng(0)  # the same random images and labels on both sides
        images = torch.from_numpy(rng.integers(0, 256, (batch, image, image, 3), np.uint8)).permute(0, 3, 1, 2)
        self.batch = images.to(DEVICE), torch.from_numpy(rng.integers(0, classes, batch, np.int32)).long().to(DEVICE)
        self.loss = loss_of(model, dtype, self.mode)
        built = time.perf_counter()
        first = self.take(1)
        self.take(warm - 1)
        turns.forget_peak()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"build_s": built - start, "compile_s": first, **machine()}

    def take(self, n: int) -> float:
        """Seconds for n steps, the last one finished."""
        start = time.perf_counter()
        for _ in range(n):
            self.losses.append(train(self.loss, self.optimizer, *self.batch))
        synchronize()
        return time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        """What the steps since the start have left: the loss of each, the peak of memory in bytes."""
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else turns.peak()
        return {"losses": [float(loss) for loss in self.losses], "peak_bytes": peak}

    def limits(self, dtype: str) -> dict[str, float]:
        """FLOP/s of a large matrix product and of a large convolution: what this device can do at best."""
        n, b = (2048, 8) if DEVICE.type == "cpu" else (8192, 256)
        kind, last = DTYPES[dtype], torch.channels_last
        square = torch.randn(n, n, device=DEVICE, dtype=kind)
        images = torch.randn(b, 256, 32, 32, device=DEVICE, dtype=kind).to(memory_format=last)
        kernel = torch.randn(256, 256, 3, 3, device=DEVICE, dtype=kind).to(memory_format=last)
        convolved = _shortest(lambda x, w: functional.conv2d(x, w, None, 1, 1), images, kernel)
        return {
            "matmul": 2 * n**3 / _shortest(torch.matmul, square, square),
            "conv": 2 * b * 32 * 32 * 9 * 256 * 256 / convolved,
        }


def _shortest(function: Any, *arguments: torch.Tensor) -> float:
    """Seconds per call, the shortest of five times four calls."""
    seconds = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(4):
                function(*arguments)
            synchronize()
            seconds.append((time.perf_counter() - start) / 4)
    return min(seconds[1:])


class Epochs:
    """Epochs of CIFAR-10.

    Args:
        source: "dataloader" is what PyTorch's tutorials do: worker processes apply torchvision's transforms to Pillow
            images. "device" keeps the images on the device and augments whole batches there: crop and flip differ by
            image, while RandAugment, as torchvision does it on tensors, applies the same operations to all images of a
            batch, which is less than what the other sides do.
    """

    def __init__(self, source: str):
        self.source = {"dataloader": FromLoader, "device": OnDevice}[source]

    def prepare(
        self, images: str, operations: int, workers: int, depth: int, residual: str, norm: str | None, batch: int,
        dtype: str, width: int, mode: str,
    ) -> dict[str, str]:  # fmt: skip
        """Builds everything up to the first step. images: an .npz file with `images` and `labels`."""
        with np.load(images) as arrays:
            self.batches = self.source(arrays["images"], arrays["labels"], batch, operations, workers)
        model = torch_networks.PreActResNet(depth, residual, bool(norm), 10, imagenet=False, width=width)
        torch_networks.initialize(model)
        model, self.optimizer = on_device(model)
        self.loss = loss_of(model, dtype, mode)
        return machine()

    def epoch(self) -> dict[str, float]:
        """Seconds and mean loss of an epoch; the losses stay on the device until it ends."""
        start = time.perf_counter()
        losses = [train(self.loss, self.optimizer, images, labels) for images, labels in self.batches]
        synchronize()
        return {"seconds": time.perf_counter() - start, "loss": float(torch.stack(losses).mean())}


class Pictures(torch.utils.data.Dataset):
    """As torchvision.datasets.CIFAR10: arrays in memory, a Pillow image for each example."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Any):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class FromLoader:
    """Batches of PyTorch's DataLoader."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int, operations: int, workers: int):
        transforms = torch_networks.torchvision_transforms()
        chosen = [transforms.RandomCrop(SIZE, padding=PADDING), transforms.RandomHorizontalFlip()]
        chosen += [transforms.RandAugment(operations)] if operations else []
        transform = transforms.Compose([*chosen, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        self.loader = torch.utils.data.DataLoader(
            Pictures(images, labels, transform),
            batch,
            shuffle=True,
            num_workers=workers,
            pin_memory=DEVICE.type == "cuda",
            drop_last=True,
            persistent_workers=workers > 0,
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self.loader:
            images = images.to(DEVICE, non_blocking=True, memory_format=torch.channels_last)
            yield images, labels.to(DEVICE, non_blocking=True)


class OnDevice:
    """Batches that are drawn and augmented on the device."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int, operations: int, workers: int):
        del workers  # the device does it
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(DEVICE)
        self.labels, self.batch = torch.from_numpy(labels).long().to(DEVICE), batch
        self.augment = torch_networks.torchvision_transforms().RandAugment(operations) if operations else None
        self.mean = torch.tensor(MEAN, device=DEVICE).view(1, 3, 1, 1)
        self.std = torch.tensor(STD, device=DEVICE).view(1, 3, 1, 1)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.images), device=DEVICE)
        for chosen in order[: len(order) // self.batch * self.batch].split(self.batch):
            images = cropped_and_flipped(self.images[chosen])
            if self.augment is not None:
                images = self.augment(images)
            images = (images.float() / 255 - self.mean) / self.std
            yield images.contiguous(memory_format=torch.channels_last), self.labels[chosen]


def cropped_and_flipped(images: torch.Tensor) -> torch.Tensor:
    """Each image padded, cropped and perhaps mirrored for itself, by one gather; uint8 [B, 3, H, W]."""
    b, c, h, w = images.shape
    padded = functional.pad(images, (PADDING,) * 4)
    y, x = torch.randint(0, 2 * PADDING + 1, (2, b, 1), device=images.device)
    columns = torch.arange(w, device=images.device)
    mirrored = torch.rand(b, 1, device=images.device) < 0.5
    columns = x + torch.where(mirrored, w - 1 - columns, columns)
    rows = y + torch.arange(h, device=images.device)
    index = torch.arange(b, device=images.device).view(b, 1, 1, 1)
    channel = torch.arange(c, device=images.device).view(1, c, 1, 1)
    return padded[index, channel, rows.view(b, 1, h, 1), columns.view(b, 1, 1, w)]


class Start:
    """A network, its optimizer and a first step of eight images."""

    def __init__(self, mode: str):
        self.mode = mode

    def first_step(self, depth: int, residual: str) -> dict[str, Any]:
        """Seconds of building, and of the first step with its compilation."""
        start = time.perf_counter()
        model = torch_networks.PreActResNet(depth, residual, False, 10, imagenet=False)
        torch_networks.initialize(model)
        model, optimizer = on_device(model)
        built = time.perf_counter()
        images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
        labels = torch.zeros(8, dtype=torch.long, device=DEVICE)
        loss = loss_of(model, "float32", self.mode)
        train(loss, optimizer, images.contiguous(memory_format=torch.channels_last), labels)
        synchronize()
        return {"build": built - start, "first_step": time.perf_counter() - built, **machine()}


class Curves:
    """A curve of figure 2 by hooks on the blocks and `torch.autograd.grad` at their outputs, in a memory format."""

    def __init__(self, layout: str):
        self.layout = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)

    def curve(self, depth: int, rule: str, norm: str | None, init: str, seeds: int, shape: list[int]) -> dict[str, Any]:
        """Seconds, the variances of the first to those of the last block, the largest memory of the process."""
        start = time.perf_counter()
        ratios = [self._ratios(depth, rule, norm, init, seed, shape) for seed in range(seeds)]
        seconds = time.perf_counter() - start
        forward, backward = (statistics.median(column) for column in zip(*ratios, strict=True))
        found = {"forward_ratio": forward, "backward_ratio": backward}
        return {"seconds": seconds, **found, "peak_bytes": turns.peak(), **machine()}

    def _ratios(self, depth: int, rule: str, norm: str | None, init: str, seed: int, shape: list[int]) -> list[float]:
        """The first-to-last ratios, forward and backward. shape: of the noise, [B, H, W, 3]."""
        torch.manual_seed(seed)
        model = torch_networks.PreActResNet(depth, rule, bool(norm), 10, imagenet=False)
        draw_standardized(model, init)
        model = model.requires_grad_(False).to(DEVICE, memory_format=self.layout).train()
        b, h, w, c = shape
        x = torch.randn(b, c, h, w, device=DEVICE).contiguous(memory_format=self.layout).requires_grad_(True)
        outputs, forward, branches = [], [], []

        def note(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
            outputs.append(output)
            forward.append(channel_statistics(output.detach()))

        for block in model.blocks:
            block.register_forward_hook(note)
            block.branch.register_forward_hook(lambda _, __, y: branches.append(channel_statistics(y.detach())))
        y = model.stem(x)  # what stands behind the last block has no part in the measurement
        for block in model.blocks:
            y = block(y)
        gradients = torch.autograd.grad(y, outputs, torch.randn_like(y))
        backward = [channel_statistics(gradient) for gradient in gradients]
        assert len(branches) == len(model.blocks)
        return [float(values[0][0] / values[-1][0]) for values in (forward, backward)]


@torch.no_grad()
def draw_standardized(model: nn.Module, init: str) -> None:
    """Normal kernels, standardized after sampling."""
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


MEASURES = {"steps": Steps, "epochs": Epochs, "start": Start, "curves": Curves}
