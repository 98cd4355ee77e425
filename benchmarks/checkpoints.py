"""What saving costs the training step.

    python benchmarks/checkpoints.py --depths=18,50 --out=results

For each network, its real state (parameters and momentum, float32, width 64) and its real training step at 32x32: pairs
of stretches of steps, in turn with one asynchronous save at the beginning and without any. The difference of their
medians is what a save costs the steps, wherever it is spent: checksums, copies to the host, cores and disk taken while
it is written. As a share of `checkpoint.every_steps` steps, which is the default interval, and of a CIFAR-10 epoch,
after which a run saves as well.

Writes checkpoints.jsonl and checkpoints.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from nfjax import config as configs
from nfjax.runs import checkpoint
from nfjax.training import assembly
from nfjax.training import loop as train
from nfjax.training import sharding as meshes
from nfjax.training import step as steps

EPOCH = 391  # steps of 128 images in an epoch of CIFAR-10


class Training:
    """A state, and steps that go on with it."""

    def __init__(self, depth: int, batch: int):
        config = configs.cifar()
        config.model.depth, config.batch_size = depth, batch
        self.every = config.checkpoint.every_steps
        mesh = meshes.make()
        network, params, batch_stats = steps.as_functions(assembly.build_model(config, 10, jax.random.key(0)))
        optimizer, _ = assembly.build_optimizer(config, [1])
        self.state = steps.initial_state(params, batch_stats, optimizer)
        self.state = meshes.place(self.state, meshes.of_state(self.state, mesh))
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        step = train.make_train_step(config, network, optimizer, mesh)
        self._step, self._number = jax.jit(step, donate_argnums=0), 0
        rng = np.random.default_rng(0)
        self._batch = {
            "image": rng.integers(0, 256, (batch, 32, 32, 3), np.uint8),
            "label": rng.integers(0, 10, batch, np.int32),
            "mask": np.ones(batch, np.float32),
            "key": np.asarray(jax.random.key_data(jax.random.key(0))),
        }

    def run(self, count: int) -> None:
        for _ in range(count):
            self.state, sums = self._step(self.state, self._batch | {"step": np.int32(self._number)})
            jax.block_until_ready(sums)
            self._number += 1


def measure(depth: int, batch: int, length: int, rounds: int, folder: str) -> dict:
    training = Training(depth, batch)
    checkpoints = checkpoint.Checkpoints(pathlib.Path(folder), keep=1)
    training.run(2)
    checkpoints.save(1, {"state": training.state})  # compiles the checksums
    checkpoints.wait()
    seconds: dict[str, list[float]] = {"with": [], "without": [], "call": [], "written": []}
    for number in range(2, 2 + rounds):
        for name in ("with", "without"):
            start = time.perf_counter()
            if name == "with":
                checkpoints.save(number, {"state": training.state})
                seconds["call"].append(time.perf_counter() - start)
            training.run(length)
            seconds[name].append(time.perf_counter() - start)
            if name == "with":
                checkpoints.wait()
                seconds["written"].append(time.perf_counter() - start)
    checkpoints.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    step, cost = median["without"] / length, median["with"] - median["without"]
    return {
        "depth": depth,
        "batch": batch,
        "device": jax.devices()[0].device_kind,
        "megabytes": training.bytes / 1e6,
        "step": step,
        "call": median["call"],
        "cost": cost,
        "share_of_interval": cost / (training.every * step),
        "share_of_epoch": cost / (EPOCH * step),
        "every_steps": training.every,
        "all": seconds,
    }


def table(records: list[dict]) -> str:
    lines = [
        "| network | state | step | `save` returns after | costs the steps | of 1 000 steps | of a CIFAR-10 epoch |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        lines.append(
            f"| ResNet-{r['depth']}, 32x32, batch {r['batch']} | {r['megabytes']:.0f} MB | {1e3 * r['step']:,.0f} ms "
            f"| {1e3 * r['call']:,.0f} ms | {1e3 * r['cost']:,.0f} ms | {r['share_of_interval']:.3%} "
            f"| {r['share_of_epoch']:.3%} |"
        )
    device = records[0]["device"]
    cores = f"{os.cpu_count()} CPU cores" if device == "cpu" else device
    return "\n".join([*lines, "", f"{cores}, medians of {len(records[0]['all']['with'])} pairs, in turn."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="18,50")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=4, help="steps of a stretch: a save is to be over in it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    records, out = [], pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for depth in map(int, arguments.depths.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            records.append(measure(depth, arguments.batch, arguments.length, arguments.rounds, folder))
        (out / "checkpoints.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (out / "checkpoints.md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    main()
