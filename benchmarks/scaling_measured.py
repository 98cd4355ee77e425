"""What is measured in processes of their own, which see as many simulated devices as they are told."""

from __future__ import annotations

import collections
import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import turns
from flax import nnx
from scaling_plan import ring_bytes
from scaling_programs import (
    DATA,
    KEY,
    Training,
    as_on,
    collectives,
    compile_step,
    crossings,
    describe,
    make_config,
    summarized,
)

from nfjax import cost
from nfjax.training import assembly, footprint
from nfjax.training import feed as feeds
from nfjax.training import sharding as meshes
from nfjax.training import step as steps


def measure_bytes(
    data: str, changes: dict[str, Any], feed: str = "host", votes: bool = False, backend: str | None = None
) -> dict[str, Any]:
    """What the step of a config sends."""
    with as_on(backend):
        training = describe(make_config(data, changes), *DATA[data][1:])
        start = time.perf_counter()
        compiled = compile_step(training, feed, votes)
        seconds = time.perf_counter() - start
        found = collectives(compiled.as_text(), training.mesh.size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(training.params))
    kinds = collections.Counter()
    for one in found:
        kinds[one.kind] += one.sent
    return {
        "parameters": parameters,
        "minimum": ring_bytes(parameters, training.mesh.size),
        "sent": sum(one.sent for one in found),
        "sent_by_kind": dict(kinds),
        "crossings": crossings(found, training.params),
        "by_purpose": summarized(found),
        "memory": footprint.of(compiled),
        "compile_seconds": round(seconds, 1),
    }


def count_network(data: str, changes: dict[str, Any]) -> dict[str, int]:
    """Parameters and multiply-accumulates per image."""
    config = make_config(data, changes)
    model = nnx.eval_shape(lambda: assembly.build_model(config, DATA[data][1], jax.random.key(0)))
    size = config.data.image_size
    counted = cost.count(model, (1, size, size, 3))
    return {"parameters": counted.parameters, "macs": counted.macs}


class Prepared:
    """A training step with a real state and one random batch, which is used again and again."""

    def __init__(self, data: str, changes: dict[str, Any]):
        config = make_config(data, changes)
        with mock.patch.object(assembly, "CPU_PARTS", (1,)):  # what is asked for, and not what a CPU likes better
            training = describe(config, *DATA[data][1:])
        mesh = training.mesh
        model = assembly.build_model(config, training.num_classes, jax.random.key(config.seed))
        _, params, batch_stats = steps.as_functions(model)
        optimizer, _ = assembly.build_optimizer(config, [1])
        state = steps.initial_state(params, batch_stats, optimizer)
        self.state = meshes.place(state, meshes.of_state(state, mesh))
        self.batch = random_batch(training)
        self.memory = 0
        self.call = feeds.FromHost(lambda orders: orders, mesh).each(training.step, True, self._note)
        self.number = 0
        self.run()

    def _note(self, compiled: jax.stages.Compiled) -> None:
        self.memory = footprint.of(compiled)

    def run(self) -> float:
        """Milliseconds of one step."""
        start = time.perf_counter()
        self.state, sums = self.call(self.state, self.batch, step=np.int32(self.number), key=KEY)
        jax.block_until_ready((self.state, sums))
        self.number += 1
        return 1e3 * (time.perf_counter() - start)


def random_batch(training: Training) -> feeds.Item:
    random, by_batch = np.random.default_rng(0), meshes.by_batch(training.mesh)
    rows = {
        "image": lambda x: random.integers(0, 256, x.shape, np.uint8),
        "label": lambda x: random.integers(0, training.num_classes, x.shape, np.int32),
        "mask": lambda x: np.ones(x.shape, np.float32),
    }
    return {name: meshes.from_local(by_batch, rows[name](x), x.shape[0]) for name, x in training.batch().items()}


PREPARED: dict[str, Prepared] = {}


def prepare(name: str, data: str, changes: dict[str, Any]) -> int:
    """Bytes that its step takes, says the compiler."""
    PREPARED[name] = Prepared(data, changes)
    return PREPARED[name].memory


def run_prepared(name: str) -> float:
    return PREPARED[name].run()


def measure_peak(data: str, changes: dict[str, Any]) -> dict[str, Any]:
    """How much this process grows while the state is made and three steps run, beside what the compiler says. The
    state's numbers are made up: a real initialization leaves memory behind that a step would use.
    """
    training = describe(make_config(data, changes), *DATA[data][1:])
    step = compile_step(training, "host")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, training.state)
    make = jax.jit(lambda: jax.tree.map(made_up, training.state), out_shardings=shardings).lower().compile()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    turns.forget_peak()
    before = turns.peak()  # the present size, which is the highest from here
    state, batch = jax.block_until_ready((make(), random_batch(training)))
    found = {"rss_before": before, "state": turns.peak() - before}
    for number in (1, 2, 3):
        state, _ = jax.block_until_ready(step(state, batch | {"step": np.int32(number - 1), "key": KEY}))
        found[f"growth_{number}"] = turns.peak() - before
    found["ru_maxrss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"memory": footprint.of(step)}


def made_up(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype != jnp.float32:
        return jnp.zeros(leaf.shape, leaf.dtype)
    return 0.01 * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task for task in (measure_bytes, count_network, prepare, run_prepared, measure_peak)
}


class Process(turns.Worker):
    """This file, run in a process that sees `devices` simulated CPU devices."""

    def __init__(self, devices: int, **environment: str):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        super().__init__([sys.executable, __file__], {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | environment)

    def ask(self, task: Callable[..., Any], **arguments: Any) -> Any:
        return super().ask(task.__name__, **arguments)


if __name__ == "__main__":
    turns.serve(TASKS)
