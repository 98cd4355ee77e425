"""How fast training crops come from image files: nfjax beside what a user would run instead, in turn.

    python benchmarks/input_pipeline.py --data=DIR --torch-python=PYTHON --tf-python=PYTHON [--rounds=3] [--out=results]

DIR holds JPEG files, in folders or not. Every side makes random resized crops of 224 pixels (area 0.08 to 1, aspect 3/4
to 4/3, bilinear) in batches of 100, with as many workers as there are cores, in a process of its own; an epoch to warm
up, four timed; the sides take turns, the median over the rounds counts. The rivals flip half of the images, which nfjax
does on the device. PYTHON: interpreters that have torch, torchvision and Pillow; tensorflow.

Writes input_pipeline.jsonl and input_pipeline.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from image_files import Files, read

from nfjax.data.decoding import crops, decode
from nfjax.data.loading import order, stream
from nfjax.data.packing import pack
from nfjax.data.sources import records
from nfjax.data.splits import Dataset

HERE = pathlib.Path(__file__).parent
SIZE, BATCH = 224, 100
RIVALS = {
    "pool": "thread pool, simplejpeg and OpenCV (area)",
    "dataloader": "PyTorch DataLoader, PIL",
    "tf": "tf.data, decode_and_crop_jpeg, no antialiasing",
    "tf_antialiased": "tf.data, decode_and_crop_jpeg, antialiased",
    "grain": "grain, worker processes, nfjax's crop",
}


def epochs(split, count: int, workers: int) -> list[float]:
    """Seconds of each of `count` epochs, the first of which starts the workers."""
    steps = len(split) // BATCH
    orders = order.train_orders(0, len(split), BATCH, 0, count * steps)
    seconds, start = [], time.perf_counter()

    def report(index: int, cause: str, detail: str) -> None:
        print(f"skipped {split.name(index)}: {cause} {detail}", file=sys.stderr)

    transform = crops.RandomResizedCrop(SIZE)
    for number, _ in enumerate(stream.stream(split, transform, (SIZE, SIZE, 3), orders, report, workers), 1):
        if number % steps == 0:
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return seconds


def ours(split, workers: int) -> float:
    """Images per second over four epochs, after one to warm up."""
    timed = epochs(split, 5, workers)[1:]
    return len(timed) * (len(split) // BATCH) * BATCH / sum(timed)


def first_epoch(data: str, workers: int) -> float:
    """Images per second of images that are met for the first time, and therefore searched for damage."""
    split = Files(data, copies=4)
    steps = len(split) // BATCH
    orders = order.train_orders(0, len(split), BATCH, 0, steps)
    batches = stream.stream(split, crops.RandomResizedCrop(SIZE), (SIZE, SIZE, 3), orders, print, workers)
    for number, _ in enumerate(batches, 1):
        if number == steps // 4:
            start = time.perf_counter()
    return (steps - steps // 4) * BATCH / (time.perf_counter() - start)


def rival(name: str, python: str, data: str) -> float:
    command = [python, str(HERE / "input_pipeline_rivals.py"), name, data, str(os.cpu_count())]
    # A session of its own: the workers of some rivals outlive them, and would hold the pipe open.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    answer = process.stdout.readline()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not answer:
        raise SystemExit(f"{' '.join(command)} failed: see above")
    return float(answer)


def pixel_difference(files: Files, count: int) -> tuple[float, float]:
    """Mean and largest mean difference of a crop to Pillow's antialiased one, in grey levels of 255."""
    from PIL import Image

    transform, differences = crops.RandomResizedCrop(SIZE), []
    for position in range(min(count, len(files))):
        data, _ = read(files.paths[position])
        height, width = decode.size(data)
        box = transform.box(height, width, position)
        factor = crops.reduction(box, SIZE)
        top, left, height, width = (n // factor * factor for n in box)
        image = (
            Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB").crop((left, top, left + width, top + height))
        )
        exact = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.int16)
        differences.append(float(np.abs(transform(data, position) - exact).mean()))
    return statistics.mean(differences), max(differences)


def memory_growth(files: Files, count: int = 20) -> dict[str, float]:
    """MiB of this process and its workers at the end of the second and of the last of `count` epochs."""
    steps, sizes = len(files) // BATCH, []
    orders = order.train_orders(0, len(files), BATCH, 0, count * steps)
    batches = stream.stream(files, crops.RandomResizedCrop(SIZE), (SIZE, SIZE, 3), orders, print)
    for number, _ in enumerate(batches, 1):
        if number % steps == 0:
            sizes.append(sum(map(resident, [os.getpid(), *children()])) / 2**20)
    return {"epoch_2": sizes[1], f"epoch_{count}": sizes[-1], "highest": max(sizes)}


def resident(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def children() -> list[int]:
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--torch-python")
    parser.add_argument("--tf-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    files, cores = Files(arguments.data), os.cpu_count()
    pythons = {
        "pool": sys.executable,
        "dataloader": arguments.torch_python,
        "tf": arguments.tf_python,
        "tf_antialiased": arguments.tf_python,
        "grain": sys.executable if has_grain() else None,
    }
    memory = memory_growth(files)  # first, while this process holds nothing else
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        packed = pathlib.Path(folder) / "records"
        pack.pack(
            Dataset(files, files, ("image",), fingerprint=lambda: arguments.data),
            str(packed),
            source="folder",
            short_side=256,
            quality=90,
        )
        shards = records.load(str(packed)).train
        for round_number in range(arguments.rounds):
            for name, python in pythons.items():
                if python:
                    rates.setdefault(name, []).append(rival(name, python, arguments.data))
            rates.setdefault("nfjax, 1 worker", []).append(ours(files, 1))
            rates.setdefault(f"nfjax, {cores} workers", []).append(ours(files, cores))
            first = f"nfjax, {cores} workers, in the first epoch"
            rates.setdefault(first, []).append(first_epoch(arguments.data, cores))
            rates.setdefault("nfjax, packed records of 256 pixels", []).append(ours(shards, cores))
            print(f"round {round_number + 1}:", {name: round(values[-1]) for name, values in rates.items()}, flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    mean, worst = pixel_difference(files, 1000)
    record = {"images_per_second": median, "rounds": rates, "cores": cores, "pixel_difference": [mean, worst]}
    record["memory_mib"] = memory
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "input_pipeline.jsonl").write_text(json.dumps(record) + "\n")
    (out / "input_pipeline.md").write_text(table(record))
    print(table(record))


def has_grain() -> bool:
    import importlib.util

    return importlib.util.find_spec("grain") is not None


def table(record) -> str:
    rates, cores = record["images_per_second"], record["cores"]
    reference = rates[f"nfjax, {cores} workers"]
    lines = ["| training crops of 224 pixels | images/s | images/s per core | nfjax / this |", "|---|---:|---:|---:|"]
    for name, rate in rates.items():
        used = 1 if name.endswith("1 worker") else cores
        shown = RIVALS.get(name, name)
        lines.append(f"| {shown} | {rate:,.0f} | {rate / used:,.0f} | {reference / rate:.2f} |")
    mean, worst = record["pixel_difference"]
    memory = record["memory_mib"]
    lines += [
        "",
        f"{cores} CPU cores, median of {len(next(iter(record['rounds'].values())))} rounds, in turn. Difference to "
        f"Pillow's antialiased crop: {mean:.2f} grey levels of 255 on average, {worst:.2f} for the worst image. Memory "
        f"of all processes: {memory['epoch_2']:,.0f} MiB after 2 epochs, {memory['epoch_20']:,.0f} MiB after 20.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
