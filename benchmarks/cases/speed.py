"""A whole training step (forward, loss, backward, SGD with momentum) of nfjax and of PyTorch, in turn.

    python -m benchmarks speed --torch-python=PYTHON

The PyTorch networks are those of nfjax with the same parameters (sides/torch_networks.py), so that their losses can be
compared, step by step. Every side is a process of its own that lives as long as a network is measured; they take turns
of a few steps each. Where the memory does not suffice for all at once, each has the device to itself, a new process in
each of two rounds; where not for one either, its place in the table stays empty.

The grid, of an accelerator where there is one and else of the processor, is measured in order of value. Stopped, the
same command goes on where it was; with another version of either library, or a side that was not there, it measures
anew. --depths, --networks, --images, --batches and --dtypes choose a part of it. Batch "max" doubles the batch from
twice the largest number given for these pixels until nothing fits. Where there are several accelerators, each side uses
the first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import tables, turns
from benchmarks.networks import CLASSES, NETWORKS, title
from benchmarks.runner import DEPTHS, Bench, Side, some_of
from benchmarks.tables import Record

SIDES = {
    "nfjax": Side("nfjax", "nfjax"),
    "eager": Side("PyTorch", "torch", ("eager",)),
    "compile": Side("torch.compile", "torch", ("compile",)),
    "autotune": Side("torch.compile, max-autotune", "torch", ("autotune",)),
    "timm eager": Side("timm", "torch", ("eager", "timm")),
    "timm compile": Side("timm, torch.compile", "torch", ("compile", "timm")),
}
ROUNDS = 0  # as the grid says
COMMAND = "python -m benchmarks speed --torch-python=PYTHON"
TIMM = {(50, "BatchNorm", 224), (50, "IdShort", 224)}  # of whose kind timm has one
DTYPES = ("float32", "bfloat16")
LARGEST = 8192  # batch up to which "max" goes


@dataclasses.dataclass(frozen=True)
class Network:
    """One network at one shape."""

    depth: int
    network: str
    image: int
    batch: int
    dtype: str
    width: int

    def request(self) -> dict[str, Any]:
        """As the sides take it."""
        residual, norm = NETWORKS[self.network]
        settings = dataclasses.asdict(self) | {"residual": residual, "norm": norm, "classes": CLASSES[self.image]}
        del settings["network"]
        return settings


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is measured, each in order of value, and how often: `turns` of `steps` steps, after `warm` of them.

    Attributes:
        shapes: (pixels, batch or "max").
    """

    shapes: tuple[tuple[int, int | str], ...]
    depths: tuple[int, ...]
    dtypes: tuple[str, ...]
    sides: tuple[str, ...]
    turns: int
    steps: int
    warm: int


GRIDS = {
    "cpu": Grid(((32, 32),), (18, 50, 101), ("float32",), ("nfjax", "eager", "compile"), turns=5, steps=1, warm=2),
    # First batches near the best of which all sides fit into 80 GB together, then each side's own best.
    "gpu": Grid(
        shapes=((224, 128), (32, 512), (224, "max"), (32, "max"), (32, 128)),
        depths=(50, 18, 101),
        dtypes=("bfloat16", "float32"),
        sides=tuple(SIDES),
        turns=10,
        steps=20,
        warm=10,
    ),
}


def _batches(text: str) -> list[int | str]:
    return [part if part == "max" else int(part) for part in text.split(",")]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", choices=GRIDS, help="by default that of the device")
    parser.add_argument("--depths", type=some_of(DEPTHS, int), help="such as 18,50")
    parser.add_argument("--networks", type=some_of(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", type=some_of(CLASSES, int), help="pixels, 32 or 224")
    parser.add_argument("--batches", type=_batches, help="numbers, or max")
    parser.add_argument("--dtypes", type=some_of(DTYPES))
    parser.add_argument("--steps", type=int, help="in a turn")
    parser.add_argument("--width", type=int, default=64)


def key(record: Record) -> list[Any]:
    return [*record["case"].values(), record["device"]]


def measure(bench: Bench) -> Iterator[Record]:
    arguments = bench.arguments
    with tempfile.TemporaryDirectory() as folder, Comparison(bench, pathlib.Path(folder)) as comparison:
        device = comparison.device(arguments.sides)
        name = arguments.grid or ("cpu" if device == "cpu" else "gpu")
        if name == "gpu" and device == "cpu":
            sys.exit("--grid=gpu: there is no accelerator here; --grid=cpu measures the processor")
        comparison.grid = chosen(GRIDS[name], arguments)
        yield from comparison.run(cases(comparison.grid, arguments.networks, arguments.width), device)


def chosen(grid: Grid, arguments: argparse.Namespace) -> Grid:
    """The grid with what the command line changes; sides only by leaving out, unless they are all that is named."""
    images = arguments.images or list(dict.fromkeys(image for image, _ in grid.shapes))
    shapes = [shape for shape in grid.shapes if shape[0] in images]
    if arguments.batches or not shapes:
        shapes = list(itertools.product(images, arguments.batches or [32]))
    given = {"depths": arguments.depths, "dtypes": arguments.dtypes, "steps": arguments.steps}
    given |= {"turns": arguments.rounds, "sides": None if list(arguments.sides) == list(SIDES) else arguments.sides}
    return dataclasses.replace(grid, shapes=tuple(shapes), **{name: value for name, value in given.items() if value})


def cases(grid: Grid, networks: list[str], width: int) -> list[tuple[Network, bool]]:
    """(case, whether its batch is only where the doubling starts), in order of value."""
    largest: dict[int, int] = {}
    for image, batch in grid.shapes:
        if batch != "max":
            largest[image] = max(largest.get(image, 0), batch)
    start = {image: 2 * largest.get(image, 32) for image, _ in grid.shapes}
    return [
        (Network(depth, network, image, start[image] if batch == "max" else batch, dtype, width), batch == "max")
        for dtype in grid.dtypes
        for image, batch in grid.shapes
        for depth in grid.depths
        for network in networks
    ]


class Comparison:
    """The sides, network by network. folder: a temporary one, for the parameters that all sides start from."""

    grid: Grid

    def __init__(self, bench: Bench, folder: pathlib.Path):
        self.bench, self.folder = bench, folder
        self.timm = True
        self._macs: dict[pathlib.Path, int] = {}
        self._writer: turns.Worker | None = None

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def device(self, sides: Sequence[str]) -> str:
        """The device, and from here on the versions; notices where timm is not installed.

        Ends the program where one of the libraries sees an accelerator that the other does not.
        """
        names = ["nfjax", *(["eager"] if set(sides) - {"nfjax"} else [])]
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(self._start(name)) for name in names}
            machines = {name: worker.ask("machine") for name, worker in workers.items()}
            self.timm = "eager" in workers and workers["eager"].ask("has_timm")
        turns.check_same_device(machines)
        self.versions = {name: found["version"] for name, found in machines.items()}
        return machines["nfjax"]["device"]

    @functools.cache  # noqa: B019 - as long as the program runs
    def limits(self, dtype: str) -> dict[str, float]:
        """What the device can do, the best of the libraries."""
        answers = []
        for name in self.versions:
            with self._start(name) as worker:
                answers.append(worker.ask("limits", dtype=dtype))
        return {name: max(answer[name] for answer in answers) for name in ("matmul", "conv")}

    def run(self, cases: list[tuple[Network, bool]], device: str) -> Iterator[Record]:
        """Yields a record per case that is not done; whoever takes it adds it to those that are."""
        if not self.timm and any(name.startswith("timm") for name in self.grid.sides):
            print("PyTorch's interpreter has no timm, which is left out", file=sys.stderr)
        for case, doubling in cases:
            names = self._sides(case)
            while names:
                described = {"case": dataclasses.asdict(case), "device": device}
                done = self.bench.done.get(json.dumps(key(described)))
                if done is None or not self._is_whole(done, names):
                    described |= {"peak": self.limits(case.dtype), "cores": os.cpu_count()}
                    described |= {"turns": self.grid.turns, "steps": self.grid.steps}
                    yield (done := described | self._measured(case, names, together=not doubling))
                if not doubling or case.batch >= LARGEST:
                    break
                names = [name for name in names if done["sides"].get(name, {}).get("seconds")]
                case = dataclasses.replace(case, batch=2 * case.batch)

    def _is_whole(self, record: Record, names: list[str]) -> bool:
        """Whether a record has all these sides, of the versions that are here."""

        def same(name: str) -> bool:
            expected = self.versions["nfjax" if name == "nfjax" else "eager"]
            return record["sides"][name].get("version", expected) == expected

        return all(name in record["sides"] and same(name) for name in names)

    def _measured(self, case: Network, names: list[str], together: bool) -> Record:
        """{"together", "sides"}; where one of the sides fails beside the others, each has the device to itself."""
        if together:
            sides = self.together(case, names)
            if not any("error" in side for side in sides.values()):
                return {"together": True, "sides": sides}
        return {"together": False, "sides": self.alone(case, names)}

    def together(self, case: Network, names: list[str]) -> dict[str, Record]:
        """All sides alive at once, each in its turn."""
        sides: dict[str, Record] = {name: {} for name in names}
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(self._start(name)) for name in names}
            for action in (self._prepare, *[self._turn] * self.grid.turns, self._report):
                for name, worker in workers.items():
                    self._guarded(sides[name], action, worker, case)
        return sides

    def alone(self, case: Network, names: list[str]) -> dict[str, Record]:
        """One side at a time, with the device to itself, in two rounds of new processes."""
        sides: dict[str, Record] = {name: {} for name in names}
        for _ in range(2):
            for name, side in sides.items():
                if "error" in side:
                    continue
                with self._start(name, alone=True) as worker:
                    for action in (self._prepare, *[self._turn] * -(-self.grid.turns // 2), self._report):
                        self._guarded(side, action, worker, case)
        return sides

    def _sides(self, case: Network) -> list[str]:
        has_timm = self.timm and (case.depth, case.network, case.image) in TIMM and case.width == 64
        return [name for name in self.grid.sides if has_timm or not name.startswith("timm")]

    def _start(self, name: str, alone: bool = False) -> turns.Worker:
        # Memory is taken when it is needed: the other sides live on the same device.
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if alone else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return self.bench.start(SIDES[name], "steps", memory)

    def _prepare(self, side: Record, worker: turns.Worker, case: Network) -> None:
        parameters = self.folder / f"{case.depth}_{case.network}_{case.width}_{case.image}.npz"
        request = case.request() | {"parameters": str(parameters)}
        if parameters not in self._macs:
            if self._writer is None:  # on the processor, so that it takes no memory from those that are measured
                self._writer = self.bench.start(SIDES["nfjax"], "steps", {"JAX_PLATFORMS": "cpu"})
            self._macs[parameters] = self._writer.ask("write", **request)
        side |= {"macs": self._macs[parameters]} | worker.ask("prepare", warm=self.grid.warm, **request)

    def _turn(self, side: Record, worker: turns.Worker, case: Network) -> None:
        side.setdefault("seconds", []).append(worker.ask("take", n=self.grid.steps) / self.grid.steps)

    def _report(self, side: Record, worker: turns.Worker, case: Network) -> None:
        side |= worker.ask("report")

    def _guarded(self, side: Record, action: Callable[..., None], worker: turns.Worker, case: Network) -> None:
        """A side that has failed is left alone."""
        if "error" in side:
            return
        try:
            action(side, worker, case)
        except turns.LostError as error:
            side["error"] = str(error)
            side.pop("seconds", None)


# ---------------------------------------------------------------- the table


def rate(record: Record, side: str) -> float | None:
    """Images per second, by the median turn; None where it was not measured."""
    seconds = record["sides"].get(side, {}).get("seconds")
    return record["case"]["batch"] / statistics.median(seconds) if seconds else None


def flops(record: Record) -> float | None:
    """FLOP/s of nfjax: three times those of the forward pass, which counts two per multiply-accumulate."""
    measured = rate(record, "nfjax")
    return 6 * record["sides"]["nfjax"]["macs"] * measured if measured else None


def named(record: Record) -> str:
    case = record["case"]
    return title(case["depth"], case["network"], case["width"])


def agreement(record: Record) -> str:
    """Whether all sides do the same work: the losses of the same network agree, and all begin near ln(classes) and
    fall; otherwise what is wrong.
    """
    sides = {name: side["losses"] for name, side in record["sides"].items() if side.get("losses")}
    expected, wrong = math.log(CLASSES[record["case"]["image"]]), []
    tolerance = 0.02 if record["case"]["dtype"] == "float32" else 0.05
    for name, losses in sides.items():
        called = SIDES[name].title
        if not abs(losses[0] / expected - 1) < 0.5:
            wrong.append(f"{called} begins at {losses[0]:.3g}, not near {expected:.3g}")
        if not losses[-1] < losses[0]:
            wrong.append(f"{called} does not fall: {losses[0]:.4g} to {losses[-1]:.4g}")
        if "nfjax" in sides and not name.startswith("timm"):
            pairs = list(zip(losses[:3], sides["nfjax"], strict=False))
            if not all(abs(a - b) <= tolerance * abs(b) for a, b in pairs):
                wrong.append(f"{called} differs from nfjax: {pairs}")
    return "; ".join(wrong)


def table(records: list[Record]) -> str:
    """A table per device, then what it says of the goals."""
    return tables.by_device(records, _of_device, COMMAND)


def _of_device(records: list[Record]) -> str:
    names = [name for name in SIDES if any(name in record["sides"] for record in records)]
    titles = [SIDES[name].title for name in names]
    head = ["network", "pixels", "batch", "dtype", *titles, *(f"nfjax / {name}" for name in titles[1:])]
    head += ["GiB, " + ", ".join(titles), "TFLOP/s", "of the peak"]
    rows = []
    for record in records:
        case, rates, achieved = record["case"], [rate(record, name) for name in names], flops(record)
        cells = [named(record), *(str(case[name]) for name in ("image", "batch", "dtype"))]
        cells += [_rate(record, name) for name in names]
        cells += [f"{rates[0] / theirs:.2f}" if rates[0] and theirs else "" for theirs in rates[1:]]
        peaks = [record["sides"].get(name, {}).get("peak_bytes") for name in names]
        cells += [", ".join(f"{peak / 2**30:.1f}" if peak else "–" for peak in peaks)]
        cells += [f"{achieved / 1e12:.3g}", f"{achieved / max(record['peak'].values()):.0%}"] if achieved else ["", ""]
        rows.append(cells)
    return "\n\n".join([tables.markdown(head, rows), _note(records, names), *_goals(records)])


def _note(records: list[Record], names: list[str]) -> str:
    on_cpu = records[0]["device"] == "cpu"
    versions = [record["sides"].get(name, {}).get("version") for name in names for record in records]
    memory = "memory of the process while training"
    if not on_cpu:
        memory = "memory in use while training: PyTorch's allocator tells, and of nfjax the compiled program"
    peaks = {record["case"]["dtype"]: max(record["peak"].values()) for record in records}
    listed = ", ".join(f"{value / 1e12:.3g} TFLOP/s in {dtype}" for dtype, value in peaks.items())
    taken = " or ".join(dict.fromkeys(f"{record['turns']} turns of {record['steps']} steps" for record in records))
    wrong = [f"{named(record)}: {text}" for record in records if (text := agreement(record))]
    compared = len(names) > 1
    checked = (
        f"The losses {'of the first three steps agree between nfjax and PyTorch, and all ' if compared else ''}fall."
    )
    return (
        f"Images per second of a training step on {tables.device_name(records[-1])}, the median of {taken}; "
        f"{', '.join(dict.fromkeys(filter(None, versions)))}. GiB: the largest "
        f"{memory}. The peak is the best of a matrix product and a 3x3 convolution in either library, "
        f"measured in the same run: {listed}. nfjax's step also counts what was right, measures the norms of gradient "
        f"and update, and keeps a state that they would spoil.{tables.busy(records)}"
        f"{'' if on_cpu else ' Products in float32 are TF32 on both sides.'}"
        "\n\n" + ("Losses: " + "; ".join(wrong) if wrong else checked)
    )


def _rate(record: Record, name: str) -> str:
    if name not in record["sides"]:
        return ""
    measured = rate(record, name)
    return f"{measured:,.0f}" if measured and measured >= 100 else f"{measured:,.1f}" if measured else "failed"


def _goals(records: list[Record]) -> list[str]:
    """What was aimed at, and what came out."""
    if records[0]["device"] == "cpu":
        pairs = [(rate(record, "nfjax"), rate(record, "eager")) for record in records]
        ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
        if not ratios:
            return []
        below = [ratio for ratio in ratios if ratio < 1]
        missed = f"missed on {len(below)} of {len(ratios)}, {min(below):.2f} to {max(below):.2f}" if below else "it is"
        return [f"Aimed at: on every network at least as fast as PyTorch, channels last, not compiled; {missed}."]

    def best(network: str, *names: str) -> float:
        """Images per second of ResNet-50 at 224 pixels, at the best batch; 0 where it was not measured."""
        wanted = {"depth": 50, "network": network, "image": 224, "dtype": "bfloat16", "width": 64}
        found = [record for record in records if record["case"].items() >= wanted.items()]
        return max([rate(record, name) or 0 for record in found for name in names], default=0)

    ours, same = best("IdShort", "nfjax"), best("IdShort", "compile", "autotune")
    batch_norm = best("BatchNorm", "compile", "autotune")
    if not (ours and same and batch_norm):
        return []
    return [
        f"ResNet-50, 224 pixels, bfloat16, each at its best batch: nfjax IdShort {ours:,.0f} images/s. Compiled "
        f"PyTorch with batch norm {batch_norm:,.0f} ({ours / batch_norm:.2f} times, aimed at 1), without "
        f"{same:,.0f} ({ours / same:.2f} times, aimed at 1.2). The best public figure, MLPerf v4.0 on 8 H200: about "
        "7 940 a chip, with batch norm."
    ]
