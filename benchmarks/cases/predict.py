"""Names for a folder of images: `nfjax predict` beside timm's inference script, with the same weights.

    python -m benchmarks predict --images=DIR --image-size=32 --torch-python=PYTHON --timm-script=inference.py

Every line is a whole process, from its start to its CSV: what a user waits for. The images of DIR, in folders or not,
are resized to --image-size and computed in batches of --batch, decoded by as many workers as there are cores. The
weights are those of a state dict, --weights, or random ones of the timm network that --network names, and nfjax has
imported them. The script is the one in timm's repository; its package does not have it. Whether both say the same is
in the table: the share of images with the same first class, and the largest difference of its probability, which
resizing adds to where images have another size: timm's is Pillow's bilinear one here, as nfjax's is nearly.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import tables, turns
from benchmarks.runner import Bench, Side
from benchmarks.tables import Record
from nfjax.inference import _safetensors, torch_weights

SIDES = {
    "first-run": Side("nfjax predict, first run", "nfjax"),
    "next-run": Side("nfjax predict, next run", "nfjax"),
    "timm": Side("timm's script", "torch"),
    "timm-compile": Side("timm's script, compiled", "torch", ("--torchcompile",)),
}
ROUNDS = 3
MEAN, STD = "0.4914,0.4822,0.4465", "0.247,0.2435,0.2616"
COMMAND = "python -m benchmarks predict --images=DIR --torch-python=PYTHON --timm-script=FILE"

Said = dict[str, tuple[int, float]]  # by file: its first class, and the probability of that


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, type=pathlib.Path, help="a folder of images")
    parser.add_argument("--image-size", type=int, default=32, help="pixels of what the network sees")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--network", default="resnetv2_18", help="a name of timm")
    parser.add_argument("--weights", type=pathlib.Path, help="of such a network, .safetensors; random without")
    parser.add_argument("--timm-script", type=pathlib.Path, help="inference.py of timm's repository")


def key(record: Record) -> list[Any]:
    return [record[name] for name in ("device", "cores", "network", "image_size", "images", "batch")]


def measure(bench: Bench) -> Iterator[Record]:
    """One record, of all rounds."""
    arguments = bench.arguments
    timm = [name for name in arguments.sides if SIDES[name].module == "torch"]
    if timm and arguments.timm_script is None:
        others = [name for name in SIDES if SIDES[name].module != "torch"]
        sys.exit(f"timm's sides need --timm-script; without it: --sides={','.join(others)}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        classes = prepare(arguments, folder)
        sides: dict[str, dict[str, Any]] = {side: {"seconds": []} for side in arguments.sides}
        said: dict[str, Said] = {}
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for side in arguments.sides:
                    command = commands(arguments, SIDES[side], folder, classes)
                    sides[side]["seconds"].append(timed(command, cache))
                    read = timm_said if side in timm else nfjax_said
                    said[side] = read(folder / side_file(SIDES[side]), arguments.images)
    reference = said[arguments.sides[0]]
    for side, found in said.items():
        sides[side] |= agreement(reference, found)
    versions = [f"nfjax on jax {importlib.metadata.version('jax')}"]
    if timm:
        code = "import timm, torch; print(f'timm {timm.__version__}, PyTorch {torch.__version__}')"
        done = subprocess.run([arguments.torch_python, "-c", code], capture_output=True, text=True, check=True)
        versions.append(done.stdout.strip().split("\n")[-1])
    yield {
        "network": arguments.network if arguments.weights is None else arguments.weights.stem,
        "image_size": arguments.image_size,
        "images": len(reference),
        "batch": arguments.batch,
        "device": "cpu",
        "cores": os.cpu_count(),
        "version": ", ".join(versions),
        "sides": sides,
    }


def prepare(arguments: argparse.Namespace, folder: pathlib.Path) -> int:
    """Writes the weights and nfjax's model of them; the number of classes."""
    weights = folder / "weights.safetensors"
    if arguments.weights is not None:
        weights.write_bytes(arguments.weights.read_bytes())
    else:
        command = [arguments.torch_python, "-m", "benchmarks.sides.timm_weights", str(folder), arguments.network]
        subprocess.run(command, cwd=turns.ROOT, capture_output=True, check=True)
        with np.load(folder / f"{arguments.network}.npz") as file:
            arrays = {name.removeprefix("weights/"): file[name] for name in file if name.startswith("weights/")}
        weights.write_bytes(_safetensors.encode(arrays))
    _, network = torch_weights.convert(torch_weights.read(weights))
    (folder / "classes.txt").write_text("".join(f"{number}\n" for number in range(network["num_classes"])))
    command = [sys.executable, "-m", "nfjax", "import", f"--weights={weights}", f"--out={folder / 'model'}"]
    sizes = [f"--image-size={arguments.image_size}", f"--resize={arguments.image_size}"]
    colours = [f"--mean={MEAN}", f"--std={STD}", f"--class-names={folder / 'classes.txt'}"]
    subprocess.run([*command, *sizes, *colours], cwd=turns.ROOT, capture_output=True, check=True)
    return network["num_classes"]


def commands(arguments: argparse.Namespace, side: Side, folder: pathlib.Path, classes: int) -> list[str]:
    """What a user would type."""
    images, out = str(arguments.images), folder / side_file(side)
    if side.module == "nfjax":
        options = [f"--model={folder / 'model'}", images, f"--out={out}", f"--batch-size={arguments.batch}"]
        return [sys.executable, "-m", "nfjax", "predict", *options]
    size = str(arguments.image_size)
    return [
        *(arguments.torch_python, str(arguments.timm_script), f"--data-dir={images}", f"--model={arguments.network}"),
        *(f"--checkpoint={folder / 'weights.safetensors'}", f"--num-classes={classes}", "--device=cpu"),
        *("--input-size", "3", size, size, "--crop-pct=1.0", "--interpolation=bilinear"),
        *("--mean", *MEAN.split(","), "--std", *STD.split(","), f"--batch-size={arguments.batch}"),
        *(f"--workers={os.cpu_count()}", "--label-type=none", "--include-index", "--fullname", "--topk=1"),
        *("--no-console-results", f"--results-dir={out.parent}", f"--results-file={out.name}", *side.options),
    ]


def side_file(side: Side) -> str:
    return f"{side.module}.csv"


def timed(command: list[str], cache: str) -> float:
    """Seconds of a process.

    Raises:
        turns.LostError: It fails; with the end of what it wrote.
    """
    time.sleep(turns.PAUSE)
    kept = {"NFJAX_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=turns.ROOT, env=environment | kept, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise turns.LostError(f"{' '.join(command[:4])} ...: ended with {done.returncode}\n{done.stderr[-2000:]}")
    return round(seconds, 2)


def nfjax_said(path: pathlib.Path, images: pathlib.Path) -> Said:
    with open(path, newline="") as file:
        return {
            os.path.relpath(row["file"], images): (int(row["class_1"]), float(row["probability_1"]))
            for row in csv.DictReader(file)
        }


def timm_said(path: pathlib.Path, images: pathlib.Path) -> Said:
    """`images` is not needed: its paths begin there."""
    with open(path, newline="") as file:
        return {row["filename"]: (int(row["index"]), float(row["prob"])) for row in csv.DictReader(file)}


def agreement(reference: Said, found: Said) -> dict[str, Any]:
    """How far two sides say the same.

    Raises:
        turns.LostError: They have named different images.
    """
    if reference.keys() != found.keys():
        raise turns.LostError(f"{len(reference):,} images against {len(found):,}, or others: nothing is compared")
    same = [name for name in reference if reference[name][0] == found[name][0]]
    largest = max((abs(reference[name][1] - found[name][1]) for name in same), default=float("nan"))
    return {"same": len(same) / len(reference), "difference": largest}


def table(records: list[Record]) -> str:
    return tables.by_device(records, _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    rows = []
    for record in records:
        what = f"{record['network']}, {record['image_size']} pixels, {record['images']:,} images"
        for name, found in record["sides"].items():
            seconds = min(found["seconds"])
            speed = [f"{seconds:.1f}", f"{record['images'] / seconds:,.0f}"]
            rows.append([what, SIDES[name].title, *speed, f"{found['same']:.2%}", f"{found['difference']:.1e}"])
    head = ["network", "", "seconds", "images/s", "same first class", "largest difference of its probability"]
    versions = "; ".join(dict.fromkeys(record["version"] for record in records))
    rounds = max(len(found["seconds"]) for record in records for found in record["sides"].values())
    note = (
        f"Whole processes, from the start to the CSV, float32, batches of {records[0]['batch']}; "
        f"{records[0]['cores']} CPU cores, {versions}. The best of {rounds}, in turn."
    )
    return f"{tables.markdown(head, rows, texts=2)}\n\n{note}{tables.busy(records)}"
