"""A whole training step (forward, loss, backward, SGD with momentum) of nfjax and of PyTorch, in turn.

    python benchmarks/speed.py --torch-python=PYTHON --grid=cpu --out=results
    python benchmarks/speed.py --torch-python=PYTHON --grid=gpu --out=results

PYTHON is an interpreter that has PyTorch, and timm if that is to be compared too; it may be the one that runs this, and
neither is a dependency of nfjax. The PyTorch networks are those of nfjax with the same parameters (torch_networks.py),
so that their losses can be compared, step by step. Every side is a process of its own that lives as long as a network
is measured; they take turns of a few steps each. Where the memory does not suffice for all at once, each has the device
to itself, a new process in each of two rounds; where not for one either, its place in the table stays empty.

The grid is measured in order of value, and every network is written to OUT/speed.jsonl when it is done: stopped, the
same command goes on where it was; with another version of either library, or a side that was not there, it measures
anew. --depths, --networks, --images, --batches and --dtypes choose a part of it. Batch "max" doubles the batch from
twice the largest number given for these pixels until nothing fits. Where there are several accelerators, each side uses
the first. OUT/speed.md is the table of all that has been measured so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import speed_table
import turns

HERE = pathlib.Path(__file__).parent
# name -> (residual, norm)
NETWORKS = {"BatchNorm": ("identity", "batch"), "IdShort": ("idshort", None), "ConvShort": ("convshort", None)}
TIMM = {(50, "BatchNorm", 224), (50, "IdShort", 224)}  # of whose kind timm has one
CLASSES = {32: 10, 224: 1000}
DTYPES = ("float32", "bfloat16")
LARGEST = 8192  # batch up to which "max" goes


@dataclasses.dataclass(frozen=True)
class Case:
    """One network at one shape."""

    depth: int
    network: str
    image: int
    batch: int
    dtype: str
    width: int

    def request(self) -> dict[str, Any]:
        residual, norm = NETWORKS[self.network]
        settings = dataclasses.asdict(self) | {"residual": residual, "norm": norm, "classes": CLASSES[self.image]}
        del settings["network"]
        return settings


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is measured, each in order of value, and how often: `turns` of `steps` steps, after `warm` of them.

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
    "cpu": Grid(
        shapes=((32, 32),),
        depths=(18, 50, 101),
        dtypes=("float32",),
        sides=("nfjax", "eager", "compile"),
        turns=5,
        steps=1,
        warm=2,
    ),
    "gpu": Grid(
        shapes=((224, 64), (224, "max"), (32, 128), (32, 1024)),
        depths=(50, 18, 101),
        dtypes=("bfloat16", "float32"),
        sides=("nfjax", "eager", "compile", "autotune", "timm eager", "timm compile"),
        turns=10,
        steps=20,
        warm=10,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="an interpreter that has PyTorch")
    parser.add_argument("--grid", choices=GRIDS, required=True)
    parser.add_argument("--depths", type=_integers, help="such as 18,50; by default those of the grid, as all below")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=_integers, help="pixels, 32 or 224")
    parser.add_argument("--batches", type=_batches, help="numbers, or max")
    parser.add_argument("--dtypes")
    parser.add_argument("--sides", help=f"of {', '.join(GRIDS['gpu'].sides)}")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--steps", type=int, help="in a turn")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    grid = chosen(GRIDS[arguments.grid], arguments)
    networks = arguments.networks.split(",")
    for flag, given, known in (
        ("networks", networks, NETWORKS),
        ("images", [image for image, _ in grid.shapes], CLASSES),
        ("dtypes", grid.dtypes, DTYPES),
        ("sides", grid.sides, GRIDS["gpu"].sides),
    ):
        if unknown := [str(one) for one in given if one not in known]:
            parser.error(f"--{flag}={','.join(unknown)}: expected some of {', '.join(map(str, known))}")
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "speed.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {speed_table.key(record): record for record in before}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.torch_python, grid, pathlib.Path(folder))
        try:
            peaks = bench.peaks()
            if arguments.grid == "gpu" and peaks["device"] == "cpu":
                parser.error("--grid=gpu: there is no accelerator here; --grid=cpu measures the processor")
            for record in bench.run(cases(grid, networks, arguments.width), peaks, done):
                done[speed_table.key(record)] = record
                path.write_text("".join(json.dumps(record) + "\n" for record in done.values()))
                (out / "speed.md").write_text(speed_table.table([*done.values()]))
                print(speed_table.line(record), flush=True)
        finally:
            bench.close()
    (out / "speed.md").write_text(speed_table.table([*done.values()]))


def chosen(grid: Grid, arguments: argparse.Namespace) -> Grid:
    """The grid with what the flags change."""
    images = arguments.images or list(dict.fromkeys(image for image, _ in grid.shapes))
    shapes = [shape for shape in grid.shapes if shape[0] in images]
    if arguments.batches or not shapes:
        shapes = list(itertools.product(images, arguments.batches or [32]))
    changes = {name: getattr(arguments, name) for name in ("depths", "turns", "steps") if getattr(arguments, name)}
    changes |= {name: value.split(",") for name in ("dtypes", "sides") if (value := getattr(arguments, name))}
    return dataclasses.replace(grid, shapes=tuple(shapes), **changes)


def cases(grid: Grid, networks: list[str], width: int) -> list[tuple[Case, bool]]:
    """(case, whether its batch is only where the doubling starts), in order of value."""
    largest: dict[int, int] = {}
    for image, batch in grid.shapes:
        if batch != "max":
            largest[image] = max(largest.get(image, 0), batch)
    start = {image: 2 * largest.get(image, 32) for image, _ in grid.shapes}
    return [
        (Case(depth, network, image, start[image] if batch == "max" else batch, dtype, width), batch == "max")
        for dtype in grid.dtypes
        for image, batch in grid.shapes
        for depth in grid.depths
        for network in networks
    ]


class Bench:
    """folder: a temporary one, for the parameters that all sides start from."""

    def __init__(self, torch_python: str, grid: Grid, folder: pathlib.Path):
        self.torch_python, self.grid, self.folder = torch_python, grid, folder
        self._writer: turns.Worker | None = None

    def run(self, cases: list[tuple[Case, bool]], peaks: dict[str, Any], done: dict[str, Any]) -> Any:
        """Yields a record per case that is not done; the caller adds it to `done`."""
        for case, doubling in cases:
            names = self._sides(case)
            while names:
                described = {"case": dataclasses.asdict(case), "device": peaks["device"]}
                key = speed_table.key(described)
                if key not in done or not self._is_whole(done[key], names, peaks["versions"]):
                    record = described | {"peak": peaks[case.dtype], "cores": os.cpu_count()}
                    record |= {"turns": self.grid.turns, "steps": self.grid.steps}
                    yield record | self._measured(case, names, together=not doubling)
                record = done[key]
                if not doubling or case.batch >= LARGEST:
                    break
                names = [name for name in names if record["sides"].get(name, {}).get("seconds")]
                case = dataclasses.replace(case, batch=2 * case.batch)

    def _is_whole(self, record: dict[str, Any], names: list[str], versions: dict[str, str]) -> bool:
        """Whether a record has all these sides, of the versions that are here."""

        def same(name: str) -> bool:
            expected = versions["nfjax" if name == "nfjax" else "eager"]
            return record["sides"][name].get("version", expected) == expected

        return all(name in record["sides"] and same(name) for name in names)

    def _measured(self, case: Case, names: list[str], together: bool) -> dict[str, Any]:
        """{"together", "sides"}; where one of the sides fails beside the others, each has the device to itself."""
        if together:
            sides = self.together(case, names)
            if not any("error" in side for side in sides.values()):
                return {"together": True, "sides": sides}
        return {"together": False, "sides": self.alone(case, names)}

    def together(self, case: Case, names: list[str]) -> dict[str, Any]:
        """All sides alive at once, each in its turn."""
        sides: dict[str, Any] = {}
        workers: dict[str, turns.Worker] = {}
        for name in names:
            sides[name] = {}
            workers[name] = self._start(name)
            self._guarded(sides[name], lambda name=name: sides[name].update(self._prepare(workers[name], case)))
        for _ in range(self.grid.turns):
            for name, worker in workers.items():
                self._guarded(sides[name], lambda name=name, worker=worker: self._turn(sides[name], worker))
        for name, worker in workers.items():
            self._guarded(sides[name], lambda name=name, worker=worker: sides[name].update(worker.ask("report")))
            worker.close()
        return sides

    def alone(self, case: Case, names: list[str]) -> dict[str, Any]:
        """One side at a time, with the device to itself, in two rounds of new processes."""
        sides: dict[str, Any] = {name: {} for name in names}
        for _ in range(2):
            for name, side in sides.items():
                if "error" in side:
                    continue
                worker = self._start(name, alone=True)

                def measure(side: dict = side, worker: turns.Worker = worker) -> None:
                    side.update(self._prepare(worker, case))
                    for _ in range(-(-self.grid.turns // 2)):
                        self._turn(side, worker)
                    side.update(worker.ask("report"))

                self._guarded(side, measure)
                worker.close()
        return sides

    def peaks(self) -> dict[str, Any]:
        """By dtype, what the device can do, the best of the libraries; their versions, by side.

        Leaves timm out where it is not installed. Ends the program where one of the libraries sees an accelerator that
        the other does not.
        """
        names = ["nfjax", *(["eager"] if set(self.grid.sides) - {"nfjax"} else [])]
        workers = {name: self._start(name) for name in names}
        try:
            machines = {name: worker.ask("machine") for name, worker in workers.items()}
            if "eager" in workers and not workers["eager"].ask("has_timm"):
                print("PyTorch's interpreter has no timm, which is left out", file=sys.stderr)
                ours = tuple(name for name in self.grid.sides if not name.startswith("timm"))
                self.grid = dataclasses.replace(self.grid, sides=ours)
        except turns.LostError as error:
            sys.exit(f"{' or '.join(names)} does not start: {error}")
        turns.check_same_device(machines)
        result: dict[str, Any] = {"device": machines["nfjax"]["device"]}
        result["versions"] = {name: machine["version"] for name, machine in machines.items()}
        for dtype in self.grid.dtypes:
            answers = [worker.ask("hardest", dtype=dtype) for worker in workers.values()]
            result[dtype] = {name: max(answer[name] for answer in answers) for name in ("matmul", "conv")}
        for worker in workers.values():
            worker.close()
        return result

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _sides(self, case: Case) -> list[str]:
        has_timm = (case.depth, case.network, case.image) in TIMM and case.width == 64
        return [name for name in self.grid.sides if has_timm or not name.startswith("timm")]

    def _start(self, name: str, alone: bool = False) -> turns.Worker:
        if name == "nfjax":
            # Memory is taken when it is needed: the other sides live on the same device.
            memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if alone else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            return turns.Worker([sys.executable, str(HERE / "speed_nfjax.py")], turns.ONE_DEVICE | memory)
        *timm, mode = name.split()
        return turns.Worker([self.torch_python, str(HERE / "speed_torch.py"), mode, *timm], turns.ONE_DEVICE)

    def _prepare(self, worker: turns.Worker, case: Case) -> dict[str, Any]:
        parameters = self.folder / f"{case.depth}_{case.network}_{case.width}_{case.image}.npz"
        request = case.request() | {"parameters": str(parameters), "warm": self.grid.warm}
        if not parameters.exists():
            if self._writer is None:  # on the processor, so that it takes no memory from those that are measured
                self._writer = turns.Worker([sys.executable, str(HERE / "speed_nfjax.py")], {"JAX_PLATFORMS": "cpu"})
            self._writer.ask("write", **request)
        return worker.ask("prepare", **request)

    def _turn(self, side: dict[str, Any], worker: turns.Worker) -> None:
        side.setdefault("seconds", []).append(worker.ask("take", n=self.grid.steps) / self.grid.steps)

    def _guarded(self, side: dict[str, Any], action: Any) -> None:
        """A side that has failed is left alone."""
        if "error" in side:
            return
        try:
            action()
        except turns.LostError as error:
            side["error"] = str(error)
            side.pop("seconds", None)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _batches(text: str) -> list[int | str]:
    return [part if part == "max" else int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
