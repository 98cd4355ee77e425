"""What both sides of speed.py are asked to train; PyTorch's interpreter reads it too, and has no nfjax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Training:
    """A network, the shapes and the precision of its steps.

    image: height and width in pixels. parameters: an .npz file, from which all sides start. warm: steps
    before any is timed.
    """

    depth: int
    residual: str
    norm: str | None
    image: int
    classes: int
    batch: int
    dtype: str
    width: int
    parameters: str
    warm: int

    @property
    def stem(self) -> str:
        return "imagenet" if self.image >= 224 else "cifar"
