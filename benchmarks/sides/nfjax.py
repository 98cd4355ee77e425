"""nfjax: training steps and epochs as the trainer makes them, starting, building, saving, signal propagation.

All that the benchmarks know of the inside of nfjax.training is here.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from benchmarks import turns
from nfjax import _cpu, compilation, config, cost, data, resnet, spp
from nfjax.runs import checkpoint, workdirs
from nfjax.training import footprint, loader, networks, optimizers, preprocessing, schedules, setup, sharding, step
from nfjax.training.state import Batch, TrainState

EPOCHS = 200  # of the schedule; more than are measured


class Steps:
    """A training step of a config, with one batch that stays on the device, and neither augmentation nor a schedule."""

    def __init__(self) -> None:
        _cpu.keep_memory()  # as `nfjax train` does
        self.losses: list[jax.Array] = []

    def prepare(self, classes: int, warm: int = 1, parameters: str | None = None, **case: Any) -> dict[str, Any]:
        """Builds the network, with the parameters from a file where there is one, compiles, and warms up.

        Args:
            classes: of the labels.
            warm: steps that are taken at once.
            parameters: an .npz file.
            **case: as `case_config` takes it.

        Returns:
            Seconds of building, compiling and the first step, bytes of the program, and the machine.
        """
        start = time.perf_counter()
        settings, mesh = case_config(**case), sharding.make()
        model = networks.build(settings, classes, jax.random.key(0))
        functions, params, batch_stats = networks.as_functions(model)
        if parameters is not None:
            with np.load(parameters) as stored:
                params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(stored[dotted(path)]), params)
        optimizer = optimizers.build(settings, schedules.build(settings, [2**30]))
        state = TrainState.start(params, batch_stats, optimizer)
        self.state = sharding.place(state, sharding.of_state(state, mesh))
        batch = examples(settings.batch_size, settings.data.image_size, classes)
        self.batch, self.key = sharding.place(batch, sharding.by_batch(mesh)), jax.random.key(0)
        task = step.Task(functions, optimizer, preprocessing.make_preprocess(settings), mesh=mesh)
        built = time.perf_counter()
        self.step = step.train_step.lower(self.state, self.batch, self.key, task=task).compile(
            _cpu.compiler_options(_cpu.platform_of(mesh))
        )
        compiled = time.perf_counter()
        first = self.take(1)
        self.take(warm - 1)
        turns.forget_peak()
        seconds = {"build_s": built - start, "compile_s": compiled - built, "first_s": first}
        return seconds | {"program_bytes": footprint.of(self.step), **machine()}

    def take(self, n: int) -> float:
        """Seconds for n steps, the last one finished."""
        start = time.perf_counter()
        for _ in range(n):
            self.state, sums = self.step(self.state, self.batch, self.key)
            self.losses.append(sums["loss"] / sums["count"])
        jax.block_until_ready((self.state, self.losses))
        return time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        """What the steps since the start have left: the loss of each, the peak of memory in bytes."""
        # On an accelerator the allocator's peak would be that of compiling, where convolutions are tried out.
        peak = turns.peak() if jax.default_backend() == "cpu" else footprint.of(self.step)
        return {"losses": [float(loss) for loss in self.losses], "peak_bytes": peak}

    def write(self, classes: int, parameters: str, **case: Any) -> int:
        """Puts the parameters that all sides start from into a file; returns the multiply-accumulates per image."""
        settings = case_config(**case)
        model = networks.build(settings, classes, jax.random.key(0))
        leaves = jax.tree_util.tree_flatten_with_path(networks.as_functions(model)[1])[0]
        np.savez(parameters, **{dotted(path): leaf for path, leaf in leaves})
        return cost.count(model, (1, settings.data.image_size, settings.data.image_size, 3)).macs

    def limits(self, dtype: str) -> dict[str, float]:
        """FLOP/s of a large matrix product and of a large convolution: what this device can do at best."""
        n, b = (2048, 8) if jax.default_backend() == "cpu" else (8192, 256)
        keys, kind = jax.random.split(jax.random.key(0)), jnp.dtype(dtype)
        square = jax.random.normal(keys[0], (n, n), kind)
        images = jax.random.normal(keys[0], (b, 32, 32, 256), kind)
        kernel = jax.random.normal(keys[1], (3, 3, 256, 256), kind)
        convolve = jax.jit(
            lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
        return {
            "matmul": 2 * n**3 / _shortest(jax.jit(jnp.matmul), square, square),
            "conv": 2 * b * 32 * 32 * 9 * 256 * 256 / _shortest(convolve, images, kernel),
        }


def _shortest(function: Any, *arguments: jax.Array) -> float:
    """Seconds per call, the shortest of five times four calls."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(4)])
        seconds.append((time.perf_counter() - start) / 4)
    return min(seconds)


def dotted(path: Any) -> str:
    """ "conv1.kernel"."""
    return ".".join(str(key.key) for key in path)


def case_config(
    depth: int, residual: str, batch: int, norm: str | None = None, image: int = 32, width: int = 64,
    dtype: str = "float32",
) -> ConfigDict:  # fmt: skip
    """The config that trains a network at a shape, as PyTorch's side does: with neither augmentation nor decay."""
    settings = config.imagenet() if image >= 224 else config.cifar()
    settings.batch_size, settings.data.image_size = batch, image
    settings.model.update({"depth": depth, "residual": residual, "norm": norm, "width": width, "dtype": dtype})
    settings.data.mean, settings.data.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    settings.augment.update({"crop_padding": 0, "flip": False, "rand_operations": 0})
    settings.optim.label_smoothing = 0.0
    return settings


def examples(batch: int, image: int, classes: int) -> Batch:
    """The same random images and labels on both sides."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, image, image, 3), np.uint8)
    return Batch(images, rng.integers(0, classes, batch, np.int32), np.ones(batch, np.float32))


class Epochs:
    """The trainer's own loop over an epoch of CIFAR-10 in memory, the images on the device."""

    def prepare(self, images: str, operations: int, workers: int, **case: Any) -> dict[str, str]:
        """Builds everything up to the first step.

        Args:
            images: an .npz file with `images` and `labels`.
            operations: of RandAugment.
            workers: for PyTorch's DataLoader.
            **case: as `case_config` takes it.
        """
        del workers
        compilation.keep()
        settings = config.cifar()
        settings.model, settings.batch_size, settings.epochs = case_config(**case).model, case["batch"], EPOCHS
        settings.augment.rand_operations = operations
        settings.data.source, settings.data.dir = "benchmarks.sides.nfjax:arrays", images
        self.stack = contextlib.ExitStack()
        workdir = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.run = setup.build(settings, workdirs.open_for(settings, f"{workdir}/run"))
        for context in (setup.closing(self.run), self.run.interrupts, self.run.bar):
            self.stack.enter_context(context)
        self.work = self.run.work()
        return machine()

    def epoch(self) -> dict[str, float]:
        """Seconds and mean loss of an epoch, settled as often as the trainer does."""
        start, progress = time.perf_counter(), self.run.progress
        for work in self.work:
            if self.run.dispatch(work) and self.run.settle() and progress.epochs_ended() is not None:
                break
        return {"seconds": time.perf_counter() - start, "loss": progress.take("epoch")["loss"]}

    def end(self) -> None:
        self.stack.close()


def arrays(path: str, image_size: int) -> data.Dataset:
    """The `images` and `labels` of an .npz file, as a data set."""
    del image_size
    with np.load(path) as stored:
        split = data.Images(stored["images"], stored["labels"])
    return data.Dataset(split, split, tuple(map(str, range(10))))


def cifar_images(directory: str, examples: int) -> dict[str, np.ndarray]:
    """`images` and `labels` of some training images of CIFAR-10, chosen at random, as `Epochs.prepare` reads them."""
    split = loader.open_data(config.cifar(), directory).train
    chosen = np.random.default_rng(0).permutation(len(split.images))[:examples]
    return {"images": split.images[chosen], "labels": split.labels[chosen]}


class Start:
    """A network, its optimizer and a first step of eight images. kept: whether compiled programs are, or "off"."""

    def __init__(self, kept: str):
        if kept == "kept":
            compilation.keep()

    def first_step(self, depth: int, residual: str) -> dict[str, Any]:
        """Seconds of building, and of the first step with its compilation."""
        made = Steps().prepare(classes=10, depth=depth, residual=residual, batch=8)
        return {"build": made["build_s"], "first_step": made["compile_s"] + made["first_s"], **machine()}


class Building:
    """A network with the initializers of this library, or with Flax's own, eagerly as NNX builds or under one jit."""

    def __init__(self, way: str):
        self.way = way

    def build(self, depth: int, residual: str) -> list[float]:
        """Seconds of the first and the second network of this process."""
        init = "he_fan_out" if self.way == "nfjax" else jax.nn.initializers.he_normal()

        def build() -> nnx.Module:
            return resnet.PreActResNet(depth, residual, init=init, rngs=nnx.Rngs(0))

        made, seconds = nnx.jit(build) if self.way == "jitted" else build, []
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(nnx.state(made()))
            seconds.append(time.perf_counter() - start)
        return seconds


class Saves:
    """Stretches of training steps, with an asynchronous save at the beginning or without one."""

    def prepare(self, depth: int, batch: int, width: int) -> dict[str, Any]:
        """Builds, compiles, and saves once; returns the megabytes of the state."""
        self.training, self.number = Steps(), 1
        self.training.prepare(classes=10, depth=depth, residual="convshort", batch=batch, width=width, warm=2)
        self.folder = tempfile.TemporaryDirectory()
        self.checkpoints = checkpoint.Checkpoints(pathlib.Path(self.folder.name), keep=1)
        self.checkpoints.save(1, {"state": self.training.state.to_saved()})  # compiles the checksums
        self.checkpoints.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.training.state.to_saved()))
        every = config.base().checkpoint.every_steps
        return {"megabytes": size / 1e6, "every_steps": every, "device": machine()["device"]}

    def stretch(self, length: int, save: bool) -> dict[str, float]:
        """Seconds until `length` steps were done; with a save also until `save` returned and all was written."""
        start, seconds = time.perf_counter(), {}
        if save:
            self.number += 1
            self.checkpoints.save(self.number, {"state": self.training.state.to_saved()})
            seconds["call"] = time.perf_counter() - start
        for _ in range(length):
            self.training.take(1)
        seconds["with" if save else "without"] = time.perf_counter() - start
        if save:
            self.checkpoints.wait()
            seconds["written"] = time.perf_counter() - start
        return seconds

    def end(self) -> None:
        self.checkpoints.close()
        self.folder.cleanup()


class Curves:
    """A curve of figure 2: several seeds of a network, statistics forward and backward at every block."""

    def curve(self, depth: int, rule: str, norm: str | None, init: str, seeds: int, shape: list[int]) -> dict[str, Any]:
        """Seconds, the variances of the first to those of the last block, the largest memory of the process."""
        start = time.perf_counter()
        profile = spp.propagate_seeds(
            lambda seed: resnet.PreActResNet(depth, rule, norm, init, rngs=nnx.Rngs(seed)),
            spp.noise(tuple(shape)),
            seeds=seeds,
        )
        seconds = time.perf_counter() - start
        forward, backward = (float(v[0] / v[-1]) for v in (profile.forward_var, profile.backward_var))
        ratios = {"forward_ratio": forward, "backward_ratio": backward}
        return {"seconds": seconds, **ratios, "peak_bytes": turns.peak(), **machine()}


def machine() -> dict[str, str]:
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "version": f"jax {jax.__version__}"}


MEASURES = {
    "steps": Steps, "epochs": Epochs, "start": Start, "building": Building, "saves": Saves, "curves": Curves,
}  # fmt: skip
