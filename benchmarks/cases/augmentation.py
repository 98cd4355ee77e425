"""RandAugment: does it give torchvision's pixels, and what does it cost?

    python -m benchmarks augmentation --torch-python=PYTHON --images=DIR

DIR holds images in any folders below it; without it, pieces of scikit-learn's two photographs serve.

Agreement: every operation at all 31 bins with both signs, and the whole policy with the same operations and signs
forced on both sides. Cost: milliseconds per batch of this library's form; of the obvious one, a `switch` over fourteen
operations in a `vmap`, of which every image runs all; of the same switch in a loop over the images; and beside a
training step of a ResNet-18. Runs on whatever device JAX finds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import tables, turns
from benchmarks.runner import Bench, Side
from benchmarks.tables import Record

if TYPE_CHECKING:
    from PIL import Image

SIDES = {"nfjax": Side("nfjax", "nfjax_augment"), "torchvision": Side("torchvision", "torchvision")}
ROUNDS = 9
COMMAND = "python -m benchmarks augmentation --dtype=bfloat16 --sides=nfjax"
FILL = (124, 116, 104)
INTERPOLATIONS = ("nearest", "bilinear")
GEOMETRIC = 5  # of the operations, those first, interpolate
SIZES = ((32, 32), (61, 47))  # height, width, for the agreement
BATCHES = ((128, 32), (64, 224))  # images and their side, for the cost
STEP = "training step"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", help="a folder of images")
    parser.add_argument("--count", type=int, default=300, help="images in the agreement")
    parser.add_argument("--step-rounds", type=int, default=3, help="training steps that are timed")
    parser.add_argument("--dtype", default="float32", help="of the training step")


def key(record: Record) -> list[Any]:
    return [record.get(name) for name in ("kind", "device", "operation", "interpolation", "height", "form", "side")]


def measure(bench: Bench) -> Iterator[Record]:
    arguments = bench.arguments
    images = load_images(arguments.images, max(arguments.count, BATCHES[0][0]))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        workers = {name: stack.enter_context(bench.start(SIDES[name], "augmentation")) for name in arguments.sides}
        machines = {name: worker.ask("machine") for name, worker in workers.items()}
        ours = workers["nfjax"]
        told = {"device": machines["nfjax"]["device"], "cores": os.cpu_count(), "count": arguments.count}
        told["versions"] = [machine["version"] for machine in machines.values()]
        last = {"kind": "cost", "form": STEP, "side": BATCHES[0][1]} | told
        if bench.has(key(last)) and bench.done[json.dumps(key(last))]["versions"] == told["versions"]:
            return
        if "torchvision" in workers:
            for size in SIZES:
                load(workers, folder, resized(images[: arguments.count], *size))
                for found in agreement(ours, workers["torchvision"], folder):
                    yield {"kind": "agreement", "height": size[0], "width": size[1], **found} | told
        for batch, side in BATCHES:
            load(workers, folder, resized(images[:batch], side, side))
            cost = {"kind": "cost", "batch": batch, "side": side} | told
            if "torchvision" in workers:
                for interpolation in INTERPOLATIONS:
                    time = workers["torchvision"].ask("milliseconds", interpolation=interpolation)
                    yield cost | {"form": f"torchvision, {interpolation}", "ms": time}
            for form, time in ours.ask("milliseconds", rounds=arguments.rounds).items():
                yield cost | {"form": form, "ms": time}
        time = ours.ask("training_step", rounds=arguments.step_rounds, dtype=arguments.dtype)
        batch, side = BATCHES[0]
        yield {"kind": "cost", "batch": batch, "side": side, "form": STEP, "dtype": arguments.dtype, "ms": time} | told


def load_images(folder: str | None, count: int) -> list[Image.Image]:
    """`count` images, evenly from the folder."""
    from PIL import Image

    if folder is None:
        from sklearn.datasets import load_sample_images

        photographs = [Image.fromarray(image) for image in load_sample_images().images]
        corners = np.random.default_rng(0).integers((0, 0), (640 - 96, 427 - 96), (count, 2)).tolist()
        return [photographs[i % 2].crop((x, y, x + 96, y + 96)) for i, (x, y) in enumerate(corners)]
    suffixes = (".jpg", ".jpeg", ".png")
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in suffixes)
    if len(paths) < count:
        raise SystemExit(f"--images={folder} holds {len(paths)} images: {count} are needed (--count)")
    return [Image.open(paths[i * len(paths) // count], formats=("JPEG", "PNG")).convert("RGB") for i in range(count)]


def resized(images: list[Image.Image], height: int, width: int) -> np.ndarray:
    """uint8 [B, H, W, 3]"""
    from PIL import Image

    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images])


def load(workers: dict[str, turns.Worker], folder: pathlib.Path, images: np.ndarray) -> None:
    """Hands the images to all sides."""
    np.save(folder / "images.npy", images)
    for worker in workers.values():
        worker.ask("load", images=str(folder / "images.npy"))


def agreement(ours: turns.Worker, theirs: turns.Worker, folder: pathlib.Path) -> Iterator[Record]:
    """How many levels differ between the two, by operation, and for the policy at four magnitudes."""
    outputs = [str(folder / f"{name}.npy") for name in ("ours", "theirs")]
    names = ours.ask("names")
    for interpolation in INTERPOLATIONS:
        settings = {"interpolation": interpolation, "fill": FILL}
        for name in names if interpolation == "nearest" else names[:GEOMETRIC]:
            for side, output in zip((ours, theirs), outputs, strict=True):
                side.ask("operation", output=output, name=name, **settings)
            yield {"interpolation": interpolation, "operation": name} | compare(*map(np.load, outputs))
        found = []
        for seed, magnitude in enumerate((5, 9, 15, 30)):
            settings["magnitude"] = magnitude
            drawn = ours.ask("policy", output=outputs[0], seed=seed, **settings)
            theirs.ask("policy", output=outputs[1], **drawn, **settings)
            found.append(compare(*map(np.load, outputs)))
        total = {name: sum(one[name] for one in found) for name in ("values", "different")}
        total["max_difference"] = max(one["max_difference"] for one in found)
        yield {"interpolation": interpolation, "operation": "policy"} | total


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, int]:
    difference = np.abs(ours.astype(np.int16) - theirs)
    different = int((difference > 0).sum())
    return {"values": difference.size, "different": different, "max_difference": int(difference.max())}


def table(records: list[Record]) -> str:
    return tables.by_device(records, _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    parts, compared = [], [record for record in records if record["kind"] == "agreement"]
    where = f"{tables.device_name(records[0])}, {'; '.join(dict.fromkeys(', '.join(r['versions']) for r in records))}"
    if compared:
        sizes = " and ".join(f"{height}x{width}" for height, width in SIZES)
        parts += [
            _agreement(compared),
            f"Levels (0 to 255) from torchvision and from nfjax, over {compared[0]['count']} images at {sizes}, all 31 "
            "bins and both signs. The policy draws 2 operations per image, at magnitudes 5, 9, 15 and 30; the second "
            "can widen the difference of one level that a bilinear rotation leaves. Interpolation concerns the first "
            f"five. {where}.",
        ]
    parts.append(_cost([record for record in records if record["kind"] == "cost"]))
    note = f"Milliseconds per batch, uint8 in and out, medians, the forms of nfjax in turn; {where}."
    return "\n\n".join([*parts, note + tables.busy(records)])


def _agreement(records: list[Record]) -> str:
    head, rows = ["operation"], []
    for interpolation in INTERPOLATIONS:
        head += [f"equal, {interpolation}", "greatest difference"]
    names = dict.fromkeys(record["operation"] for record in records)
    for name in names:
        cells = []
        for interpolation in INTERPOLATIONS:
            found = [r for r in records if r["operation"] == name and r["interpolation"] == interpolation]
            values, different = (sum(record[key] for record in found) for key in ("values", "different"))
            share = "all" if different == 0 else f"{1 - different / values:.4%}"
            greatest = str(max(record["max_difference"] for record in found)) if found else ""
            cells += [f"{share} of {values / 1e6:.1f} M" if found else "", greatest]
        rows.append([name, *cells])
    return tables.markdown(head, rows)


def _cost(records: list[Record]) -> str:
    step = next((record["ms"] for record in records if record["form"] == STEP), None)
    values = {(record["form"], record["side"]): record["ms"] for record in records}
    dtypes = {record["form"]: f"ResNet-18 ({record['dtype']}), " for record in records if "dtype" in record}
    rows = []
    for form in dict.fromkeys(record["form"] for record in records):
        cells = [f"{values[form, side]:,.2f}" if (form, side) in values else "" for _, side in BATCHES]
        alone = "histogram" in form or "torchvision" in form or step is None
        rows.append([dtypes.get(form, "") + form, *cells, "" if alone else f"{values[form, 32] / step:.2%}"])
    titles = [f"{batch} of {side}x{side}" for batch, side in BATCHES]
    return tables.markdown(["2 operations at magnitude 9", *titles, "share of a training step"], rows)
