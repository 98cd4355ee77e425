"""What a network says of images: a probability for each class, by name."""

from __future__ import annotations

import dataclasses

import numpy as np

from nfjax.inference._images import Image


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Of one image.

    Attributes:
        image: As it was given.
        pixels: What the network sees of it before it is normalised, uint8 [S, S, 3].
        probabilities: float32 [classes], in the order of `class_names`.
        class_names: Of all classes.
    """

    image: Image
    pixels: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name of the most probable class."""
        return self.top(1)[0][0]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """(name, probability) of the `k` most probable classes, of all where there are fewer."""
        return _top(self.probabilities, self.class_names, k)


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Of several images, in their order.

    Attributes:
        probabilities: float32 [B, classes], each row adding up to 1.
        class_names: Of the columns.
    """

    probabilities: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def labels(self) -> list[str]:
        """The name of the most probable class of each image."""
        return [row[0][0] for row in self.top(1)]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Of each image [(name, probability), ...] of the `k` most probable classes, of all where there are fewer.

        Raises:
            ValueError: k is not positive.
        """
        return [_top(row, self.class_names, k) for row in self.probabilities]

    def __repr__(self) -> str:
        shown = [", ".join(f"{name} {share:.1%}" for name, share in row) for row in self.top(3)[:10]]
        more = [f"… {len(self) - 10} more"] if len(self) > 10 else []
        return "\n".join([f"Predictions of {len(self)} images, {len(self.class_names)} classes", *shown, *more])


def _top(probabilities: np.ndarray, class_names: tuple[str, ...], k: int) -> list[tuple[str, float]]:
    if k < 1:
        raise ValueError(f"k={k}: expected at least one class")
    order = np.argsort(-probabilities, kind="stable")[:k]  # of equal ones the first
    return [(class_names[i], float(probabilities[i])) for i in order]
