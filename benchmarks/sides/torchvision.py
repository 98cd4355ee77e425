"""torchvision: RandAugment on Pillow images, with the operations and signs it is told; the DataLoader's crops."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.sides import _crops, torch_networks

transforms = torch_networks.torchvision_transforms()


def machine() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "Pillow")}
    return {"device": "cpu", "platform": "cpu", "version": ", ".join(f"{name} {x}" for name, x in found.items())}


def title(name: str) -> str:
    """ "shear_x" is torchvision's "ShearX"."""
    return {"autocontrast": "AutoContrast"}.get(name, "".join(part.capitalize() for part in name.split("_")))


class RandAugment:
    """One policy, asked for its operations, for the whole of it with given choices, and for its time."""

    def load(self, images: str) -> None:
        """images: a .npy file of uint8 [B, H, W, 3]."""
        self.images = [Image.fromarray(image) for image in np.load(images)]

    def operation(self, output: str, name: str, interpolation: str, fill: list[int]) -> None:
        """Every bin with both signs, to a .npy file of uint8 [bins * 2 * B, H, W, 3]."""
        from torchvision.transforms import autoaugment

        width, height = self.images[0].size
        policy, mode = autoaugment.RandAugment(), autoaugment.InterpolationMode(interpolation)
        space = policy._augmentation_space(policy.num_magnitude_bins, (height, width))
        magnitudes, signed = space[title(name)]
        results = []
        for i in range(policy.num_magnitude_bins):
            for sign in (1, -1):
                magnitude = float(magnitudes[i].item()) if magnitudes.ndim else 0.0
                magnitude *= sign if signed else 1
                results += [
                    np.asarray(autoaugment._apply_op(image, title(name), magnitude, mode, fill))
                    for image in self.images
                ]
        np.save(output, np.stack(results))

    def policy(
        self, output: str, operations: list[list[str]], signs: list[list[int]], magnitude: int, interpolation: str,
        fill: list[int],
    ) -> None:  # fmt: skip
        """RandAugment itself, whose random numbers are replaced by these operations and signs, to a .npy file."""
        transform = transforms.RandAugment(
            num_ops=len(operations),
            magnitude=magnitude,
            interpolation=transforms.InterpolationMode(interpolation),
            fill=fill,
        )
        space = transform._augmentation_space(transform.num_magnitude_bins, (32, 32))
        names, results, drawn = list(space), [], []
        original = torch.randint
        torch.randint = lambda *_: torch.tensor([drawn.pop(0)])
        try:
            for i, image in enumerate(self.images):
                for chosen, sign in zip(operations, signs, strict=True):
                    name = title(chosen[i])
                    drawn += [names.index(name)] + ([int(sign[i] < 0)] if space[name][1] else [])
                results.append(np.asarray(transform(image)))
                assert not drawn
        finally:
            torch.randint = original
        np.save(output, np.stack(results))

    def milliseconds(self, interpolation: str) -> float:
        """Of RandAugment for all images, in one thread."""
        transform = transforms.RandAugment(interpolation=transforms.InterpolationMode(interpolation))
        start = time.perf_counter()
        for image in self.images:
            transform(image)
        return 1e3 * (time.perf_counter() - start)


class Files(torch.utils.data.Dataset):
    def __init__(self, paths: list[str]):
        self.paths = paths
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(_crops.SIZE), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with open(self.paths[index], "rb") as file:
            return self.transform(Image.open(file, formats=("JPEG",)).convert("RGB"))


class Crops(_crops.Crops):
    """PyTorch's DataLoader with Pillow."""

    def batches(self, paths: list[str], workers: int) -> Iterator[Any]:
        loader = torch.utils.data.DataLoader(
            Files(paths), _crops.BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
        )
        while True:
            yield from loader


MEASURES = {"augmentation": RandAugment, "crops": Crops}
