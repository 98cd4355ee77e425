"""How good predictions are, beyond their accuracy: by class, what is taken for what, and whether confidence is earned.

Nothing here knows where the predictions come from::

    found = Assessment(class_names, labels, predicted, log_probabilities)
    print(found)
    found.calibration().error
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfjax.data.loading.skips import printable

__all__ = ["Assessment", "Calibration", "ClassScore"]
BINS = 15  # of the confidences, as Guo et al. 2017 take
SHOWN = 20  # classes in a printed table
CONFUSED = 2  # other classes that are named beside each


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """One class.

    Attributes:
        name: Of the class.
        images: That are of it.
        predicted: That are taken for it.
        correct: Both.
    """

    name: str
    images: int
    predicted: int
    correct: int

    @property
    def accuracy(self) -> float:
        """The share of its images that are recognized (its recall), NaN without images."""
        return self.correct / self.images if self.images else float("nan")

    @property
    def precision(self) -> float:
        """The share of what is taken for it that is of it, NaN where nothing is."""
        return self.correct / self.predicted if self.predicted else float("nan")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether the predicted class is right as often as its probability says, in bins of equal width.

    Attributes:
        edges: Of the bins, [bins + 1], from 0 to 1; a bin has its upper edge.
        images: Of each bin, int64 [bins].
        confidence: Mean probability of the predicted class in each bin, [bins], NaN where there is no image.
        accuracy: Share of right predictions, likewise.
    """

    edges: np.ndarray
    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: the distance between accuracy and confidence in a bin, as a mean over all images
        (Guo et al. 2017).
        """
        filled = self.images > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((self.images[filled] * gaps).sum() / self.images.sum())

    @property
    def excess(self) -> float:
        """Mean confidence less accuracy, over all images: positive where the network is too sure."""
        filled = self.images > 0
        gaps = self.confidence[filled] - self.accuracy[filled]
        return float((self.images[filled] * gaps).sum() / self.images.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Assessment:
    """The predictions for labelled images.

    Attributes:
        class_names: Of label 0, 1 and so on.
        labels: True class of each image, int [N].
        predicted: Class with the largest probability, int [N].
        log_probabilities: Of all classes, float [N, C].

    Raises:
        ValueError: The shapes do not agree, there is no image, or a label is of no class.
    """

    class_names: Sequence[str]
    labels: np.ndarray
    predicted: np.ndarray
    log_probabilities: np.ndarray

    def __post_init__(self) -> None:
        shape, expected = self.log_probabilities.shape, (len(self.labels), len(self.class_names))
        if shape != expected or len(self.predicted) != len(self.labels):
            raise ValueError(
                f"{len(self.labels)} labels, {len(self.predicted)} predictions, {len(self.class_names)} class names, "
                f"log-probabilities {list(shape)}: expected as many predictions as labels, and {list(expected)}"
            )
        if not len(self.labels):
            raise ValueError("there is no image to assess predictions with")
        for what, numbers in (("label", self.labels), ("prediction", self.predicted)):
            if numbers.min() < 0 or numbers.max() >= len(self.class_names):
                raise ValueError(f"a {what} is of no class: expected 0 to {len(self.class_names) - 1}")

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """A fraction in [0, 1]."""
        return float((self.predicted == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(-self.log_probabilities[np.arange(self.images), self.labels].mean(dtype=np.float64))

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the predicted class, float64 [N]."""
        return np.exp(self.log_probabilities[np.arange(self.images), self.predicted].astype(np.float64))

    def top(self, k: int) -> float:
        """The share of images whose class is among the `k` most probable; equally probable ones count for it."""
        own = self.log_probabilities[np.arange(self.images), self.labels]
        return float(((self.log_probabilities > own[:, None]).sum(axis=1) < k).mean())

    def confusion(self) -> np.ndarray:
        """How many images of a class (rows) are taken for which (columns), int64 [C, C]."""
        classes = len(self.class_names)
        pairs = self.labels.astype(np.int64) * classes + self.predicted
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def by_class(self) -> list[ClassScore]:
        """Every class, in the order of the labels."""
        confusion = self.confusion()
        columns = (confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal())
        counts = zip(*(column.tolist() for column in columns), strict=True)
        return [ClassScore(name, *count) for name, count in zip(self.class_names, counts, strict=True)]

    def calibration(self, bins: int = BINS) -> Calibration:
        """How far confidence is earned, in so many bins."""
        if bins < 1:
            raise ValueError(f"bins={bins}: expected at least one")
        confidence, right = np.clip(self.confidence, 0.0, 1.0), self.predicted == self.labels
        edges = np.linspace(0.0, 1.0, bins + 1)
        places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
        images = np.bincount(places, minlength=bins)
        with np.errstate(invalid="ignore"):
            means = [np.bincount(places, weights, bins) / images for weights in (confidence, right.astype(np.float64))]
        return Calibration(edges, images, *means)

    def confident_errors(self, k: int) -> np.ndarray:
        """Which of the wrong predictions are the most confident, int [k] at most, the worst first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:k]

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, for JSON: NaN, where a class has no image, is None."""
        calibration, top = self.calibration(), min(5, len(self.class_names))
        return {
            "images": self.images,
            "accuracy": self.accuracy,
            f"top_{top}_accuracy": self.top(top),
            "loss": self.loss,
            "calibration_error": calibration.error,
            "calibration": {
                "edges": calibration.edges.tolist(),
                "images": calibration.images.tolist(),
                "confidence": [_or_none(value) for value in calibration.confidence.tolist()],
                "accuracy": [_or_none(value) for value in calibration.accuracy.tolist()],
            },
            "classes": [
                dataclasses.asdict(row) | {"accuracy": _or_none(row.accuracy), "precision": _or_none(row.precision)}
                for row in self.by_class()
            ],
            "confusion": self.confusion().tolist(),
        }

    def __str__(self) -> str:
        """A table of the classes, those that are recognized worst first, and a line on confidence."""
        confusion = self.confusion()
        others = confusion - np.diag(confusion.diagonal())
        rows = sorted(enumerate(self.by_class()), key=lambda row: (not row[1].images, row[1].accuracy))
        shown = rows[:SHOWN]
        names = [printable(name) for name in self.class_names]
        width = max([len("class"), *(len(names[label]) for label, _ in shown)])
        lines = [f"{'class':<{width}}  images  accuracy  precision  most often predicted instead"]
        for label, row in shown:
            order = np.argsort(-others[label], kind="stable")[:CONFUSED]
            taken = ", ".join(f"{names[i]} ({others[label, i]})" for i in order if others[label, i])
            accuracy, precision = (f"{value:.1%}" if value == value else "-" for value in (row.accuracy, row.precision))
            lines.append(f"{names[label]:<{width}}  {row.images:6,}  {accuracy:>8}  {precision:>9}  {taken}".rstrip())
        if len(rows) > len(shown):
            lines.append(f"and {len(rows) - len(shown):,} classes that are recognized better")
        calibration = self.calibration()
        points = f"{abs(100 * calibration.excess):.1f} points {'above' if calibration.excess >= 0 else 'below'}"
        lines.append(
            f"confidence: {self.confidence.mean():.1%} on average, {points} the accuracy; expected calibration error "
            f"{calibration.error:.1%} ({len(calibration.images)} bins)"
        )
        return "\n".join(lines)


def _or_none(value: float) -> float | None:
    return value if value == value else None


def __dir__() -> list[str]:
    return __all__
