"""A contact sheet of the first training batch: every image as it is in the file, and as the training step sees it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from nfjax import data, train
from nfjax.data.crops import CentreCrop


def contact_sheet(config: ConfigDict, count: int = 16, step: int = 0) -> Figure:
    """The first `count` images of the batch of training step `step`, in pairs: the whole image (its middle square)
    above, the augmented one below, with their labels.

    Augmentation depends on the whole batch's key: these are the pixels that a run with this config trains on.
    """
    dataset = train.open_data(config, config.data.dir)
    split, size = dataset.train, config.data.image_size
    (order,) = data.train_orders(config.seed, len(split), config.batch_size, step, step + 1)
    if isinstance(split, data.Images):
        batch = split.take(order.indices)
        plain, cropped, labels = batch["image"], batch["image"], batch["label"]
    else:
        transform, middle = train.make_transform(config, "train"), CentreCrop(size, size)
        read = [split.reader(split.reference(int(index))) for index in order.indices]
        labels = np.array([label for _, label in read])
        plain = np.stack([middle(image) for image, _ in read[:count]])
        cropped = np.stack(
            [transform(image, int(position)) for (image, _), position in zip(read, order.positions, strict=True)]
        )
    _, augment_key = jax.random.split(jax.random.key(config.seed))
    key = jax.random.fold_in(augment_key, step)
    augmented = np.asarray(jax.jit(train.augmentation(config))(key, jnp.asarray(cropped)))
    return _sheet(plain[:count], augmented[:count], [dataset.class_names[label] for label in labels[:count]])


def _sheet(plain: np.ndarray, augmented: np.ndarray, names: list[str]) -> Figure:
    columns = min(8, len(plain))
    rows = -(-len(plain) // columns)
    figure = Figure(figsize=(1.4 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, name in enumerate(names):
        row, column = 2 * (i // columns), i % columns
        axes[row, column].imshow(plain[i])
        axes[row, column].set_title(name if len(name) <= 18 else f"{name[:17]}…", fontsize=8)
        axes[row + 1, column].imshow(augmented[i])
    return figure
