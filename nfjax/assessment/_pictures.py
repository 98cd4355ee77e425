"""Pictures of an assessment: what is taken for what, whether confidence is earned, and the worst mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nfjax import _contact_sheet as contact_sheet
from nfjax import _figures as figures
from nfjax import _streams as streams
from nfjax.assessment import Assessment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 40  # classes whose names fit beside a matrix
NUMBERED = 16  # classes whose counts fit into its cells


def draw(found: Assessment, title: str = "") -> Figure:
    """The confusion matrix, each row a share of its class, beside the reliability diagram."""
    classes = len(found.class_names)
    side = min(11.0, max(4.5, 0.42 * min(classes, NAMED) + 1.5))
    figure = figures.new(figsize=(side + 5.2, side), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15)
    left, right = figure.subplots(1, 2, width_ratios=(side, 3.8))
    _matrix(left, found)
    _reliability(right, found)
    if title:
        figure.suptitle(streams.printable(title), parse_math=False)
    return figure


def _matrix(axes: Axes, found: Assessment) -> None:
    counts = found.confusion()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    classes = len(found.class_names)
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes <= NAMED:
        names = [contact_sheet.short(name) for name in found.class_names]
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    if classes <= NUMBERED:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=colour)
    axes.figure.colorbar(shown, ax=axes, label="share of the class", shrink=0.8)
    axes.set_title(f"{found.accuracy:.2%} of {found.images:,} images are recognized")


def _reliability(axes: Axes, found: Assessment) -> None:
    bins = found.calibration()
    width = float(bins.edges[1] - bins.edges[0])
    filled = bins.images > 0
    middle = bins.edges[:-1] + width / 2
    share, confidence, accuracy = bins.images[filled] / found.images, bins.confidence[filled], bins.accuracy[filled]
    axes.bar(middle[filled], share, width, color="0.88", label="share of the images")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--", label="confidence that is earned")
    # A bin of a few images says little: its standard error is drawn, and the line joins nothing.
    spread = np.sqrt(np.maximum(accuracy * (1 - accuracy), confidence * (1 - confidence)) / bins.images[filled])
    axes.errorbar(confidence, accuracy, spread, fmt="o", markersize=4, linewidth=1, label="accuracy, standard error")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="probability of the predicted class")
    axes.set_title(f"expected calibration error {bins.error:.1%}")
    axes.set_box_aspect(1)
    axes.legend(loc="best", fontsize=8)


def draw_errors(found: Assessment, chosen: Sequence[int], image: Callable[[int], np.ndarray]) -> Figure:
    """A contact sheet: what each image is taken for, with which probability, and what it is.

    Args:
        found: With the predictions.
        chosen: Which of its images, at least one.
        image: From its number to its pixels, uint8 [H, W, 3].
    """
    tiles = []
    for i in chosen:
        taken, true = (contact_sheet.short(found.class_names[label[i]]) for label in (found.predicted, found.labels))
        tiles.append(contact_sheet.Tile((image(int(i)),), [f"{taken} {found.confidence[i]:.0%}", f"is {true}"]))
    return contact_sheet.draw(tiles)
