"""What a training step costs as devices grow: bytes between devices, overhead, memory; and a plan for ImageNet.

    python benchmarks/scaling.py --out=results

Bytes: the trainer's own step is compiled for shapes alone on 1, 2, 4 and 8 simulated CPU devices, and the collectives
of the program are added up; two batch sizes tell what grows with the batch. With --libtpu=FILE (libtpu.so from
`pip install --no-deps --target=DIR libtpu`, the version that `jax[tpu]` names) TPU's own compiler is asked as well, for
eight chips that need not be there. Overhead: one global batch on 1 to 8 simulated devices, which share this machine's
cores. Memory: what `nfjax.footprint` says, beside the measured growth of the process; rematerialization and
accumulation. The plan is arithmetic on what the flags give it.

Writes OUT/scaling.jsonl, one record per measurement, and OUT/scaling.md. --only=plan, or any of the parts, measures
those anew and keeps the other records.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from nfjax import assembly, cost, footprint, steps, train
from nfjax import config as configs
from nfjax import feed as feeds
from nfjax import mesh as meshes
from nfjax.data import Images

DEVICES = (1, 2, 4, 8)
BATCHES = (64, 256)  # global
RULES = {
    "ConvShort": {"model.residual": "convshort"},
    "IdShort": {"model.residual": "idshort"},
    "BatchNorm": {"model.residual": "identity", "model.norm": "batch"},
}
NETWORKS = {f"ResNet-{depth} {rule}": {"model.depth": depth} | RULES[rule] for depth in (18, 50) for rule in RULES}
# The base config, classes and training images of each data set.
DATA = {"CIFAR-10": (configs.cifar, 10, 50_000), "ImageNet": (configs.imagenet, 1000, 1_281_167)}
PARTS = ("bytes", "variants", "tpu", "overhead", "tradeoff", "peak", "plan")
Records = list[dict[str, Any]]

# What a step may do besides, for one network: changes of the config, and of how the step is compiled.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as configured, with RandAugment": ({}, {}),
    "no augmentation": ({"augment.rand_operations": 0, "augment.crop_padding": 0, "augment.flip": False}, {}),
    "many steps per dispatch, for each": ({}, {"feed": "device, many"}),
    "several processes, which vote": ({}, {"votes": True}),
    "mixup": ({"augment.mixup_alpha": 0.2}, {}),
    "cutmix": ({"augment.cutmix_alpha": 1.0}, {}),
    "mixup or cutmix": ({"augment.mixup_alpha": 0.2, "augment.cutmix_alpha": 1.0}, {}),
    "accumulate_steps=2, unrolled as on CPU": ({"train.accumulate_steps": 2}, {}),
    "accumulate_steps=2, in a loop": ({"train.accumulate_steps": 2}, {"backend": "not cpu"}),
    "state_shards=2": ({"train.state_shards": 2}, {}),
    "state_shards=8": ({"train.state_shards": 8}, {}),
    "remat": ({"model.remat": True}, {}),
    "bfloat16": ({"model.dtype": "bfloat16"}, {}),
}
# The same for the compiler of eight TPUs, which takes minutes for each.
TPU_TOPOLOGY = ("v5e:2x4", [2, 4, 1])
ON_TPU = {
    "as configured, with RandAugment": ("ResNet-18 ConvShort", {}),
    "BatchNorm": ("ResNet-18 BatchNorm", {}),
    "mixup": ("ResNet-18 ConvShort", {"augment.mixup_alpha": 0.2}),
    "accumulate_steps=2": ("ResNet-18 ConvShort", {"train.accumulate_steps": 2}),
    "state_shards=8": ("ResNet-18 ConvShort", {"train.state_shards": 8}),
    "bfloat16": ("ResNet-18 ConvShort", {"model.dtype": "bfloat16"}),
}

TRADED = {  # ResNet-50 ConvShort, 32x32, batch 64
    "as configured": {},
    "remat": {"model.remat": True},
    "accumulate_steps=2": {"train.accumulate_steps": 2},
    "accumulate_steps=4": {"train.accumulate_steps": 4},
    "remat, accumulate_steps=4": {"model.remat": True, "train.accumulate_steps": 4},
}
PEAKS = (("ResNet-18 ConvShort", "CIFAR-10", 128), ("ResNet-50 ConvShort", "CIFAR-10", 64),
         ("ResNet-18 BatchNorm", "ImageNet", 32))  # fmt: skip
IMAGES, EPOCHS = 1_281_167, 90  # of ImageNet
CHIPS = (1, 8, 64, 512)
MLPERF = "MLPerf Training v4.0, ResNet-50 with batch norm on 8 H200; not ours, and not measured with nfjax"


# ---------------------------------------------------------------- a training step, compiled for shapes alone


def make_config(data: str, changes: dict[str, Any]) -> ConfigDict:
    config = DATA[data][0]()
    config.update_from_flattened_dict(changes)
    return config


@dataclasses.dataclass(frozen=True)
class Training:
    """A config's training step, and the shapes of what it works on."""

    config: ConfigDict
    mesh: Mesh
    num_classes: int
    examples: int  # of the training split
    params: Any
    state: Any
    step: steps.Step

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as the host sends it."""
        batch, size = self.config.batch_size, self.config.data.image_size
        by_batch = meshes.by_batch(self.mesh)
        return {
            "image": shaped((batch, size, size, 3), jnp.uint8, by_batch),
            "label": shaped((batch,), jnp.int32, by_batch),
            "mask": shaped((batch,), jnp.float32, by_batch),
        }


def shaped(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def describe(config: ConfigDict, num_classes: int, examples: int) -> Training:
    """What `nfjax.train.run` builds before its first step, without the numbers."""
    mesh = meshes.make(config.train.state_shards)
    model = nnx.eval_shape(lambda: assembly.build_model(config, num_classes, jax.random.key(config.seed)))
    network, params, batch_stats = steps.as_functions(model)
    optimizer, _ = assembly.build_optimizer(config, [1])
    state = jax.eval_shape(lambda *parts: steps.initial_state(*parts, optimizer), params, batch_stats)
    shardings = meshes.of_state(state, mesh)
    state = jax.tree.map(lambda leaf, sharding: shaped(leaf.shape, leaf.dtype, sharding), state, shardings)
    step = train.make_train_step(config, network, optimizer, jax.random.key(config.seed), shardings)
    return Training(config, mesh, num_classes, examples, params, state, step)


class _CompiledInsteadError(Exception):
    """Leaves a feed with the program that it was about to run."""


def compile_step(training: Training, feed: str, votes: bool = False) -> jax.stages.Compiled:
    """The program that the trainer runs. feed: "host", "device", or "device, many" for a loop over steps. votes:
    whether the batch carries the votes of several processes.
    """

    def leave(compiled: jax.stages.Compiled) -> None:
        raise _CompiledInsteadError(compiled)

    mesh, config = training.mesh, training.config
    rest = {"votes": shaped((mesh.size,), jnp.int32, meshes.by_batch(mesh))} if votes else {}
    try:
        if feed == "host":
            call = feeds.FromHost(lambda orders: orders, mesh).each(training.step, True, leave)
            call(training.state, training.batch(), step=np.int32(0), **rest)
        batch, size = config.batch_size, config.data.image_size
        on_device = feeds.OnDevice(Images(np.zeros((1, size, size, 3), np.uint8), np.zeros(1, np.int32)), mesh)
        on_device.split = {
            "image": shaped((training.examples, size, size, 3), jnp.uint8, meshes.replicated(mesh)),
            "label": shaped((training.examples,), jnp.int32, meshes.replicated(mesh)),
        }
        if feed == "device":
            item = {"indices": np.zeros(batch, np.int64), "mask": np.ones(batch, np.float32)}
            on_device.each(training.step, True, leave)(training.state, item, step=np.int32(0), **rest)
        on_device.many(training.step, 4, leave)(training.state, np.zeros((4, batch), np.int64), 0, **rest)
    except _CompiledInsteadError as left:
        return left.args[0]


@contextlib.contextmanager
def as_on(name: str | None) -> Iterator[None]:
    """nfjax as it is on another backend: "tpu" for eight TPUs that only the compiler knows, "not cpu" for the CPU
    without what is done for its sake, None for what is there.
    """
    with contextlib.ExitStack() as stack:
        if name is not None:
            stack.enter_context(mock.patch.object(jax, "default_backend", return_value=name))
        if name == "tpu":
            from jax.experimental import topologies

            topology, hosts = TPU_TOPOLOGY
            devices = topologies.get_topology_desc(topology, "tpu", chips_per_host_bounds=hosts).devices
            stack.enter_context(mock.patch.object(jax, "device_count", return_value=len(devices)))
            make_mesh = functools.partial(jax.make_mesh, devices=devices)
            stack.enter_context(mock.patch.object(jax, "make_mesh", make_mesh))
        yield


# ---------------------------------------------------------------- what a program sends


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ((?:ragged-)?(?:{'|'.join(KINDS)}))(-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=)([^}]*)")
TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program. arrays: (dtype, shape) of each result; group: devices that exchange; times: how
    often it runs in a step; purpose: the operations that asked for it.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    times: int
    purpose: str

    @property
    def size(self) -> int:
        """Bytes of all results on one device."""
        return sum(itemsize(dtype) * math.prod(shape) for dtype, shape in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by a ring."""
        others = self.group - 1
        factor = {
            "all-reduce": 2 * others / self.group,
            "all-gather": others / self.group,
            "reduce-scatter": others,  # its result is a part
            "all-to-all": others / self.group,
        }
        return self.times * self.size * factor.get(self.kind, 1)


def itemsize(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else int(bits[0]) / 8  # pred takes a byte


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of an optimized HLO module, those in loops as often as the loop runs. A loop of unknown length
    counts once, which for many steps in one dispatch is one step; of a conditional, the branch that sends most counts.
    """
    computations, entry = split_into_computations(text)

    @functools.cache
    def inside(name: str) -> tuple[tuple[Collective, str | None], ...]:
        found = []
        for line in computations.get(name, ()):
            if (match := INSTRUCTION.match(line)) is not None:
                found.append((collective(match, line, devices), chain(line)))
            elif branches := BRANCHES.search(line):
                choices = [inside(name) for name in re.findall(r"%([\w.-]+)", branches[1])]
                found += max(choices, key=lambda branch: sum(one.sent for one, _ in branch))
            else:
                trips = int(count[1]) if " while(" in line and (count := TRIPS.search(line)) else 1
                for callee in CALLED.findall(line):
                    found += [(dataclasses.replace(one, times=one.times * trips), at) for one, at in inside(callee)]
        return tuple(found)

    # TPU spreads a collective over a chain of fusions, each of which names it.
    chained = {at: one for one, at in inside(entry) if at is not None}
    return [one for one, at in inside(entry) if at is None] + list(chained.values())


def chain(line: str) -> str | None:
    """What the links of a chain have in common; None for a collective that is whole."""
    if "chain_id=" not in line:
        return None
    return re.search(r"channel_id=(\d+)", line)[1]


def split_into_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if (match := COMPUTATION.match(line)) is not None:
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return computations, entry


def collective(match: re.Match[str], line: str, devices: int) -> Collective:
    result, kind, started = match[1], match[2].removeprefix("ragged-"), match[3]
    arrays = [(dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in ARRAY.findall(result)]
    if started and kind == "collective-permute":
        arrays = arrays[1:2]  # (what is sent, what arrives, two flags)
    elif started and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # (what is sent, what arrives)
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, tuple(arrays), group_size(line, devices), 1, purpose(name[1] if name else "none given"))


def group_size(line: str, devices: int) -> int:
    """How many devices exchange in one group: {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'b'}."""
    if (listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line)) is not None:
        return len(listed[1].split(","))
    if (counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)) is not None:
        return int(counted[1])
    if (named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line)) is not None:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else axes[name] for name, part in used)
    return devices


def purpose(op_name: str) -> str:
    """The operation as JAX names it, of several that were combined each once; without the program's name."""
    name = re.sub(r"^jit\([^()]*\)/", "", op_name)
    combined = re.fullmatch(r"\((.*:.*)\)", name)
    return ", ".join(dict.fromkeys(combined[1].split(":"))) if combined else name


def summarized(found: list[Collective]) -> list[dict[str, Any]]:
    """One entry for each kind and purpose, those that send most first."""
    groups: dict[tuple[str, str, int], list[Collective]] = collections.defaultdict(list)
    for one in found:
        groups[one.kind, one.purpose, one.group].append(one)
    entries = [
        {
            "kind": kind,
            "purpose": name,
            "group": group,
            "collectives": len(of),
            "arrays": sum(len(one.arrays) for one in of),
            "times": max(one.times for one in of),
            "sent": sum(one.sent for one in of),
        }
        for (kind, name, group), of in groups.items()
    ]
    return sorted(entries, key=lambda entry: -entry["sent"])


def crossings(found: list[Collective], params: Any) -> float:
    """How often the gradients of the kernels cross: numbers of all-reduced arrays of two axes or more, over those in
    the kernels.
    """
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    reduced = 0
    for one in found:
        parts = {"all-reduce": 1, "reduce-scatter": one.group}.get(one.kind, 0)
        reduced += one.times * parts * sum(math.prod(shape) for _, shape in one.arrays if len(shape) > 1)
    return reduced / kernels


# ---------------------------------------------------------------- what the processes are asked


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
        self.state, sums = self.call(self.state, self.batch, step=np.int32(self.number))
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
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest size so far is the present one again
    before = resident("VmRSS")
    state, batch = jax.block_until_ready((make(), random_batch(training)))
    found = {"rss_before": before, "state": resident("VmHWM") - before}
    for number in (1, 2, 3):
        state, _ = jax.block_until_ready(step(state, batch | {"step": np.int32(number - 1)}))
        found[f"growth_{number}"] = resident("VmHWM") - before
    found["ru_maxrss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"memory": footprint.of(step)}


def made_up(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype != jnp.float32:
        return jnp.zeros(leaf.shape, leaf.dtype)
    return 0.01 * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)


def resident(field: str) -> int:
    """Bytes in memory: VmRSS now, VmHWM at most."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task for task in (measure_bytes, count_network, prepare, run_prepared, measure_peak)
}


def serve() -> None:
    """Answers one request per line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    for line in sys.stdin:
        task, arguments = json.loads(line)
        answers.write(json.dumps(TASKS[task](**arguments)) + "\n")
        answers.flush()


class Process:
    """This program, in a process that sees `devices` simulated CPU devices."""

    def __init__(self, devices: int, **environment: str):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | environment
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, task: Callable[..., Any], **arguments: Any) -> Any:
        self._process.stdin.write(json.dumps([task.__name__, arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that was asked for {task.__name__}({arguments}) has ended; see above")
        return json.loads(answer)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()


# ---------------------------------------------------------------- the parts


def bytes_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    """Every network with each data set on each number of devices."""
    for devices in DEVICES:
        batches = BATCHES if devices == DEVICES[-1] else BATCHES[-1:]
        with Process(devices) as process:
            for data, (network, changes) in itertools.product(DATA, NETWORKS.items()):
                where = {"network": network, "data": data}
                if devices == DEVICES[-1]:
                    yield {"kind": "network", **where, **process.ask(count_network, data=data, changes=changes)}
                feeds_of = ("host", "device") if data == "CIFAR-10" else ("host",)
                for feed, batch in itertools.product(feeds_of, batches):
                    found = process.ask(measure_bytes, data=data, changes=changes | {"batch_size": batch}, feed=feed)
                    yield {"kind": "bytes", **where, "feed": feed, "devices": devices, "batch": batch, **found}


def variant_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    """One network with what a step may do besides."""
    network, data, devices = "ResNet-50 ConvShort", "CIFAR-10", DEVICES[-1]
    with Process(devices) as process:
        for (variant, (more, how)), batch in itertools.product(VARIANTS.items(), BATCHES):
            changes = NETWORKS[network] | more | {"batch_size": batch}
            where = {"network": network, "data": data, "devices": devices, "variant": variant, "batch": batch}
            yield {"kind": "variant", **where, **process.ask(measure_bytes, data=data, changes=changes, **how)}


def tpu_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    """The same question to TPU's compiler."""
    library = pathlib.Path(arguments.libtpu).resolve()
    installed = [path.name for path in library.parent.parent.glob("libtpu-*.dist-info")]
    version = installed[0].split("-")[1].removesuffix(".dist") if installed else "of unknown version"
    for (variant, (network, more)), batch in itertools.product(ON_TPU.items(), BATCHES):
        changes = NETWORKS[network] | more | {"batch_size": batch}
        with Process(1, TPU_LIBRARY_PATH=str(library), TPU_SKIP_MDS_QUERY="1") as process:
            found = process.ask(measure_bytes, data="CIFAR-10", changes=changes, backend="tpu")
        where = {"network": network, "data": "CIFAR-10", "devices": 8, "variant": variant, "batch": batch}
        yield {"kind": "tpu", **where, "topology": TPU_TOPOLOGY[0], "libtpu": version, **found}


def overhead_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    """One global batch of a narrow network on 1 to 8 simulated devices, in turn."""
    network, data, batch = "ResNet-18 ConvShort", "CIFAR-10", 64
    changes = NETWORKS[network] | {"model.width": 16, "batch_size": batch}
    times: dict[int, list[float]] = {devices: [] for devices in DEVICES}
    with contextlib.ExitStack() as stack:
        processes = {devices: stack.enter_context(Process(devices)) for devices in DEVICES}
        for process in processes.values():
            process.ask(prepare, name="step", data=data, changes=changes)
        for _ in range(arguments.rounds):
            for devices, process in processes.items():
                times[devices].append(process.ask(run_prepared, name="step"))
    where = {"network": f"{network}, width 16", "data": data, "batch": batch, "load": load()}
    for devices, values in times.items():
        yield {"kind": "overhead", **where, "devices": devices, "ms": statistics.median(values), "all_ms": values}


def tradeoff_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    """Memory and time with rematerialization and accumulation, in turn, on one device."""
    network, data, batch = "ResNet-50 ConvShort", "CIFAR-10", 64
    times: dict[str, list[float]] = {name: [] for name in TRADED}
    with Process(1) as process:
        memory = {}
        for name, more in TRADED.items():
            changes = NETWORKS[network] | more | {"batch_size": batch}
            memory[name] = process.ask(prepare, name=name, data=data, changes=changes)
        for _ in range(arguments.rounds // 2):
            for name in TRADED:
                times[name].append(process.ask(run_prepared, name=name))
    where = {"network": network, "data": data, "batch": batch, "load": load()}
    for name, values in times.items():
        what = {"variant": name, "memory": memory[name], "ms": statistics.median(values), "all_ms": values}
        yield {"kind": "tradeoff", **where, **what}


def load() -> float:
    """Processes that wanted to run, on average of the last five minutes, these included."""
    return round(os.getloadavg()[1], 1)


def peak_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    for network, data, batch in PEAKS:
        with Process(1) as process:
            found = process.ask(measure_peak, data=data, changes=NETWORKS[network] | {"batch_size": batch})
        yield {"kind": "peak", "network": network, "data": data, "batch": batch, **found}


# ---------------------------------------------------------------- the plan


def ring_bytes(parameters: int, devices: int) -> float:
    """What each device has to send at least for all to have the sum of their float32 gradients."""
    return 4 * parameters * 2 * (devices - 1) / devices


def plan(
    chips: int,
    images_per_second_per_chip: float,
    parameters: int,
    link_bytes_per_second: float,
    host_images_per_second_per_core: float,
    batch_per_chip: int,
) -> dict[str, float]:
    """ImageNet on `chips`: seconds of computing and of a ring all-reduce in a step; then for sending "behind" computing
    and for sending "beside" it, seconds per step, images/s, hours of 90 epochs, and host cores in all.
    """
    computing = batch_per_chip / images_per_second_per_chip
    sending = ring_bytes(parameters, chips) / link_bytes_per_second
    found = {"computing": computing, "sending": sending}
    for way, step in (("behind", computing + sending), ("beside", max(computing, sending))):
        rate = chips * batch_per_chip / step
        found |= {
            f"step_{way}": step,
            f"images_per_second_{way}": rate,
            f"hours_{way}": EPOCHS * IMAGES / rate / 3600,
            f"host_cores_{way}": rate / host_images_per_second_per_core,
        }
    return found


def plan_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    parameters = arguments.parameters
    if parameters is None:
        counted = {(r["network"], r["data"]): r["parameters"] for r in known if r["kind"] == "network"}
        if ("ResNet-50 ConvShort", "ImageNet") not in counted:
            raise SystemExit("--parameters is missing, and no record tells them: measure the part bytes first")
        parameters = counted["ResNet-50 ConvShort", "ImageNet"]
    for chips, (source, rate) in itertools.product(CHIPS, host_rates(arguments).items()):
        link = arguments.link_within if chips <= arguments.chips_within else arguments.link_between
        inputs = {
            "images_per_second_per_chip": arguments.images_per_second_per_chip,
            "parameters": parameters,
            "link_bytes_per_second": link,
            "host_images_per_second_per_core": rate,
            "batch_per_chip": arguments.batch_per_chip,
        }
        found = plan(chips, **inputs)
        yield {"kind": "plan", "chips": chips, "input": source, **inputs, **found, "source": arguments.source}


def host_rates(arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second and core, by where they come from."""
    if arguments.host_images_per_second_per_core is not None:
        return {"as given": arguments.host_images_per_second_per_core}
    measured = json.loads(pathlib.Path(arguments.input_pipeline).read_text().splitlines()[-1])
    names = {"original files": "nfjax, 2 workers", "packed records": "nfjax, packed records of 256 pixels"}
    return {name: measured["images_per_second"][key] / measured["cores"] for name, key in names.items()}


# ---------------------------------------------------------------- report


def report(records: Records) -> str:
    of = collections.defaultdict(list)
    for record in records:
        of[record["kind"]].append(record)
    setting = of["setting"][0]
    parts = [
        f"Measured on {setting['machine']} with jax {setting['jax']}, flax {setting['flax']} and Python "
        f"{setting['python']}, without an accelerator: devices are simulated on the CPU."
    ]
    sections = {
        "bytes": bytes_section,
        "variant": variant_section,
        "tpu": tpu_section,
        "overhead": overhead_section,
        "tradeoff": tradeoff_section,
        "peak": peak_section,
        "plan": plan_section,
    }
    parts += [section(of[kind], of) for kind, section in sections.items() if of[kind]]
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, str]], words: int = 1) -> str:
    """Markdown of rows that map titles to cells; the first `words` columns are text, the others numbers."""
    titles = list(rows[0])
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, rule, *(row.values() for row in rows)])


def mega(value: float) -> str:
    return f"{value / 1e6:,.2f}"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}"


def least_and_most(values: list[float], scale: float, digits: int) -> str:
    return f"{min(values) * scale:.{digits}f} to {max(values) * scale:.{digits}f}"


CROSS = "kernels' gradients cross, times"
LESS = f"batch {BATCHES[-1]} less batch {BATCHES[0]}, bytes"


def bytes_section(records: Records, of: dict[str, Records]) -> str:
    rows = []
    at = {(r["network"], r["data"], r["feed"], r["devices"], r["batch"]): r for r in records}
    for where in dict.fromkeys((r["network"], r["data"], r["feed"]) for r in records):
        most, small = (at[(*where, DEVICES[-1], batch)] for batch in reversed(BATCHES))
        sent = {f"MB, {devices} devices": at[(*where, devices, BATCHES[-1])]["sent"] for devices in DEVICES[1:]}
        rows.append(
            {
                **dict(zip(("network", "shapes", "images on"), where, strict=True)),
                "parameters (M)": mega(most["parameters"]),
                **{title: mega(value) for title, value in sent.items()},
                f"minimum, {DEVICES[-1]} devices": mega(most["minimum"]),
                "above it, bytes": f"{most['sent'] - most['minimum']:,.0f}",
                CROSS: f"{most['crossings']:.3f}",
                LESS: f"{most['sent'] - small['sent']:,.0f}",
            }
        )
    alone = max(record["sent"] for record in records if record["devices"] == 1)
    asking = [
        f"{network}: {askers(at[network, 'CIFAR-10', 'host', DEVICES[-1], BATCHES[-1]])}"
        for network in ("ResNet-50 ConvShort", "ResNet-50 BatchNorm")
    ]
    return (
        f"**Bytes that each device sends in a training step.**\n\n{table(rows, 3)}\n\n"
        "Megabytes (10^6) by the collectives of the compiled program: float32, full width, the configs' own "
        f"augmentation with RandAugment, global batch {BATCHES[-1]}. On a ring, an all-reduce of S bytes over n "
        "devices sends 2 (n - 1) / n S, a gather half of that. The minimum is the all-reduce of 4 bytes for each "
        f"parameter. On one device: {alone:,.0f} bytes. BatchNorm has identity shortcuts. Who asks, at {DEVICES[-1]} "
        "devices. "
        f"{'. '.join(asking)}."
    )


def askers(record: dict[str, Any]) -> str:
    """The operations behind what is sent, most bytes first."""
    shown = [
        f"`{entry['purpose']}` ({entry['collectives']} {entry['kind']} of {entry['arrays']} arrays, "
        f"{entry['sent']:,.0f} bytes)"
        for entry in record["by_purpose"][:4]
    ]
    return "; ".join(shown)


def variant_rows(records: Records) -> list[dict[str, str]]:
    rows = []
    at = {(record["variant"], record["batch"]): record for record in records}
    kinds = [kind for kind in KINDS if any(kind in record["sent_by_kind"] for record in records)]
    for variant in dict.fromkeys(record["variant"] for record in records):
        small, large = (at[variant, batch] for batch in BATCHES)
        rows.append(
            {
                "step": variant,
                "MB": mega(large["sent"]),
                "of the minimum": f"{large['sent'] / large['minimum']:.2f}",
                **{kind: mega(large["sent_by_kind"].get(kind, 0)) for kind in kinds},
                CROSS: f"{large['crossings']:.2f}",
                LESS: f"{large['sent'] - small['sent']:,.0f}",
                "what grows": growing(small, large),
            }
        )
    return rows


def growing(small: dict[str, Any], large: dict[str, Any]) -> str:
    """Which operations send more in the larger batch, and by how many bytes."""
    totals = []
    for record in (small, large):
        total = collections.Counter()
        for entry in record["by_purpose"]:
            total[entry["kind"], entry["purpose"]] += entry["sent"]
        totals.append(total)
    more = [(*key, totals[1][key] - totals[0][key]) for key in totals[0] | totals[1]]
    more = sorted((item for item in more if item[2]), key=lambda item: -abs(item[2]))
    shown = [f"{kind} of `{name}` {value:+,.0f}" for kind, name, value in more[:3]]
    return "; ".join(shown) + (f"; {len(more) - 3} others" if len(more) > 3 else "")


def variant_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    return (
        f"**The same, for what else a step may do.**\n\n{table(variant_rows(records))}\n\n"
        f"{first['network']}, {first['data']} shapes, {first['devices']} devices, images from the host unless said "
        f"otherwise; megabytes that each device sends, global batch {BATCHES[-1]}. An array counts as a kernel's "
        "gradient if it is all-reduced and has two axes or more. The CPU's compiler makes no reduce-scatter, and "
        "reduces in float32 what it is given in bfloat16. With state_shards=2 the gradients are summed over two "
        "devices and then by halves over four: 1.5 times the numbers, the bytes of once. In a loop is how accelerators "
        "accumulate, compiled here for the CPU."
    )


def tpu_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    memory = {record["variant"]: record["memory"] for record in records if record["batch"] == BATCHES[-1]}
    rows = [row | {"GiB per chip": gibibytes(memory[row["step"]])} for row in variant_rows(records)]
    return (
        f"**The same, from TPU's compiler.**\n\n{table(rows)}\n\n"
        f"libtpu {first['libtpu']}, compiled for {first['devices']} chips ({first['topology']}) that are not there; "
        f"nothing was run. {first['network']}, or BatchNorm, {first['data']} shapes, images from the host; megabytes "
        f"that each chip sends, global batch {BATCHES[-1]}. GiB: what a step takes, by the compiler."
    )


def overhead_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    rows = [
        {
            "simulated devices": str(record["devices"]),
            "ms per step": f"{record['ms']:.0f}",
            "of one device": f"{record['ms'] / first['ms']:.2f}",
            "least to most": least_and_most(record["all_ms"], 1, 0),
        }
        for record in records
    ]
    return (
        f"**One batch on more devices, which share {of['setting'][0]['cores']} cores.**\n\n{table(rows)}\n\n"
        f"{first['network']}, {first['data']} shapes, global batch {first['batch']}; median of {len(first['all_ms'])} "
        f"steps, in turn, beside other work (load average {first['load']}). The work is the same: this is what "
        "dividing it costs, and says nothing about speed."
    )


def tradeoff_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    rows = [
        {
            "step": record["variant"],
            "GiB": gibibytes(record["memory"]),
            "of the first": f"{record['memory'] / first['memory']:.2f}",
            "s per step": f"{record['ms'] / 1e3:.2f}",
            "time of the first": f"{record['ms'] / first['ms']:.2f}",
            "least to most": least_and_most(record["all_ms"], 1e-3, 2),
        }
        for record in records
    ]
    return (
        f"**Memory against time.**\n\n{table(rows)}\n\n"
        f"{first['network']}, {first['data']} shapes, batch {first['batch']}, one device. GiB by `nfjax.footprint`; "
        f"seconds: median of {len(first['all_ms'])} steps, in turn, beside other work (load average {first['load']}). "
        "On CPU the parts of a batch are unrolled."
    )


def peak_section(records: Records, of: dict[str, Records]) -> str:
    rows = [
        {
            "network": record["network"],
            "shapes": record["data"],
            "batch": str(record["batch"]),
            "GiB, told": gibibytes(record["memory"]),
            "GiB, one step": gibibytes(record["growth_1"]),
            "GiB, three steps": gibibytes(record["growth_3"]),
            "taken / told": f"{record['growth_3'] / record['memory']:.2f}",
        }
        for record in records
    ]
    return (
        f"**Memory: told before the first step, and taken.**\n\n{table(rows, 2)}\n\n"
        "Taken: growth of the process's highest resident size, from before the state is made; the step is compiled "
        "already, and the high-water mark set back (/proc/self/clear_refs). It includes what the allocator keeps and "
        "the scratch memory of the convolutions, of which the compiler does not know."
    )


def plan_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    at = {(record["chips"], record["input"]): record for record in records}
    inputs = {record["input"]: record["host_images_per_second_per_core"] for record in records}
    rows = []
    for chips in dict.fromkeys(record["chips"] for record in records):
        record = at[chips, first["input"]]
        rows.append(
            {
                "chips": str(chips),
                "batch": f"{chips * record['batch_per_chip']:,}",
                "link, GB/s": f"{record['link_bytes_per_second'] / 1e9:g}" if chips > 1 else "",
                "computing, ms": f"{1e3 * record['computing']:.1f}",
                "sending, ms": f"{1e3 * record['sending']:.2f}",
                "images/s": between(record, "images_per_second", ",.0f"),
                "hours": between(record, "hours", ".2f"),
                **{f"host cores, {name}": f"{math.ceil(at[chips, name]['host_cores_beside']):,}" for name in inputs},
            }
        )
    rates = " and ".join(f"{rate:,.0f} ({name})" for name, rate in inputs.items())
    return (
        f"**ImageNet, {EPOCHS} epochs: calculated, not measured.**\n\n{table(rows, 0)}\n\n"
        f"From {first['images_per_second_per_chip']:,.0f} images/s per chip: {first['source']}."
        f"{heavier(of['network'])} A ring all-reduce of {first['parameters'] / 1e6:.1f} M gradients of 4 bytes over "
        "the links assumed; where two values are given, sending comes after computing, or goes on beside it and costs "
        "nothing. Latency, evaluation and checkpoints are left out. Host cores: all together, for the greater rate, "
        f"without a reserve, at {rates} images/s per core."
    )


def between(record: dict[str, Any], name: str, form: str) -> str:
    """The value with sending after computing, and beside it."""
    behind, beside = (format(record[f"{name}_{way}"], form) for way in ("behind", "beside"))
    return behind if behind == beside else f"{behind} to {beside}"


def heavier(networks: Records) -> str:
    """What the rate of the BatchNorm network does not tell about ConvShort."""
    macs = {record["network"]: record["macs"] for record in networks if record["data"] == "ImageNet"}
    ours, theirs = (macs.get(f"ResNet-50 {rule}") for rule in ("ConvShort", "BatchNorm"))
    if ours is None or theirs is None:
        return ""
    return (
        f" ConvShort has {ours / theirs:.2f} times the multiply-accumulates of our BatchNorm network "
        f"({ours / 1e9:.2f} against {theirs / 1e9:.2f} G per image), which this rate leaves out."
    )


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to measure, of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=11, help="steps that are timed")
    parser.add_argument("--libtpu", help="libtpu.so, for the part tpu, which is left out without it")
    parser.add_argument("--images-per-second-per-chip", type=float, default=7940)
    parser.add_argument("--source", default=MLPERF, help="where that rate comes from")
    parser.add_argument("--parameters", type=int, help="by default those of ResNet-50 ConvShort")
    parser.add_argument("--batch-per-chip", type=int, default=256)
    parser.add_argument("--link-within", type=float, default=450e9, help="bytes/s of a chip to others in its machine")
    parser.add_argument("--link-between", type=float, default=50e9, help="bytes/s of a chip to other machines")
    parser.add_argument("--chips-within", type=int, default=8, help="chips in a machine")
    parser.add_argument("--host-images-per-second-per-core", type=float, help="by default those of --input-pipeline")
    parser.add_argument("--input-pipeline", default="results/input_pipeline.jsonl", help="by input_pipeline.py")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    parts = arguments.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise SystemExit(f"--only={arguments.only}: unknown {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part == "tpu" and arguments.libtpu is None:
            continue
        records = renewed(out / "scaling.jsonl", part, arguments)
        (out / "scaling.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (out / "scaling.md").write_text(report(records))
    print((out / "scaling.md").read_text())


def renewed(path: pathlib.Path, part: str, arguments: argparse.Namespace) -> Records:
    """The records of the file, those of one part measured anew."""
    kinds, make = MAKERS[part]
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [record for record in old if record["kind"] not in (*kinds, "setting")]
    fresh = []
    for record in make(arguments, kept):
        fresh.append(record)
        print({name: value for name, value in record.items() if name != "by_purpose"}, flush=True)
    measured = [record for record in old if record["kind"] == "setting"] if part == "plan" else []
    return [*(measured or [setting()]), *kept, *fresh]


def setting() -> dict[str, Any]:
    cpu = pathlib.Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.*)", cpu.read_text()) if cpu.exists() else None
    return {
        "kind": "setting",
        "machine": f"{os.cpu_count()} CPU cores ({name[1] if name else platform.machine()})",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("jax", "flax")},
    }


MAKERS: dict[str, tuple[tuple[str, ...], Callable[[argparse.Namespace, Records], Iterator[dict[str, Any]]]]] = {
    "bytes": (("network", "bytes"), bytes_records),
    "variants": (("variant",), variant_records),
    "tpu": (("tpu",), tpu_records),
    "overhead": (("overhead",), overhead_records),
    "tradeoff": (("tradeoff",), tradeoff_records),
    "peak": (("peak",), peak_records),
    "plan": (("plan",), plan_records),
}


if __name__ == "__main__":
    main()
