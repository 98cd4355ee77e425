"""Which networks each training figure of the paper compares, the most telling first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

BASELINE = "BatchNorm, He fan-out"
CONVSHORT = "ConvShort, He fan-out"
SCHEMES = (CONVSHORT, "IdShort, He fan-out", "LearnScalar, He fan-out")
# The rules of the field and the norms, each with its authors' initialization and with He's fan-out.
OF_RULES = (
    "IdShort, He fan-out",
    "BatchNorm, He fan-out",
    "ConvShort, He fan-out",
    "NF-ResNet, LeCun",
    "NF-ResNet, He fan-out",
    "Fixup, He fan-out",
    "SkipInit, LeCun",
    "SkipInit, He fan-out",
    "DepthScale, He fan-in",
    "DepthScale, He fan-out",
    "RescaleNet, He fan-in",
    "RescaleNet, He fan-out",
    "MPSum, He fan-in",
    "MPSum, He fan-out",
    "LearnScalar, He fan-out",
    "classical, He fan-in",
    "classical, He fan-out",
    "classical with convolutions, He fan-out",
    "GroupNorm, LeCun",
    "GroupNorm, He fan-out",
    "DyT, He fan-out",
    "Derf, He fan-out",
)
# A network without norm whose signal explodes, mended in several ways: in its kernels, in its rule, or by both.
MENDED_CURVES = (
    "classical, He fan-out",
    "classical, He fan-out, balance",
    "IdShort, He fan-out",
    "IdShort, effective fan-out",
    "IdShort, He fan-out, balance",
    "classical, He fan-out, balance backward",
    "classical, LSUV",
    "classical, He fan-in",
    "classical, Brock",
    "BatchNorm, He fan-out",
)
# What is set for some networks and not for the rest: what their authors train otherwise, and what mends them.
CHANGES = {
    "Fixup, He fan-out": {"optim.scalar_rate": 0.1},
    "classical, He fan-out, balance": {"model.rescale": "balance"},
    "classical, He fan-out, balance backward": {"model.rescale": "balance_backward"},
    "classical, LSUV": {"model.rescale": "lsuv"},
    "IdShort, He fan-out, balance": {"model.rescale": "balance"},
}
# The same schemes in the same order, so that each has its control.
BROCK = ("ConvShort, Brock", "IdShort, Brock", "LearnScalar, Brock")
BEYOND = "ConvShort, effective fan-out"  # not in the paper
CONTROL = "classical, He fan-out"  # without norm and without any of the schemes; not in the paper's figure

ANY = "any images"  # in place of a data set of the paper

# torchvision's ResNet-50 with batch normalization, the dashed line of figure 5 and the paper's only printed accuracy.
TORCHVISION = 0.7613


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network with one choice of settings, to be trained with several seeds.

    curve: a name in `_curves.NETWORKS`. changes: {"optim.weight_decay": 5e-4}, over the settings of the whole grid.
    label: what it is called beside the others.
    """

    depth: int
    curve: str
    label: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is compared, in order of value.

    dataset: a name in `runs.BASES`. line: an accuracy to draw, with its name. by_depth: whether it is drawn over the
    number of layers, and not by epoch.
    """

    title: str
    dataset: str
    cells: tuple[Cell, ...]
    line: tuple[str, float] | None = None
    by_depth: bool = False

    @property
    def depths(self) -> list[int]:
        return list(dict.fromkeys(cell.depth for cell in self.cells))


def _networks(depth: int, *curves: str) -> tuple[Cell, ...]:
    return tuple(Cell(depth, curve, f"ResNet-{depth} {curve}") for curve in curves)


def _deep(depth: int) -> tuple[Cell, ...]:
    convshort, *others = SCHEMES
    brock, *other_brock = BROCK
    return _networks(depth, BASELINE, convshort, others[0], brock, BEYOND, *others[1:], *other_brock)


GRIDS = {
    "figure3": Grid("Figure 3: ResNet-50 and ResNet-101", "CIFAR-10", _deep(50) + _deep(101)),
    "figure4": Grid("Figure 4: ResNet-50", "CIFAR-100", _networks(50, CONVSHORT, BASELINE)),
    "figure5": Grid(
        "Figure 5: ResNet-50",
        "ImageNet",
        _networks(50, CONVSHORT),
        ("torchvision's ResNet-50, 76.13 %", TORCHVISION),
    ),
    "figure7": Grid("Figure 7: ResNet-18", "CIFAR-10", _networks(18, BASELINE, *SCHEMES, *BROCK, BEYOND, CONTROL)),
}


# Not in the paper: what depth itself does to each scheme. Runs of 18, 50 and 101 layers are those of its figures.
DEPTH = Grid(
    "Depth: ResNet-18 to ResNet-152",
    "CIFAR-10",
    tuple(
        cell
        for depth in (18, 34, 50, 101, 152)
        for cell in _networks(depth, BASELINE, CONVSHORT, SCHEMES[1], BROCK[0], BEYOND)
    ),
    by_depth=True,
)


def _changed(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    return tuple(dataclasses.replace(cell, changes=CHANGES.get(cell.curve, {})) for cell in cells)


# Not in the paper: every rule of the field, with the initialization of its authors and with He's fan-out.
RULES = Grid(
    "Every rule of the field",
    ANY,
    _changed(cell for depth in (18, 50, 101) for cell in _networks(depth, *OF_RULES)),
)
# Not in the paper: does mending the signal mend the training?
MENDED = Grid("Mended signals", ANY, _changed(_networks(101, *MENDED_CURVES)))


def _very_deep(depth: int, sizes: tuple[int, ...]) -> tuple[Cell, ...]:
    """Of basic blocks: the stem, two convolutions for each of them, and the classifier."""
    curves = (
        "IdShort, He fan-out",
        "IdShort, effective fan-out",
        "ConvShort, He fan-out",
        "ConvShort, effective fan-out",
        "DepthScale, He fan-in",
        "DepthScale, He fan-out",
        "DepthScale, effective fan-out",
        "NF-ResNet, LeCun",
        "BatchNorm, He fan-out",
    )
    assert depth == 2 * sum(sizes) + 2
    shape = {"model.stage_sizes": sizes, "model.block": "basic"}
    return tuple(Cell(depth, curve, f"{depth} layers, {curve}", shape) for curve in curves)


# Not in the paper: the effective fan-out where it should matter most.
VERY_DEEP = Grid(
    "Very deep networks of basic blocks", ANY, _very_deep(200, (24, 25, 25, 25)) + _very_deep(500, (62, 62, 62, 63))
)


def ablations(epochs: int) -> Grid:
    """What the settings that the paper does not state are worth: ResNet-18 ConvShort, one of them changed at a time.

    epochs: of all but those that vary their number, which train half and twice as long.
    """

    def changed(label: str, **changes: Any) -> Cell:
        return Cell(18, CONVSHORT, label, {name.replace("__", "."): value for name, value in changes.items()})

    cells = (
        changed("as in the figures"),
        changed("weight decay 1e-4", optim__weight_decay=1e-4),
        changed("weight decay 5e-4", optim__weight_decay=5e-4),
        changed("no RandAugment", augment__rand_operations=0),
        changed("RandAugment N=1", augment__rand_operations=1),
        changed("RandAugment M=5", augment__rand_magnitude=5),
        changed("RandAugment M=15", augment__rand_magnitude=15),
        changed(f"{max(epochs // 2, 1)} epochs", epochs=max(epochs // 2, 1)),
        changed(f"{epochs * 2} epochs", epochs=epochs * 2),
    )
    return Grid("Settings that the paper does not state: ResNet-18 ConvShort, He fan-out", "CIFAR-10", cells)
