"""What each format of `nfjax export` costs: its size, a fresh process up to its first prediction, images/s after that.

    python -m benchmarks formats --model=results/nf_resnet14_cifar10

Every round is a process of its own for each format: nfjax with the weights, JAX alone with the program, onnxruntime
with the ONNX file. The time runs from before the process to the probabilities of one image; then batches of images of
the network's size, which are in memory, are computed again and again for two seconds. nfjax keeps what it compiles, and
is measured as it is the second time; JAX alone keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import tables, turns
from benchmarks.runner import Bench, Side
from benchmarks.tables import Record
from nfjax import inference

SIDES = {
    "safetensors": Side("safetensors, by nfjax", "nfjax"),
    "stablehlo": Side("StableHLO, by JAX", "nfjax"),
    "onnx": Side("ONNX, by onnxruntime", "nfjax"),
}
ROUNDS = 3
COMMAND = "python -m benchmarks formats"
# Each makes `predict`, of uint8 [B, S, S, 3], of the export in `folder`.
MAKES = {
    "safetensors": """
import nfjax
from nfjax import compilation
compilation.keep()
predict = nfjax.load(folder, batch_size=batch).of_pixels
""",
    "stablehlo": """
import jax
program = jax.export.deserialize(bytearray(open(f"{folder}/model.stablehlo", "rb").read()))
call = jax.jit(program.call)
predict = lambda images: numpy.asarray(call(images))
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
predict = lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]
""",
}
MEASURE = """
images = numpy.random.default_rng(0).integers(0, 256, (batch, side, side, 3), numpy.uint8)
predict(images[:1])
first = time.time() - begin
predict(images)
count, start = 0, time.perf_counter()
while time.perf_counter() - start < 2:
    predict(images)
    count += batch
print(json.dumps([first, count / (time.perf_counter() - start)]))
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=pathlib.Path, default=turns.ROOT / "results/nf_resnet14_cifar10")
    parser.add_argument("--batch", type=int, default=64)


def key(record: Record) -> list[Any]:
    return [record[name] for name in ("device", "cores", "network", "batch", "way")]


def measure(bench: Bench) -> Iterator[Record]:
    """A record for each format, of the best of all rounds."""
    arguments = bench.arguments
    predictor = inference.load(arguments.model)
    with tempfile.TemporaryDirectory() as name:
        results = inference.export(predictor, pathlib.Path(name, "model"), arguments.sides)
        found: dict[str, list[list[float]]] = {side: [] for side in arguments.sides}
        for side in arguments.sides:  # what is kept is there before anything is measured
            process(side, name, arguments.batch, predictor.preprocessing.image_size)
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                found[side].append(process(side, name, arguments.batch, predictor.preprocessing.image_size))
    for result in results:
        first, rate = zip(*found[result.format], strict=True)
        yield {
            "network": arguments.model.name,
            "image_size": predictor.preprocessing.image_size,
            "batch": arguments.batch,
            "way": SIDES[result.format].title,
            "bytes": result.size,
            "difference": result.difference,
            "first": round(min(first), 2),
            "images_per_second": round(max(rate)),
            "device": "cpu",
            "cores": os.cpu_count(),
        }


def process(side: str, folder: str, batch: int, image_size: int) -> list[float]:
    """[seconds to the first prediction, images/s].

    Raises:
        turns.LostError: The process failed; with the end of what it wrote.
    """
    time.sleep(turns.PAUSE)
    values = {"folder": f"{folder}/model", "batch": batch, "side": image_size, "begin": time.time()}
    head = "import json, time, numpy\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", head + MAKES[side] + MEASURE],
        env=environment | {"NFJAX_CACHE": f"{folder}/cache"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise turns.LostError(f"{side}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.split("\n")[-2])


def table(records: list[Record]) -> str:
    return tables.by_device(records, _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    rows = [
        [
            *(record["network"], record["way"], f"{record['bytes']:,}", f"{record['difference']:.1e}"),
            *(f"{record['first']:.1f}", f"{record['images_per_second']:,}"),
        ]
        for record in records
    ]
    head = ["network", "format", "bytes", "largest difference", "seconds to the first prediction", "images/s"]
    machine = records[0]["machine"]
    note = (
        f"Images of {records[0]['image_size']} pixels, batches of {records[0]['batch']}, float32; "
        f"{records[0]['cores']} CPU cores, jax {machine['jax']}. The best of {ROUNDS} processes each, in turn."
    )
    return f"{tables.markdown(head, rows, texts=2)}\n\n{note}{tables.busy(records)}"
