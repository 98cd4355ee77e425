"""The torchvision side of augmentation.py: RandAugment on Pillow images, with the operations and signs it is told.

The worker reads a request on each line of the standard input and answers with a line; images travel in .npy files. The
transforms of torchvision run without its compiled extension, which is left out here because it fits one version of
PyTorch only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
import types

import numpy as np
import PIL
import torch
from PIL import Image


def load_autoaugment() -> types.ModuleType:
    """torchvision.transforms.autoaugment, without what `import torchvision` does first."""
    package = types.ModuleType("torchvision")
    package.__path__ = list(importlib.util.find_spec("torchvision").submodule_search_locations)
    extension = types.ModuleType("torchvision.extension")
    extension._HAS_OPS = False
    sys.modules |= {"torchvision": package, "torchvision.extension": extension}
    from torchvision.transforms import autoaugment

    return autoaugment


autoaugment = load_autoaugment()


def title(name: str) -> str:
    """ "shear_x" is torchvision's "ShearX"."""
    special = {"autocontrast": "AutoContrast"}
    return special.get(name, "".join(part.capitalize() for part in name.split("_")))


def operation(images: list[Image.Image], request: dict) -> np.ndarray:
    """Every bin with both signs, uint8 [bins * 2 * B, H, W, 3]."""
    width, height = images[0].size
    policy = autoaugment.RandAugment()
    interpolation = autoaugment.InterpolationMode(request["interpolation"])
    magnitudes, signed = policy._augmentation_space(policy.num_magnitude_bins, (height, width))[title(request["name"])]
    results = []
    for i in range(policy.num_magnitude_bins):
        for sign in (1, -1):
            magnitude = float(magnitudes[i].item()) if magnitudes.ndim else 0.0
            magnitude *= sign if signed else 1
            results += [
                np.asarray(
                    autoaugment._apply_op(image, title(request["name"]), magnitude, interpolation, request["fill"])
                )
                for image in images
            ]
    return np.stack(results)


def policy(images: list[Image.Image], request: dict) -> np.ndarray:
    """RandAugment itself, whose random numbers are replaced by the operations and signs of the request."""
    transform = autoaugment.RandAugment(
        num_ops=len(request["operations"]),
        magnitude=request["magnitude"],
        interpolation=autoaugment.InterpolationMode(request["interpolation"]),
        fill=request["fill"],
    )
    space = transform._augmentation_space(transform.num_magnitude_bins, (32, 32))
    names, results, drawn = list(space), [], []
    original = torch.randint
    torch.randint = lambda *_: torch.tensor([drawn.pop(0)])
    try:
        for i, image in enumerate(images):
            for chosen, signs in zip(request["operations"], request["signs"], strict=True):
                name = title(chosen[i])
                drawn += [names.index(name)] + ([int(signs[i] < 0)] if space[name][1] else [])
            results.append(np.asarray(transform(image)))
            assert not drawn
    finally:
        torch.randint = original
    return np.stack(results)


def timing(images: list[Image.Image], request: dict) -> float:
    """Milliseconds of RandAugment for all images, in one thread."""
    transform = autoaugment.RandAugment(interpolation=autoaugment.InterpolationMode(request["interpolation"]))
    start = time.perf_counter()
    for image in images:
        transform(image)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")} | {
        "Pillow": PIL.__version__
    }
    for line in sys.stdin:
        request = json.loads(line)
        images = [Image.fromarray(image) for image in np.load(request["input"])]
        answer = {"operation": operation, "policy": policy, "timing": timing}[request["what"]](images, request)
        if isinstance(answer, np.ndarray):
            np.save(request["output"], answer)
            answer = None
        print(json.dumps({"answer": answer, "versions": versions}), flush=True)


if __name__ == "__main__":
    main()
