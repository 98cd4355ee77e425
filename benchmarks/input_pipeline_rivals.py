"""What a user would run instead of nfjax's input pipeline; see input_pipeline.py, which starts this.

    PYTHON benchmarks/input_pipeline_rivals.py NAME DIR WORKERS

Prints images per second over four epochs, after one to warm up.
"""

import math
import os
import pathlib
import sys
import time
import types

SIZE, BATCH = 224, 100
TIMED = 4  # epochs: what was prefetched before them counts little then


def box(rng, height, width):
    """A random box by torchvision's rules."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def pool(paths, workers):
    import concurrent.futures
    import threading

    import cv2
    import numpy as np
    import simplejpeg

    cv2.setNumThreads(0)
    local = threading.local()

    def crop(path):
        if not hasattr(local, "rng"):
            local.rng = np.random.default_rng()
        with open(path, "rb") as file:
            image = simplejpeg.decode_jpeg(file.read(), "RGB", strict=False)
        y, x, h, w = box(local.rng, *image.shape[:2])
        image = cv2.resize(image[y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        return cv2.flip(image, 1) if local.rng.random() < 0.5 else image

    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        while True:
            batch = []
            for image in executor.map(crop, paths):
                batch.append(image)
                if len(batch) == BATCH:
                    yield np.stack(batch)
                    batch = []


def torchvision_transforms():
    """torchvision's transforms, also where its compiled part does not fit the torch that is there."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError, AttributeError):
        import importlib.util

        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        package = types.ModuleType("torchvision")
        package.__path__ = list(importlib.util.find_spec("torchvision").submodule_search_locations)
        extension = types.ModuleType("torchvision.extension")
        extension._HAS_OPS = False
        sys.modules |= {"torchvision": package, "torchvision.extension": extension}
        from torchvision import transforms
    return transforms


class TorchFiles:
    def __init__(self, paths):
        transforms = torchvision_transforms()
        self.paths = paths
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image

        with open(self.paths[index], "rb") as file:
            return self.transform(Image.open(file, formats=("JPEG",)).convert("RGB"))


def dataloader(paths, workers):
    import torch

    loader = torch.utils.data.DataLoader(
        TorchFiles(paths), BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def tf(paths, workers, antialias=False):
    import tensorflow

    def crop(path):
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
        pixels = image.resize(pixels, (SIZE, SIZE), antialias=antialias)
        pixels = tensorflow.cast(tensorflow.clip_by_value(tensorflow.round(pixels), 0, 255), tensorflow.uint8)
        return image.random_flip_left_right(pixels)

    files = tensorflow.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    batches = files.map(crop, num_parallel_calls=workers).batch(BATCH).prefetch(2)
    options = tensorflow.data.Options()
    options.threading.private_threadpool_size = workers
    yield from batches.with_options(options)


def tf_antialiased(paths, workers):
    yield from tf(paths, workers, antialias=True)


class Crop:
    """For grain: nfjax's own crop, so that the machinery around it is compared."""

    def __init__(self):
        from nfjax.data.decoding.crops import RandomResizedCrop

        self.crop = RandomResizedCrop(SIZE)

    def __call__(self, path):
        with open(path, "rb") as file:
            return self.crop(file.read(), hash(path) % 2**31)


def grain(paths, workers):
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    chosen = grain.MapDataset.source(paths).shuffle(seed=0).repeat().map(Crop()).batch(BATCH)
    yield from chosen.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def main():
    name, folder, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    paths = sorted(str(path) for path in pathlib.Path(folder).rglob("*") if path.is_file())
    makers = {"pool": pool, "dataloader": dataloader, "tf": tf, "tf_antialiased": tf_antialiased, "grain": grain}
    batches, steps = iter(makers[name](paths, workers)), len(paths) // BATCH
    for _ in range(steps):
        next(batches)
    start, images = time.perf_counter(), 0
    for _ in range(TIMED * steps):
        images += len(next(batches))
    print(images / (time.perf_counter() - start), flush=True)
    os._exit(0)  # workers of some rivals take long to end


if __name__ == "__main__":
    main()
