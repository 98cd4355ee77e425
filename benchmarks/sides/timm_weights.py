"""timm's side: networks with random weights, and what they return. It knows nothing of nfjax.

PYTHON -m benchmarks.sides.timm_weights DIR NAME ...
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np
import timm
import torch
from timm.models.nfnet import NfCfg, NormFreeNet
from timm.models.resnetv2 import BatchNormAct2d as BatchNorm
from timm.models.resnetv2 import ResNetV2, create_conv2d

IMAGE_SIZE = 97  # odd, so that every border is met
# Of each family a network small enough to be kept beside the tests.
SMALL = {
    "small_basic": lambda: ResNetV2(
        (1, 2), (8, 16), stem_chs=8, basic=True, bottle_ratio=1.0, conv_layer=create_conv2d, norm_layer=BatchNorm,
        num_classes=5,
    ),
    "small_bottleneck": lambda: ResNetV2(
        (1, 2), (32, 64), stem_chs=8, conv_layer=create_conv2d, norm_layer=BatchNorm, num_classes=5
    ),
    "small_bit": lambda: ResNetV2((2,), (128,), stem_chs=32, stem_type="fixed", num_classes=5),
    "small_nf": lambda: NormFreeNet(
        NfCfg((1, 2), (32, 64), stem_type="7x7_pool", stem_chs=8, bottle_ratio=0.25, act_layer="relu"), num_classes=5
    ),
}  # fmt: skip


def make(name: str, image_size: int) -> dict[str, np.ndarray]:
    """{"images" [2, 3, H, W], "logits" [2, classes], "weights/<name>": ...} of a network, in evaluation mode.

    What begins as zeros or ones is moved from there, batch statistics included, so that every value counts.
    """
    torch.manual_seed(0)
    model = SMALL[name]() if name in SMALL else timm.create_model(name)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim == 1 or key.endswith(".gain"):
                value.add_(0.3 * torch.randn(value.shape))
        for key, value in model.named_buffers():
            if key.endswith("running_mean"):
                value.add_(0.1 * torch.randn(value.shape))
            elif key.endswith("running_var"):
                value.mul_(0.5 + torch.rand(value.shape))
        model.eval()
        images = torch.randn(2, 3, image_size, image_size)
        logits = model(images)
    found: dict[str, Any] = {f"weights/{key}": value.numpy() for key, value in model.state_dict().items()}
    return found | {"images": images.numpy(), "logits": logits.numpy()}


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names:
        np.savez(pathlib.Path(folder) / f"{name}.npz", **make(name, 33 if name in SMALL else IMAGE_SIZE))
    print(timm.__version__, torch.__version__)


if __name__ == "__main__":
    main()
