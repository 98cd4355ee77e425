"""An epoch of CIFAR-10 as a user experiences it: nfjax's trainer against two PyTorch loops, in turn.

    python benchmarks/epoch.py --torch-python=PYTHON --data=DIR --dtype=bfloat16 --out=results

Crop, flip, RandAugment (2 operations, magnitude 9), ResNet-18, SGD with momentum. nfjax keeps the images on the device
and augments them in the training step. The PyTorch loops are those of epoch_torch.py: DataLoader with worker processes
and torchvision's transforms, and all on the device. PYTHON is an interpreter that has PyTorch and torchvision. Without
--data (folders of images, one per class, below train/) the images are random, which takes the same time. --examples
shortens the epoch. Each side is a process of its own; the first epoch of each, which compiles, is told apart. Writes
OUT/epoch.jsonl, a line per device, network and precision, and OUT/epoch.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np
import turns

HERE = pathlib.Path(__file__).parent
NETWORKS = {"BatchNorm": ("identity", "batch"), "IdShort": ("idshort", None), "ConvShort": ("convshort", None)}
SIDES = {
    "nfjax": "nfjax",
    "dataloader": "PyTorch, DataLoader",
    "device": "PyTorch, data on the device",
}
CIFAR = 50_000  # training images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="an interpreter that has PyTorch and torchvision")
    parser.add_argument("--data", help="folder with train/<class> and test/<class>")
    parser.add_argument("--examples", type=int, default=CIFAR, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="after the first, of which the median is shown")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--network", choices=NETWORKS, default="ConvShort")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--operations", type=int, default=2, help="of RandAugment; 0 leaves it out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the DataLoader")
    parser.add_argument("--torch-mode", choices=("eager", "compile"), default="compile")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sides.split(",") if name not in SIDES]:
        parser.error(f"--sides={','.join(unknown)}: expected some of {', '.join(SIDES)}")
    try:
        record = measure(arguments)
    except turns.LostError as error:
        sys.exit(f"epoch.py: {error}")
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "epoch.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    records = [old for old in before if _key(old) != _key(record)] + [record]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "epoch.md").write_text(table(records))
    print(table(records))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, an epoch each."""
    names = arguments.sides.split(",")
    residual, norm = NETWORKS[arguments.network]
    settings = {
        name: getattr(arguments, name) for name in ("depth", "width", "batch", "dtype", "operations", "workers")
    }
    commands = {
        name: [arguments.torch_python, str(HERE / "epoch_torch.py"), name, arguments.torch_mode] for name in names
    }
    commands["nfjax"] = [sys.executable, str(HERE / "epoch_nfjax.py")]
    sides: dict[str, dict[str, Any]] = {name: {"epochs": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.npz"
        np.savez(path, **images(arguments.data, arguments.examples))
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | turns.ONE_DEVICE
        workers = {name: turns.Worker(commands[name], environment) for name in names}
        for name, worker in workers.items():
            print(f"preparing {SIDES[name]}", flush=True)
            sides[name] |= worker.ask("prepare", images=path, residual=residual, norm=norm, **settings)
        turns.check_same_device(sides)
        for _ in range(1 + arguments.epochs):
            for name, worker in workers.items():
                sides[name]["epochs"].append(worker.ask("epoch"))
                print(SIDES[name], sides[name]["epochs"][-1], flush=True)
        for worker in workers.values():
            worker.close()
    chosen = {name: getattr(arguments, name) for name in ("network", "examples", "torch_mode")}
    return settings | chosen | {"data": bool(arguments.data), "cores": os.cpu_count(), "sides": sides}


def images(directory: str | None, examples: int) -> dict[str, np.ndarray]:
    """Training images uint8 [N, 32, 32, 3] and their labels int32 [N]."""
    if directory is None:
        rng = np.random.default_rng(0)
        shape = (examples, 32, 32, 3)
        return {"images": rng.integers(0, 256, shape, np.uint8), "labels": rng.integers(0, 10, examples, np.int32)}
    from nfjax import config
    from nfjax.training import assembly

    settings = config.cifar()
    split = assembly.open_data(settings, directory).train
    chosen = np.random.default_rng(0).permutation(len(split.images))[:examples]
    return {"images": split.images[chosen], "labels": split.labels[chosen]}


def _key(record: dict[str, Any]) -> str:
    names = ("depth", "network", "width", "batch", "dtype", "operations", "torch_mode", "examples")
    return json.dumps([*(record[name] for name in names), next(iter(record["sides"].values()))["device"]])


def seconds(record: dict[str, Any], side: str) -> float | None:
    """Of an epoch, the median of all but the first."""
    epochs = record["sides"].get(side, {}).get("epochs", [])
    return statistics.median(epoch["seconds"] for epoch in epochs[1:]) if len(epochs) > 1 else None


def table(records: list[dict[str, Any]]) -> str:
    texts = ["network", "device", "PyTorch", "batch, precision"]
    head = [*texts, "images of an epoch", *(f"{title}, s" for title in SIDES.values())]
    head += [f"{title} / nfjax" for name, title in SIDES.items() if name != "nfjax"]
    lines = [head, ["---"] * len(texts) + ["---:"] * (len(head) - len(texts))]
    for record in records:
        first = next(iter(record["sides"].values()))
        device = f"{record['cores']} CPU cores" if first["device"] == "cpu" else first["device"]
        width = "" if record["width"] == 64 else f", width {record['width']}"
        times = {name: seconds(record, name) for name in SIDES}
        mode = "torch.compile" if record["torch_mode"] == "compile" else record["torch_mode"]
        cells = [f"ResNet-{record['depth']} {record['network']}{width}", device, mode]
        cells += [f"{record['batch']}, {record['dtype']}", f"{record['examples']:,}"]
        cells += [f"{time:.1f}" if time else "" for time in times.values()]
        ours = times.pop("nfjax")
        cells += [f"{time / ours:.2f}" if time and ours else "" for time in times.values()]
        lines.append(cells)
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    last = records[-1]
    versions = ", ".join(dict.fromkeys(side["version"] for side in last["sides"].values()))
    first = "; ".join(f"{SIDES[name]} {side['epochs'][0]['seconds']:.1f}" for name, side in last["sides"].items())
    losses = "; ".join(
        f"{SIDES[name]} {side['epochs'][0]['loss']:.3f} to {side['epochs'][-1]['loss']:.3f}"
        for name, side in last["sides"].items()
    )
    note = (
        f"Seconds of an epoch, the median after the first; PyTorch channels last, "
        f"{last['workers']} workers; {versions}. The first epoch of the last row, with compilation: {first}. "
        f"Its mean training loss from the first epoch to the last: {losses}. "
        "RandAugment of PyTorch on the device treats all images of a batch alike."
    )
    missing = all(next(iter(record["sides"].values()))["device"] == "cpu" for record in records)
    command = "python benchmarks/epoch.py --torch-python=PYTHON --dtype=bfloat16"
    parts = [rows, note, *([f"On an accelerator: not measured yet, by `{command}`."] if missing else [])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
