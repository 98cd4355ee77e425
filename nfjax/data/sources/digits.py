"""The handwritten digits that ship with scikit-learn: 1 797 grey images of 8x8 pixels in 10 classes (UCI, Alpaydin and
Kaynak 1998).
"""

from __future__ import annotations

import numpy as np

from nfjax.data.splits import Dataset, Images


def load(image_size: int = 8) -> Dataset:
    """1 437 training and 360 test images, a fixed stratified split; grey in all three channels.

    Args:
        image_size: Height and width in pixels, to which the images of 8x8 are scaled.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    grey = np.round(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    if image_size != 8:
        grey = np.stack(
            [
                np.asarray(Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR))
                for image in grey
            ]
        )
    images = np.repeat(grey[..., None], 3, axis=-1)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=labels)
    labels = labels.astype(np.int32)
    return Dataset(Images(images[train], labels[train]), Images(images[test], labels[test]), tuple(map(str, range(10))))
