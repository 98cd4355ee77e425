"""Takes published Flax models as they are, and measures their signal before and after `nfjax.rescale`.

    python -m benchmarks.public_models --out=results
    python -m benchmarks.public_models --only="nanodl ViT,Mamba-2" --flax-examples=flax-0.12.8/examples
    python -m benchmarks.public_models --list
    python -m benchmarks.public_models --blocks

The models are in packages that are no dependencies of nfjax: `--list` names them, for `pip install --no-deps`. One that
is not there is left out, with the reason. Each model has a process of its own. Its record is added to
OUT/public_models.jsonl as soon as it is measured, and OUT/public_models.md is the table of all records that are there;
`--missing` measures only those that have none. `--blocks` only traces the models, and says what their blocks are.
AnyInit is a package, too; Flax's own examples are in its source distribution:
`pip download --no-deps --no-binary :all: flax`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks import runner
from benchmarks.public_models import tables
from benchmarks.public_models.networks import EXAMPLES, NETWORKS
from nfjax import storage

SECONDS = 600  # of one model, at most
RESULT = "RESULT "  # begins the line of a process with its record


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.public_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--only", type=runner.some_of([*NETWORKS]), help="names of models, separated by commas")
    parser.add_argument("--missing", action="store_true", help="measure only what has no record yet")
    parser.add_argument("--list", action="store_true", help="name the models with their packages, and measure nothing")
    parser.add_argument("--blocks", action="store_true", help="say what the blocks are by default, and measure nothing")
    parser.add_argument("--flax-examples", type=pathlib.Path, help="the folder `examples` of Flax's source")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which a model is given up")
    parser.add_argument("--measure", choices=[*NETWORKS], help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.flax_examples is not None:
        os.environ[EXAMPLES] = str(arguments.flax_examples.absolute())
    if arguments.list:
        print("\n".join(f"{name}  ({network.package}, {network.repository})" for name, network in NETWORKS.items()))
    elif arguments.blocks:
        for name in arguments.only or NETWORKS:
            print(f"{name}: {blocks(name)}", flush=True)
    elif arguments.measure:
        print(RESULT + json.dumps(measure(arguments.measure)))
    else:
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measures the models one after another."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "public_models.jsonl"
    records = {record["model"]: record for record in runner.read(path)}
    for name in arguments.only or NETWORKS:
        if arguments.missing and name in records:
            continue
        record = in_a_process(name, arguments.seconds)
        if "missing" in record:
            print(f"{name}: left out, {record['missing']}", flush=True)
            continue
        records[name] = record
        ordered = [records[known] for known in NETWORKS if known in records]
        storage.write_text(path, "".join(json.dumps(one) + "\n" for one in ordered))
        storage.write_text(path.with_suffix(".md"), tables.table(ordered))
        print(f"{name}: {tables.in_short(record)}", flush=True)


def in_a_process(name: str, seconds: float) -> dict[str, Any]:
    """The record of a model, {"missing": reason} where its package is not there."""
    command = [sys.executable, "-m", "benchmarks.public_models", f"--measure={name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"model": name, "repository": NETWORKS[name].repository, "error": f"not done in {seconds:.0f} seconds"}
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return {"model": name, "repository": NETWORKS[name].repository, "error": f"the process ended: {last}"}


def blocks(name: str) -> str:
    """What the blocks of a model are by default, or why it cannot be told."""
    from benchmarks.public_models import measuring

    warnings.simplefilter("ignore")
    try:
        return measuring.find_blocks(NETWORKS[name])
    except ImportError as error:
        return f"left out, {NETWORKS[name].package}: {error}"


def measure(name: str) -> dict[str, Any]:
    """The record of a model, in this process."""
    from benchmarks.public_models import measuring

    warnings.simplefilter("ignore")  # of packages older than this JAX
    try:
        record = measuring.measure(name, NETWORKS[name])
    except ImportError as error:
        return {"missing": f"{NETWORKS[name].package}: {error}"}
    packages = ("nfjax", "jax", "flax", "anyinit", NETWORKS[name].package)
    return record | {"machine": runner.machine(), "versions": {package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
