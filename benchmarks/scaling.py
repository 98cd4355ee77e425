"""What a training step costs as devices grow: bytes between devices, overhead, memory; and a plan for ImageNet.

    python benchmarks/scaling.py --out=results

Bytes: the trainer's own step is compiled for shapes alone on 1, 2, 4 and 8 simulated CPU devices, and the collectives
of the program are added up; two batch sizes tell what grows with the batch. With --libtpu=FILE (libtpu.so from
`pip install --no-deps --target=DIR libtpu`, the version that `jax[tpu]` names) TPU's own compiler is asked as well, for
eight chips that need not be there. Overhead: one global batch on 1 to 8 simulated devices, which share this machine's
cores. Memory: what `nfjax.training.footprint` says, beside the measured growth of the process; rematerialization and
accumulation. The plan is arithmetic on what the flags give it.

Writes OUT/scaling.jsonl, one record per measurement, OUT/scaling.md and OUT/scaling_plan.md. --only=plan, or any of the
parts, measures those anew and keeps the other records.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from scaling_measured import Process, count_network, measure_bytes, measure_peak, prepare, run_prepared
from scaling_plan import Records, plan_records
from scaling_programs import BATCHES, DATA, DEVICES, TPU_TOPOLOGY
from scaling_report import planned, report

RULES = {
    "ConvShort": {"model.residual": "convshort"},
    "IdShort": {"model.residual": "idshort"},
    "BatchNorm": {"model.residual": "identity", "model.norm": "batch"},
}
NETWORKS = {f"ResNet-{depth} {rule}": {"model.depth": depth} | RULES[rule] for depth in (18, 50) for rule in RULES}
PARTS = ("bytes", "variants", "tpu", "overhead", "tradeoff", "peak", "plan")
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
MLPERF = "MLPerf Training v4.0, ResNet-50 with batch norm on 8 H200; not ours, and not measured with nfjax"


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
    arguments = parser.parse_args()
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
        (out / "scaling_plan.md").write_text(planned(records))
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
