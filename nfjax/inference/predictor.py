"""A trained network with all that it takes to use it: images in, probabilities of named classes out."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nfjax import _cpu, compilation
from nfjax.data.decoding.decode import BadImageError
from nfjax.data.loading import skips
from nfjax.data.loading.pool import default_workers
from nfjax.inference import _arrays, _images
from nfjax.inference._images import Image
from nfjax.inference.predictions import Prediction, Predictions
from nfjax.inference.preprocessing import Preprocessing
from nfjax.training import networks, sharding

BATCH_SIZE = 64
Skip = Callable[[str, str, str], None]  # called with (name, cause, detail) of an image that cannot be read
_Decoded: TypeAlias = "tuple[str, Image, np.ndarray]"  # (name, as it was given, its pixels)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a network comes from: told in its card, and never acted upon.

    Attributes:
        step: Of the checkpoint.
        ema: Whether its weights are the average over the steps.
        accuracy: On the run's test images, in [0, 1]; None where it was not scored at this step.
        test_images: How many these are.
        training_images: How many it was trained on.
        settings: Of the run, by section.
    """

    step: int
    ema: bool
    accuracy: float | None
    test_images: int
    training_images: int
    settings: dict[str, Any]


class Predictor:
    """A trained network, from images to probabilities::

        predictor = nfjax.load("runs/mine")
        predictor("cat.jpg").top(3)

    Attributes:
        network: As pure functions, with `params` and `batch_stats` as its state.
        params: Its parameters, a plain dict of arrays on every device.
        batch_stats: What else it has, such as running statistics.
        preprocessing: From an image to what the network sees.
        class_names: Of its outputs.
        batch_size: Images that are computed together, over all devices.
        architecture: What the network is built from; None of a model that somebody built.
        origin: Where it comes from; likewise.
    """

    def __init__(
        self,
        model: nnx.Module,
        preprocessing: Preprocessing,
        class_names: Iterable[str],
        *,
        batch_size: int = BATCH_SIZE,
        architecture: networks.Architecture | None = None,
        origin: Origin | None = None,
    ):
        """Takes the model apart; what is done to it later has no effect.

        Args:
            model: [B, S, S, 3] in float32 -> logits [B, classes].
            preprocessing: Of the images.
            class_names: Of the logits.
            batch_size: Rounded up to a multiple of the devices.
            architecture: Without which `nfjax.inference.export` cannot write the weights.
            origin: For the card that `nfjax.inference.export` writes.

        Raises:
            ValueError: batch_size is no positive whole number, or the model returns another number of logits than there
                are names.
        """
        if not isinstance(batch_size, int | np.integer) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected at least one image, and a whole number of them")
        self.preprocessing, self.class_names = preprocessing, tuple(class_names)
        self.architecture, self.origin = architecture, origin
        devices = jax.local_devices()
        self._mesh = Mesh(np.array(devices)[:, None], sharding.AXES)
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self.network, *weights = networks.as_functions(model)
        self._check_logits(*weights)
        self.params, self.batch_stats = sharding.place(weights, sharding.replicated(self._mesh))
        options = _cpu.compiler_options(_cpu.platform_of(self._mesh))
        self._program, self._options = jax.jit(self._probabilities, compiler_options=options), options

    def __call__(self, images: Image | Iterable[Image]) -> Predictions:
        """The probabilities of images.

        Args:
            images: One, or several in a list, a generator or any other iterable. Each is a path, the bytes of an image
                file, a Pillow image of any mode, or RGB uint8 [H, W, 3], of any size; or all of them are one array,
                uint8 [B, H, W, 3]. Of files, which are read a few at a time, the network sees exactly the pixels that
                the run's evaluation would see. Pixels that are decoded already are resized as those of a PNG; a large
                JPEG, which is decoded at a reduced size, may differ from that by a few grey levels.

        Raises:
            ValueError: There are no images; one would be misread, such as floats, channels first or a grey image
                without channels; or a file is no image or damaged (`stream` can go on without it).
            TypeError: It is no image at all.
            OSError: A file cannot be read.
        """
        rows = [prediction.probabilities for prediction in self.stream(images)]
        if not rows:
            raise ValueError(f"there are no images: {_images.EXPECTED}, one or several of them")
        return Predictions(np.stack(rows), self.class_names)

    def stream(self, images: Image | Iterable[Image], skip: Skip | None = None) -> Iterator[Prediction]:
        """The predictions one by one, in order, while the next images are decoded: a few batches are held in memory,
        and of a generator, the first prediction comes when two batches have been asked for, or its end. An error comes
        behind the predictions of all images before it.

        Args:
            images: As of a call.
            skip: Called with the name, the cause in a few words and the detail of every image that cannot be read,
                which is left out; None to raise instead.

        Raises:
            ValueError, TypeError, OSError: As a call.
        """
        given, count = _images.separate(images)
        size = self.batch_size if count is None else self._size_for(count)
        decoded = self._decoded(given, size, skip)
        before = failure = None
        while failure is None:
            batch = []
            try:
                for one in itertools.islice(decoded, size):
                    batch.append(one)
            except Exception as error:  # raised when what came before it is predicted
                failure = error
            if not batch:
                break
            now = batch, self._dispatch(np.stack([pixels for *_, pixels in batch]), size)
            if before is not None:  # only now, so that the device is never idle while the host decodes
                yield from self._fetched(*before)
            before = now
        if before is not None:
            yield from self._fetched(*before)
        if failure is not None:
            raise failure

    def function(self) -> Callable[[jax.Array], jax.Array]:
        """Images uint8 [B, S, S, 3] -> probabilities float32 [B, classes], a pure function with the weights inside."""
        params, batch_stats = sharding.everywhere((self.params, self.batch_stats))
        return lambda images: self._probabilities(params, batch_stats, images)

    def of_pixels(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, classes] of what the network sees, uint8 [B, S, S, 3], `batch_size` at most.

        Raises:
            ValueError: It is something else; `preprocessing` makes it of files and of images of any size.
        """
        side = self.preprocessing.image_size
        _arrays.check(images, "the array", several=True)
        if images.shape[1:] != (side, side, 3) or len(images) > self.batch_size:
            raise ValueError(
                f"the array has the shape {list(images.shape)}: expected [B, {side}, {side}, 3], batch_size="
                f"{self.batch_size} images at most; a call of the predictor takes any number of images of any size"
            )
        return np.asarray(self._dispatch(images, self._size_for(len(images))))[: len(images)]

    def _probabilities(self, params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        return jax.nn.softmax(self.network.predict(params, batch_stats, self.preprocessing.normalize(images)))

    def _check_logits(self, params: Any, batch_stats: Any) -> None:
        side = self.preprocessing.image_size
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
        shape = jax.eval_shape(self._probabilities, params, batch_stats, images).shape
        if shape != (1, len(self.class_names)):
            raise ValueError(
                f"the network returns {list(shape)} for one image: expected [1, {len(self.class_names)}], a number for "
                f"each of its {len(self.class_names)} class names"
            )

    def _size_for(self, count: int) -> int:
        """Of the batches for so many images: fewer than a batch are not computed as one, but few sizes are compiled."""
        devices = self._mesh.size
        size = devices * 2 ** (-(-count // devices) - 1).bit_length()
        return min(size, self.batch_size)

    def _decoded(self, images: Iterator[Image], ahead: int, skip: Skip | None) -> Iterator[_Decoded]:
        """Those that can be read, in order, decoded in threads."""
        waiting: collections.deque[tuple[str, Image, concurrent.futures.Future[np.ndarray]]] = collections.deque()
        pool = concurrent.futures.ThreadPoolExecutor(default_workers(), "nfjax-decode")

        def first() -> Iterator[_Decoded]:
            name, image, future = waiting.popleft()
            if (error := future.exception()) is None:
                yield name, image, future.result()
            elif not isinstance(error, Exception) or skip is None:
                raise _named(name, error) from error
            else:  # any file may be bad in any way
                skip(name, *skips.explained(error))

        def submit(number: int, image: Image) -> None:
            name = _images.name_of(image, number)
            _images.check(image, name)
            waiting.append((name, image, pool.submit(_images.pixels, image, self.preprocessing)))

        failure = None
        try:
            numbered = enumerate(images)
            while failure is None:
                try:
                    submit(*next(numbered))
                except StopIteration:
                    break
                except Exception as error:  # of the iterator, or no image: what came before it is not lost
                    failure = error
                if len(waiting) >= 2 * ahead:
                    yield from first()
            while waiting:
                yield from first()
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(cancel_futures=True)

    def _dispatch(self, pixels: np.ndarray, size: int) -> jax.Array:
        """Begins to compute; rows beyond those of `pixels` are of black images."""
        padded = np.zeros((size, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        images = jax.device_put(padded, sharding.by_batch(self._mesh))
        with compilation.not_kept(self._options):
            return self._program(self.params, self.batch_stats, images)

    def _fetched(self, batch: list[_Decoded], probabilities: jax.Array) -> Iterator[Prediction]:
        rows = np.asarray(probabilities)[: len(batch)]
        for (name, image, pixels), row in zip(batch, rows, strict=True):
            if not np.isfinite(row).all():
                raise ValueError(f"the network returns numbers that are not finite for {name}: its weights are damaged")
            yield Prediction(image, pixels, row, self.class_names)


def _named(name: str, error: BaseException) -> BaseException:
    """The error of an image that cannot be read, by its name."""
    if isinstance(error, BadImageError):
        detail = str(error).removeprefix(error.cause).removeprefix(": ")
        return BadImageError(error.cause, f"{name}{f' ({detail})' if detail else ''}")
    if isinstance(error, IsADirectoryError):
        return IsADirectoryError(
            f"{name} is a folder: give its files, such as sorted(pathlib.Path({name!r}).iterdir())"
        )
    if isinstance(error, OSError):
        return type(error)(f"{name} cannot be read: {error.strerror or error}")
    return error
