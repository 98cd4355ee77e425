"""The trainer's own step, compiled for shapes alone, and what the compiled program sends between devices."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from nfjax import config as configs
from nfjax.data import Images
from nfjax.training import assembly
from nfjax.training import feed as feeds
from nfjax.training import loop as train
from nfjax.training import sharding as meshes
from nfjax.training import step as steps

DEVICES = (1, 2, 4, 8)
BATCHES = (64, 256)  # global
# The base config, classes and training images of each data set.
DATA = {"CIFAR-10": (configs.cifar, 10, 50_000), "ImageNet": (configs.imagenet, 1000, 1_281_167)}
# The same for the compiler of eight TPUs, which takes minutes for each.
TPU_TOPOLOGY = ("v5e:2x4", [2, 4, 1])


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


KEY = np.zeros(2, np.uint32)  # of augmentation


def shaped(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def describe(config: ConfigDict, num_classes: int, examples: int) -> Training:
    """What `nfjax.training.loop.run` builds before its first step, without the numbers."""
    mesh = meshes.make(config.train.state_shards)
    model = nnx.eval_shape(lambda: assembly.build_model(config, num_classes, jax.random.key(config.seed)))
    network, params, batch_stats = steps.as_functions(model)
    optimizer, _ = assembly.build_optimizer(config, [1])
    state = jax.eval_shape(lambda *parts: steps.initial_state(*parts, optimizer), params, batch_stats)
    shardings = meshes.of_state(state, mesh)
    state = jax.tree.map(lambda leaf, sharding: shaped(leaf.shape, leaf.dtype, sharding), state, shardings)
    step = train.make_train_step(config, network, optimizer, mesh)
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
    rest = {"key": KEY} | ({"votes": shaped((mesh.size,), jnp.int32, meshes.by_batch(mesh))} if votes else {})
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
