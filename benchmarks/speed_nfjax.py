"""nfjax's side of speed.py, which starts it: training steps as the trainer makes them, without augmentation."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import speed_case
import turns
from ml_collections import ConfigDict

from nfjax import augment, cost
from nfjax import config as configs
from nfjax.training import assembly, footprint
from nfjax.training import optimizers as optim
from nfjax.training import sharding as meshes
from nfjax.training import step as steps


class Training:
    def __init__(self) -> None:
        self.losses: list[jax.Array] = []

    def prepare(self, **request: Any) -> dict[str, Any]:
        """Builds with the parameters from the file, compiles, and takes steps to warm up."""
        start = time.perf_counter()
        case = speed_case.Training(**request)
        config = case_config(case)
        model = assembly.build_model(config, case.classes, jax.random.key(0))
        macs = cost.count(model, (1, case.image, case.image, 3)).macs
        network, params, batch_stats = steps.as_functions(model)
        with np.load(case.parameters) as stored:
            params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(stored[named(path)]), params)
        optimizer = optim.sgd(lambda step: jnp.float32(0.01), momentum=0.9)
        mesh = meshes.make()
        state = steps.initial_state(params, batch_stats, optimizer)
        self.state = meshes.place(state, meshes.of_state(state, mesh))
        batch = examples(case.batch, case.image, case.classes) | {"mask": np.ones(case.batch, np.float32)}
        self.batch = meshes.place(batch, meshes.by_batch(mesh))
        step = steps.make_train_step(
            network,
            optimizer,
            lambda key, images: augment.normalize(images, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
            jax.random.key(0),
            label_smoothing=0.0,
            accumulate=assembly.count_parts(config),
            mesh=mesh,
        )

        def numbered(state: steps.State, batch: steps.Batch) -> tuple[steps.State, steps.Sums]:
            return step(state, batch | {"step": state["step"]})

        built = time.perf_counter()
        self.step = jax.jit(numbered, donate_argnums=0).lower(self.state, self.batch).compile()
        compiled = time.perf_counter()
        self.take(case.warm)
        turns.forget_peak()
        return {
            "macs": macs,
            "build_s": built - start,
            "compile_s": compiled - built,
            "program_bytes": footprint.of(self.step),
            **machine(),
        }

    def take(self, n: int) -> float:
        """Seconds for n steps, the last one finished."""
        start = time.perf_counter()
        for _ in range(n):
            self.state, sums = self.step(self.state, self.batch)
            self.losses.append(sums["loss"] / sums["count"])
        jax.block_until_ready((self.state, self.losses))
        return time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        """What the steps since the start have left: the loss of each, the peak of memory in bytes."""
        # On an accelerator the allocator's peak would be that of compiling, where convolutions are tried out.
        peak = turns.peak() if jax.default_backend() == "cpu" else footprint.of(self.step)
        return {"losses": [float(loss) for loss in self.losses], "peak_bytes": peak}


def write(**request: Any) -> None:
    """The parameters that all sides start from, to their file."""
    case = speed_case.Training(**request)
    model = assembly.build_model(case_config(case), case.classes, jax.random.key(0))
    _, params, _ = steps.as_functions(model)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    np.savez(case.parameters, **{named(path): leaf for path, leaf in leaves})


def named(path: Any) -> str:
    """ "conv1.kernel"."""
    return ".".join(str(key.key) for key in path)


def case_config(case: speed_case.Training) -> ConfigDict:
    """The config that trains this case."""
    config = configs.imagenet() if case.stem == "imagenet" else configs.cifar()
    config.batch_size, config.data.image_size = case.batch, case.image
    model = {"depth": case.depth, "residual": case.residual, "norm": case.norm}
    config.model.update(model | {"width": case.width, "dtype": case.dtype})
    return config


def examples(batch: int, image: int, classes: int) -> dict[str, np.ndarray]:
    """The same random images and labels on both sides."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, image, image, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, classes, batch, np.int32)}


def machine() -> dict[str, str]:
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "version": f"jax {jax.__version__}"}


def hardest(dtype: str) -> dict[str, Any]:
    """FLOP/s of a large matrix product and of a large convolution: what this device can do at best."""
    on_cpu = jax.default_backend() == "cpu"
    n, b = (2048, 32) if on_cpu else (8192, 256)
    keys, kind = jax.random.split(jax.random.key(0)), assembly.DTYPES[dtype]
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


if __name__ == "__main__":
    training = Training()
    functions = {"prepare": training.prepare, "take": training.take, "report": training.report}
    turns.serve(functions | {"write": write, "machine": machine, "hardest": hardest})
