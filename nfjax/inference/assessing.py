"""How good a predictor is on labelled images: a folder for each class."""

from __future__ import annotations

import os

import numpy as np

from nfjax.assessment import Assessment
from nfjax.data.sources import folder as class_folders
from nfjax.evaluate import Assessed
from nfjax.inference.predictor import Predictor, Skip


def assess(predictor: Predictor, images: str | os.PathLike[str], skip: Skip | None = None) -> Assessed:
    """As `nfjax.evaluate.assess`, for whatever `nfjax.load` loads.

    Args:
        predictor: Of which network.
        images: A folder, `images/<class>/*.jpg`; a class of the network may be missing.
        skip: Called with the name, the cause and the detail of every image that cannot be read, which is left out; None
            to raise instead.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no such folder, or no image in it.
        ValueError: It has folders of no class of the network; or an image cannot be read, and there is no `skip`.
    """
    images = os.fspath(images)
    files = class_folders.of_class_folders(images, predictor.class_names)
    paths = [os.path.join(images, os.fsdecode(files.reference(i)[0])) for i in range(len(files))]
    labels = dict(zip(paths, files.labels.tolist(), strict=True))
    read, rows = [], []
    for prediction in predictor.stream(paths, skip):
        read.append(str(prediction.image))
        rows.append(prediction.probabilities)
    if not rows:
        raise ValueError(f"none of the {len(paths):,} images in {images} can be read")
    probabilities = np.stack(rows)
    least = np.finfo(np.float32).tiny  # a probability of 0 would make the mean loss infinite
    found = Assessment(
        predictor.class_names,
        np.array([labels[path] for path in read], np.int32),
        probabilities.argmax(axis=1).astype(np.int32),
        np.log(np.maximum(probabilities, least)),
    )

    def pixels(i: int) -> np.ndarray:
        with open(read[i], "rb") as file:
            return predictor.preprocessing.of_file(file.read())

    step = 0 if predictor.origin is None else predictor.origin.step
    return Assessed(step, False, found, lambda i: os.path.relpath(read[i], images), pixels)
