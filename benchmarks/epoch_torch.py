"""The PyTorch side of epoch.py, which starts it: PYTHON benchmarks/epoch_torch.py dataloader|device eager|compile

"dataloader" is what PyTorch's tutorials do: worker processes apply torchvision's transforms to Pillow images. "device"
keeps the images on the device and augments whole batches there: crop and flip differ by image, while RandAugment, as
torchvision does it on tensors, applies the same operations to all images of a batch, which is less than what the other
sides do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch_networks
import turns
from speed_torch import DEVICE, DTYPES, machine, synchronize
from torch.nn import functional

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING, SIZE = 4, 32


def torchvision_transforms() -> Any:
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError, AttributeError):
        torch_networks.without_extension()
        from torchvision import transforms
    return transforms


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
    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int, operations: int, workers: int):
        transforms = torchvision_transforms()
        steps = [transforms.RandomCrop(SIZE, padding=PADDING), transforms.RandomHorizontalFlip()]
        if operations:
            steps.append(transforms.RandAugment(operations))
        transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
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
    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int, operations: int, workers: int):
        del workers  # the device does it
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(DEVICE)
        self.labels, self.batch = torch.from_numpy(labels).long().to(DEVICE), batch
        self.augment = torchvision_transforms().RandAugment(operations) if operations else None
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


class Training:
    def __init__(self, source: str, mode: str):
        self.source, self.mode = {"dataloader": FromLoader, "device": OnDevice}[source], mode

    def prepare(self, images: str, depth: int, residual: str, norm: str | None, batch: int, **rest: Any) -> dict:
        """Builds everything up to the first step. images: an .npz file with `images` and `labels`."""
        with np.load(images) as arrays:
            examples = [arrays["images"], arrays["labels"]]
        self.batches = self.source(*examples, batch, rest["operations"], rest["workers"])
        model = torch_networks.PreActResNet(depth, residual, bool(norm), 10, imagenet=False, width=rest["width"])
        torch_networks.initialize(model)
        model = model.to(DEVICE, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

        def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.autocast(DEVICE.type, DTYPES[rest["dtype"]], enabled=rest["dtype"] != "float32"):
                logits = model(images)
            return functional.cross_entropy(logits.float(), labels)

        self.loss = loss if self.mode == "eager" else torch.compile(loss)
        return machine()

    def epoch(self) -> dict[str, float]:
        """Seconds and mean loss of an epoch; the losses stay on the device until it ends."""
        start, losses = time.perf_counter(), []
        for images, labels in self.batches:
            loss = self.loss(images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        synchronize()
        return {"seconds": time.perf_counter() - start, "loss": float(torch.stack(losses).mean())}


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(os.cpu_count()))
    training = Training(*sys.argv[1:3])
    turns.serve({"prepare": training.prepare, "epoch": training.epoch})
