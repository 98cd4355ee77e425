"""Measures cases, both sides in turn, in processes of their own.

    python -m benchmarks CASE [OPTIONS]
    python -m benchmarks [OPTIONS OF ALL] CASE [OPTIONS] CASE [OPTIONS] ...
    python -m benchmarks tables

Every record is added to OUT/CASE.jsonl as soon as it is measured, with the machine and its load, and OUT/CASE.md is the
table of all records that are there; one that measures the same as an older one takes its place, unless --missing asks
only for what this machine has not measured with these versions. With --minutes, nothing is started that would not end
in time if it took as long as the longest so far, and what has not ended in time after all is given up. `tables` writes
the tables of results/ and what the README shows of them anew, and measures nothing.

The libraries that nfjax is compared with are no dependencies of it: --torch-python and --tf-python are interpreters
that have them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from benchmarks import tables, turns
from benchmarks.tables import Record
from nfjax import preemption, storage

CASES = (
    "speed", "epoch", "startup", "building", "checkpoints", "signal_propagation", "input_pipeline", "augmentation",
    "finetune", "predict", "formats",
)  # fmt: skip
DEPTHS = (10, 18, 34, 50, 101, 152)  # of the networks that every side has
INTERPRETERS = {"torch": "--torch-python", "torchvision": "--torch-python", "tf": "--tf-python"}
SAMPLE = 0.5  # seconds over which the load is measured


@dataclasses.dataclass(frozen=True)
class Side:
    """One of those that are compared.

    Attributes:
        title: as the tables show it.
        module: of `benchmarks.sides`.
        options: of what that is asked to measure.
    """

    title: str
    module: str
    options: tuple[str, ...] = ()


class Case(Protocol):
    """What each file of `benchmarks.cases` offers; its docstring is its help."""

    SIDES: dict[str, Side]
    ROUNDS: int  # how often each side has its turn, unless --rounds tells

    def options(self, parser: argparse.ArgumentParser) -> None:
        """Adds what can be chosen."""

    def measure(self, bench: Bench) -> Iterator[Record]:
        """Yields the records, each as soon as it is measured."""

    def key(self, record: Record) -> list[Any]:
        """What a record is a measurement of."""

    def table(self, records: list[Record]) -> str:
        """Markdown."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a case is given.

    Attributes:
        arguments: its command line, with `sides` and `rounds` filled in.
        done: the records that are there already, by what they measure.
        deadline: by `time.monotonic`, until which the sides may answer; None for no end.
    """

    arguments: argparse.Namespace
    done: dict[str, Record] = dataclasses.field(default_factory=dict)
    deadline: float | None = None

    def has(self, key: list[Any]) -> bool:
        """Whether only what is missing is asked for, and this is not: there is a record of it, from this machine with
        these versions, and with all sides that are asked for now.
        """
        record = self.done.get(json.dumps(key))
        if record is None or not self.arguments.missing:
            return False
        wanted = set(self.arguments.sides)
        return record["machine"] == machine() and wanted <= set(record.get("sides", wanted))

    def start(
        self, side: Side, measure: str, environment: dict[str, str | None] | None = None, pause: float | None = None
    ) -> turns.Worker:
        """A process of the side's interpreter, which serves what it has for `measure`."""
        flag = INTERPRETERS.get(side.module)
        python = sys.executable if flag is None else getattr(self.arguments, flag[2:].replace("-", "_"))
        command = [python, "-m", "benchmarks.turns", side.module, measure, *side.options]
        return turns.Worker(command, turns.ONE_DEVICE | (environment or {}), pause, self.deadline)


def main(words: Sequence[str] | None = None) -> None:
    common, calls = split(sys.argv[1:] if words is None else words)
    if not calls:
        parser("python -m benchmarks", f"{__doc__}\ncases: {', '.join(CASES)}; CASE --help tells more").parse_args(
            common
        )
        sys.exit(f"which case? {', '.join(CASES)}, or tables")
    begin = time.monotonic()
    for name, own in calls:
        if name == "tables":
            write_tables()
            continue
        case = importlib.import_module(f"benchmarks.cases.{name}")
        try:
            run(name, case, parse(name, case, [*common, *own]), begin)
        except turns.LostError as error:
            sys.exit(f"{name}: {error}")
        except KeyboardInterrupt:
            print(f"\n{name}: interrupted; the same command goes on", file=sys.stderr)
            sys.exit(preemption.INTERRUPTED)


def split(words: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(what stands before the first case, each case with what stands behind it)."""
    common: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for word in words:
        if word in (*CASES, "tables"):
            calls.append((word, []))
        else:
            (calls[-1][1] if calls else common).append(word)
    return common, calls


def parser(program: str, text: str) -> argparse.ArgumentParser:
    """With the options that all cases have."""
    made = argparse.ArgumentParser(program, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--torch-python", help="an interpreter that has PyTorch, and torchvision where a case needs it")
    made.add_argument("--tf-python", help="an interpreter that has TensorFlow")
    made.add_argument("--sides", help="those that are measured, separated by commas; by default all")
    made.add_argument("--rounds", type=int, help="how often each side has its turn")
    made.add_argument("--minutes", type=float, help="in which all cases of the command have to end")
    made.add_argument("--missing", action="store_true", help="measure only what is not there yet")
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    return made


def some_of(known: Sequence[Any], kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """A type for argparse: values of `known`, separated by commas."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if unknown := [str(value) for value in values if value not in known]:
            raise argparse.ArgumentTypeError(f"{','.join(unknown)}: expected some of {', '.join(map(str, known))}")
        return values

    return parse


def parse(name: str, case: Case, words: Sequence[str]) -> argparse.Namespace:
    """Raises SystemExit for a side that is not known, or whose interpreter is not given."""
    made = parser(f"python -m benchmarks {name}", case.__doc__)
    case.options(made)
    arguments = made.parse_args(words)
    chosen = arguments.sides.split(",") if arguments.sides else list(case.SIDES)
    if unknown := [side for side in chosen if side not in case.SIDES]:
        made.error(f"--sides={','.join(unknown)}: expected some of {', '.join(case.SIDES)}")
    for side in chosen:
        flag = INTERPRETERS.get(case.SIDES[side].module)
        if flag is not None and getattr(arguments, flag[2:].replace("-", "_")) is None:
            others = [other for other in chosen if INTERPRETERS.get(case.SIDES[other].module) != flag]
            made.error(f"{case.SIDES[side].title} needs {flag}; without it: --sides={','.join(others)}")
    arguments.sides, arguments.rounds = chosen, arguments.rounds or case.ROUNDS
    return arguments


def run(name: str, case: Case, arguments: argparse.Namespace, begin: float) -> None:
    """Measures a case; `begin` is when the minutes started to count, by `time.monotonic`."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}.jsonl"
    records = {json.dumps(case.key(record)): record for record in read(path)}
    deadline = None if arguments.minutes is None else begin + 60 * arguments.minutes
    with contextlib.closing(case.measure(Bench(arguments, records, deadline))) as measured:
        longest = 0.0
        while deadline is None or time.monotonic() + longest < deadline:
            load, start = cores_in_use(), time.monotonic()
            try:
                record = next(measured, None)
            except turns.TimeOverError:
                print(
                    f"{name}: what was begun last did not end in time and is given up: it takes more --minutes",
                    flush=True,
                )
                break
            if record is None:
                break
            longest = max(longest, time.monotonic() - start)
            record |= {"date": f"{datetime.date.today()}", "machine": machine(), "load": [load, cores_in_use()]}
            records[json.dumps(case.key(record))] = record
            storage.write_text(path, "".join(json.dumps(record) + "\n" for record in records.values()))
            storage.write_text(path.with_suffix(".md"), case.table([*records.values()]))
            sides = record.get("sides", {})
            failed = [f"; {side} failed: {found['error']}" for side, found in sides.items() if "error" in found]
            print(f"{name}: measured {', '.join(map(str, case.key(record)))}{''.join(failed)}", flush=True)
        else:
            print(f"{name}: the time is over; the same command goes on", flush=True)
    if records:
        print(case.table([*records.values()]))


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file, none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_tables(root: pathlib.Path = turns.ROOT) -> None:
    """results/CASE.md of all records that are there, and what the README shows of results/."""
    for name in CASES:
        if records := read(root / "results" / f"{name}.jsonl"):
            case = importlib.import_module(f"benchmarks.cases.{name}")
            (root / "results" / f"{name}.md").write_text(case.table(records))
    tables.update(root / "README.md", root)


def machine() -> Record:
    """What measures here; the versions that a record was measured with are those of its sides."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if "model name" in line), processor)
    versions = {name: importlib.metadata.version(name) for name in ("nfjax", "jax", "flax", "numpy")}
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version()} | versions


def cores_in_use() -> float | None:
    """How many cores were at work in half a second, in which nothing here was; None where /proc does not tell."""

    def seconds() -> float:
        with open("/proc/stat") as file:
            user, nice, system, _, _, interrupts, soft, stolen = map(int, file.readline().split()[1:9])
        return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")

    try:
        before = seconds()
        time.sleep(SAMPLE)
        return round((seconds() - before) / SAMPLE, 2)
    except (OSError, ValueError):
        return None
