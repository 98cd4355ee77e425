"""How long a network takes to build, against what a Flax user would do otherwise.

    python benchmarks/building.py --out=results

Each line is a fresh process that builds the same network twice: with this library's initializers, with
jax.nn.initializers.he_normal eagerly, as any Flax NNX model is built, and with the latter under one jit. Writes
OUT/building.jsonl and OUT/building.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

NETWORKS = [
    (18, "idshort"),
    (18, "convshort"),
    (50, "idshort"),
    (50, "convshort"),
    (101, "idshort"),
    (101, "convshort"),
]

CHILD = """
import sys, time, jax
from flax import nnx
from nfjax.resnet import PreActResNet
depth, residual, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
init = "he_fan_out" if way == "nfjax" else jax.nn.initializers.he_normal()
build = lambda: PreActResNet(depth, residual, init=init, rngs=nnx.Rngs(0))
if way == "jitted":
    build = nnx.jit(build)
for _ in range(2):
    start = time.perf_counter()
    model = build()
    jax.block_until_ready(nnx.state(model))
    print(time.perf_counter() - start)
    del model
"""
WAYS = {"nfjax": "nfjax", "eager": "he_normal, eager", "jitted": "he_normal, one jit"}


def measure(depth: int, residual: str, way: str) -> list[float]:
    """Seconds of the first and the second build in a fresh process, imports excluded."""
    arguments = [sys.executable, "-c", CHILD, str(depth), residual, way]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results")
    parser.add_argument("--repeats", type=int, default=3, help="processes per line, of which the median is shown")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    note = f"Seconds of the first and the second build in a process; {os.cpu_count()} CPU cores, {versions}"
    note += f", median of {arguments.repeats}." if arguments.repeats > 1 else ", one process each."
    head = "| network | " + " | ".join(WAYS.values()) + " |"
    lines, records = [head, "|---|" + "---:|" * len(WAYS)], []
    for depth, residual in NETWORKS:
        cells = []
        for way in WAYS:
            runs = [measure(depth, residual, way) for _ in range(arguments.repeats)]
            first, second = (sorted(run[i] for run in runs)[len(runs) // 2] for i in range(2))
            records.append(
                {
                    "depth": depth,
                    "residual": residual,
                    "way": WAYS[way],
                    "runs": runs,
                    "cores": os.cpu_count(),
                    "versions": versions,
                }
            )
            cells.append(f"{first:.2f} / {second:.2f}")
        lines.append(f"| ResNet-{depth} {residual} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    (out / "building.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "building.md").write_text("\n".join(lines) + f"\n\n{note}\n")


if __name__ == "__main__":
    main()
