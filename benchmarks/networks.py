"""The networks of the comparisons by the names that the tables give them; every side imports it."""

from __future__ import annotations

NETWORKS = {"BatchNorm": ("identity", "batch"), "IdShort": ("idshort", None), "ConvShort": ("convshort", None)}
CLASSES = {32: 10, 224: 1000}  # by pixels


def title(depth: int, network: str, width: int) -> str:
    """ "ResNet-18 IdShort, width 16"; 64 is the width of those that have none in their names."""
    return f"ResNet-{depth} {network}" + ("" if width == 64 else f", width {width}")
