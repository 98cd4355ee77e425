"""The PyTorch side of speed.py, which starts it: PYTHON benchmarks/speed_torch.py eager|compile|autotune [timm]

Everything that is known to be fast: channels last, autocast, the fused optimizer, cuDNN's search for the best
convolution, TF32 where nfjax has it as well; with "compile" the normalisation, the network and the loss in one graph.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

import numpy as np
import speed_case
import torch
import torch_networks
import turns
from torch.nn import functional

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Training:
    def __init__(self, mode: str, timm: bool):
        self.mode, self.timm = mode, timm
        self.losses: list[torch.Tensor] = []

    def prepare(self, **request: Any) -> dict[str, Any]:
        """Builds the network with the parameters from the file, and takes steps to warm up, compiling in the first."""
        start = time.perf_counter()
        case = speed_case.Training(**request)
        normed, imagenet = bool(case.norm), case.stem == "imagenet"
        if self.timm:
            model = torch_networks.timm_network(torch_networks.TIMM[case.depth, normed], case.classes)
        else:
            model = torch_networks.PreActResNet(case.depth, case.residual, normed, case.classes, imagenet, case.width)
            torch_networks.load(model, case.parameters)
        model = model.to(DEVICE, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
        images, labels = examples(case.batch, case.image, case.classes)
        self.images, self.labels = images.to(DEVICE), labels.to(DEVICE)
        self.loss = loss_of(model, case.dtype)
        if self.mode != "eager":
            self.loss = torch.compile(self.loss, mode="max-autotune" if self.mode == "autotune" else None)
        built = time.perf_counter()
        self.take(1)
        first = time.perf_counter()
        self.take(case.warm - 1)
        turns.forget_peak()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"build_s": built - start, "compile_s": first - built, **machine()}

    def take(self, n: int) -> float:
        """Seconds for n steps, the last one finished."""
        start = time.perf_counter()
        for _ in range(n):
            torch.compiler.cudagraph_mark_step_begin()  # what a graph returned in the step before may be overwritten
            loss = self.loss(self.images, self.labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach().clone())  # a graph may use the memory of its result again
        synchronize()
        return time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        """What the steps since the start have left: the loss of each, the peak of memory in bytes."""
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else turns.peak()
        return {"losses": [float(loss) for loss in self.losses], "peak_bytes": peak}


def loss_of(model: torch.nn.Module, dtype: str) -> Any:
    """`(uint8 images [B, 3, H, W], labels [B]) -> loss`."""
    mean = torch.tensor([0.5, 0.5, 0.5], device=DEVICE).view(1, 3, 1, 1)
    std = torch.tensor([0.25, 0.25, 0.25], device=DEVICE).view(1, 3, 1, 1)

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = (images.float() / 255 - mean) / std
        with torch.autocast(DEVICE.type, DTYPES[dtype], enabled=dtype != "float32"):
            logits = model(x)
        return functional.cross_entropy(logits.float(), labels)

    return loss


def examples(batch: int, image: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random images and labels on both sides; images uint8 [B, 3, H, W], channels last in memory."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, image, image, 3), np.uint8)
    labels = rng.integers(0, classes, batch, np.int32)
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def machine() -> dict[str, str]:
    kind = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    return {"device": kind, "platform": DEVICE.type, "version": f"PyTorch {torch.__version__}"}


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None


def hardest(dtype: str) -> dict[str, Any]:
    """FLOP/s of a large matrix product and of a large convolution: what this device can do at best."""
    n, b = (2048, 32) if DEVICE.type == "cpu" else (8192, 256)
    kind = DTYPES[dtype]
    square = torch.randn(n, n, device=DEVICE, dtype=kind)
    images = torch.randn(b, 256, 32, 32, device=DEVICE, dtype=kind).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=DEVICE, dtype=kind).to(memory_format=torch.channels_last)
    return {
        "matmul": 2 * n**3 / _shortest(torch.matmul, square, square),
        "conv": 2
        * b
        * 32
        * 32
        * 9
        * 256
        * 256
        / _shortest(lambda x, w: functional.conv2d(x, w, None, 1, 1), images, kernel),
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


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(os.cpu_count()))
    training = Training(sys.argv[1], timm="timm" in sys.argv[2:])
    functions = {"prepare": training.prepare, "take": training.take, "report": training.report}
    turns.serve(functions | {"machine": machine, "has_timm": has_timm, "hardest": hardest})
