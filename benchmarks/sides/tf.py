"""tf.data: training crops by decode_and_crop_jpeg, antialiased or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow

from benchmarks.sides import _crops


def machine() -> dict[str, str]:
    return {"device": "cpu", "platform": "cpu", "version": f"TensorFlow {tensorflow.__version__}"}


class Crops(_crops.Crops):
    def __init__(self, antialias: str = ""):
        self.antialias = bool(antialias)

    def crop(self, path: Any) -> Any:
        image = tensorflow.image
        data = tensorflow.io.read_file(path)
        begin, size, _ = image.sample_distorted_bounding_box(
            image.extract_jpeg_shape(data),
            tensorflow.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
            min_object_covered=0,
            aspect_ratio_range=[3 / 4, 4 / 3],
            area_range=[0.08, 1.0],
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        y, x, _ = tensorflow.unstack(begin)
        h, w, _ = tensorflow.unstack(size)
        pixels = image.decode_and_crop_jpeg(data, tensorflow.stack([y, x, h, w]), channels=3)
        pixels = image.resize(pixels, (_crops.SIZE, _crops.SIZE), antialias=self.antialias)
        pixels = tensorflow.cast(tensorflow.clip_by_value(tensorflow.round(pixels), 0, 255), tensorflow.uint8)
        return image.random_flip_left_right(pixels)

    def batches(self, paths: list[str], workers: int) -> Iterator[Any]:
        files = tensorflow.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
        batches = files.map(self.crop, num_parallel_calls=workers).batch(_crops.BATCH).prefetch(2)
        options = tensorflow.data.Options()
        options.threading.private_threadpool_size = workers
        yield from batches.with_options(options)


MEASURES = {"crops": Crops}
