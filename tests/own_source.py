"""A data source of a user's own for test_sources_own: importable by the worker processes."""

import io

import numpy as np
from PIL import Image

from nfjax import data


class Noise:
    """Noise in two brightnesses, in each form that an image may have."""

    def __init__(self, form, size):
        self.form, self.size = form, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        label = index % 2
        side = 8 + index % 3  # sizes may differ
        array = np.random.default_rng(index).integers(0, 128, (side, side, 3), np.uint8) + np.uint8(120 * label)
        return FORMS[self.form](array), np.int64(label)


def _file(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


FORMS = {
    "array": lambda array: array,
    "grey": lambda array: array[..., 0],
    "grey with channel": lambda array: array[..., :1],
    "pillow": Image.fromarray,
    "file": _file,
}


def load(directory, image_size):
    return data.from_sequences(Noise(directory or "array", 48), Noise(directory or "array", 12), ["dark", "bright"])


def wrong(directory, image_size):
    return [1, 2], [3]
