"""Classes of unequal size: weights of the loss by class, and epochs that draw as many images of each."""

from __future__ import annotations

import math

import numpy as np
from ml_collections import ConfigDict

from nfjax import data
from nfjax.data.loading import labels
from nfjax.data.loading.order import Classes
from nfjax.runs.progress import say
from nfjax.training import losses

BALANCED = "balanced"


def check(config: ConfigDict) -> None:
    """Raises ValueError for weights that cannot be read, and for classes that would be balanced twice."""
    given = parse(config.optim.class_weights)
    if given == BALANCED and config.data.balance_classes:
        raise ValueError(
            "optim.class_weights=balanced and data.balance_classes=True: rare classes would count twice too much; "
            "expected one of the two"
        )


def parse(text: str | None) -> str | tuple[float, ...] | None:
    """What `optim.class_weights` says: None, "balanced", or a number for each class.

    Raises:
        ValueError: It says something else.
    """
    if text is None or text == BALANCED:
        return text
    try:
        found = tuple(float(np.float32(part)) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < value < math.inf for value in found):
        raise ValueError(
            f"optim.class_weights={text!r}: expected {BALANCED}, or a positive number for each class, separated by "
            "commas, such as --config.optim.class_weights=1,2.5,1"
        )
    return found


def class_weights(config: ConfigDict, dataset: data.Dataset) -> tuple[float, ...] | None:
    """The weight of each class in the loss, None where all are 1; tells it in a line.

    Raises:
        ValueError: There are not as many weights as classes.
    """
    given, names = parse(config.optim.class_weights), dataset.class_names
    if given is None:
        return None
    if given == BALANCED:
        known = labels.labels_of(dataset.train, dataset.fingerprint)
        given = tuple(losses.balanced_weights(np.bincount(known[known >= 0], minlength=len(names))).tolist())
    if len(given) != len(names):
        raise ValueError(
            f"optim.class_weights={config.optim.class_weights} has {len(given)} weights: expected one for each of the "
            f"{len(names)} classes, {', '.join(names[:10])}{'' if len(names) <= 10 else ' and so on'}, in this order"
        )
    most, least = (order(range(len(given)), key=given.__getitem__) for order in (max, min))
    say(f"loss    weights of classes from {given[least]:.3g} ({names[least]}) to {given[most]:.3g} ({names[most]})")
    return given


def classes(
    config: ConfigDict, split: data.Images | data.Encoded, dataset: data.Dataset | None = None
) -> Classes | None:
    """Which examples of a training split are of which class, where the config draws all classes equally; else None.

    dataset: to which the split belongs, where what is read of it may be kept.
    """
    if not config.data.balance_classes:
        return None
    return Classes.of(labels.labels_of(split, None if dataset is None else dataset.fingerprint))
