"""The networks that are compared, by the names of their curves, and how those of the paper's figures are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from nfjax import spp

# The paper's curves, and behind them one per scheme with the effective fan-out: name -> (residual, norm, init).
CURVES: dict[str, tuple[str, str | None, str]] = {
    "classical, He fan-in": ("identity", None, "he_fan_in"),
    "classical, He fan-out": ("identity", None, "he_fan_out"),
    "BatchNorm, He fan-in": ("identity", "batch", "he_fan_in"),
    "BatchNorm, He fan-out": ("identity", "batch", "he_fan_out"),
    "IdShort, He fan-out": ("idshort", None, "he_fan_out"),
    "LearnScalar, He fan-out": ("learnscalar", None, "he_fan_out"),
    "ConvShort, He fan-out": ("convshort", None, "he_fan_out"),
    "IdShort, Brock": ("idshort", None, "brock"),
    "LearnScalar, Brock": ("learnscalar", None, "brock"),
    "ConvShort, Brock": ("convshort", None, "brock"),
    "IdShort, effective fan-out": ("idshort", None, "he_effective_fan_out"),
    "ConvShort, effective fan-out": ("convshort", None, "he_effective_fan_out"),
}
# What else is compared with them: the rules of others, and what stands in for batch norm.
NETWORKS = CURVES | {
    "classical with convolutions, He fan-out": ("conv", None, "he_fan_out"),
    "SkipInit, LeCun": ("skipinit", None, "lecun_normal"),
    "SkipInit, He fan-out": ("skipinit", None, "he_fan_out"),
    "Fixup, He fan-out": ("fixup", None, "he_fan_out"),
    "RescaleNet, He fan-in": ("rescalenet", None, "he_fan_in"),
    "RescaleNet, He fan-out": ("rescalenet", None, "he_fan_out"),
    "NF-ResNet, LeCun": ("nf", None, "lecun_normal"),
    "NF-ResNet, He fan-out": ("nf", None, "he_fan_out"),
    "DepthScale, He fan-in": ("depthscale", None, "he_fan_in"),
    "DepthScale, He fan-out": ("depthscale", None, "he_fan_out"),
    "DepthScale, effective fan-out": ("depthscale", None, "he_effective_fan_out"),
    "MPSum, He fan-in": ("mpsum", None, "he_fan_in"),
    "MPSum, He fan-out": ("mpsum", None, "he_fan_out"),
    "GroupNorm, LeCun": ("identity", "group", "lecun_normal"),
    "GroupNorm, He fan-out": ("identity", "group", "he_fan_out"),
    "classical, Brock": ("identity", None, "brock"),
    # Mended before the first step, on images: see `_grids.CHANGES`.
    "classical, He fan-out, balance": ("identity", None, "he_fan_out"),
    "classical, He fan-out, balance backward": ("identity", None, "he_fan_out"),
    "classical, LSUV": ("identity", None, "he_fan_out"),
    "IdShort, He fan-out, balance": ("idshort", None, "he_fan_out"),
    "DyT, He fan-out": ("identity", "dyt", "he_fan_out"),
    "Derf, He fan-out": ("identity", "derf", "he_fan_out"),
}
# Colour by scheme, dashes and markers by initialization.
_COLOURS = {
    "classical": "#000000", "BatchNorm": "#CC79A7", "IdShort": "#0072B2", "LearnScalar": "#E69F00",
    "ConvShort": "#009E73",
}  # fmt: skip
_LOOKS = {"He fan-in": (":", "v"), "He fan-out": ("-", "o"), "Brock": ("--", "s"), "effective fan-out": ("-.", "^")}


def styles(names: Sequence[str]) -> dict[str, spp.Style]:
    """Colour by scheme, dashes and marker by initialization."""
    parts = {name: name.split(", ", 1) for name in names}
    return {name: spp.Style(_COLOURS[scheme], *_LOOKS[init]) for name, (scheme, init) in parts.items()}
