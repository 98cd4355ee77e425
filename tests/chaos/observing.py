"""Training runs seen from outside: processes started as a user starts them, their files, and what they leave behind."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from nfjax.runs import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
MARK = "NFJAX_CHAOS"  # an environment variable that processes inherit: those of one start are found by it
ORPHANED = 30  # seconds after which a process that a killed one has started counts as left over
HUNG = 1800  # seconds after which a start that was not killed counts as hung
UNFINISHED = re.compile(r"\.orbax-checkpoint-tmp")


class LostError(RuntimeError):
    """A run that cannot go on."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and in how many processes."""

    name: str
    processes: int
    epochs: int
    flags: tuple[str, ...]

    def commands(self, workdir: pathlib.Path) -> list[list[str]]:
        """One per process; all that differs between two starts of a run is the port."""
        command = [sys.executable, "-m", "nfjax.main", *self.flags, f"--config.epochs={self.epochs}"]
        command += [f"--workdir={workdir}"]
        if self.processes == 1:
            return [command]
        command += [f"--coordinator=localhost:{free_port()}", f"--processes={self.processes}"]
        return [[*command, f"--process={i}"] for i in range(self.processes)]


def settings(images: pathlib.Path, epochs: dict[str, int]) -> dict[str, Setting]:
    """By name. images: as `make_images` makes them. epochs: of those settings that are wanted."""
    flags = ("--config=configs/digits_convshort.py", "--config.model.width=4")
    flags += ("--config.log.every_steps=5", "--config.checkpoint.every_steps=20", "--config.checkpoint.every_epochs=1")
    streamed = (*flags, "--config.data.source=folder", f"--config.data.dir={images}", "--config.data.keep=disk")
    streamed += ("--config.data.image_size=16", "--config.augment.resized_crop_scale=(0.3,1.0)")
    known = {
        "memory": Setting("in memory, one process", 1, 0, flags),
        "streamed": Setting("streamed, one process", 1, 0, (*streamed, "--config.data.workers=2")),
        "memory2": Setting("in memory, two processes", 2, 0, flags),
        "streamed2": Setting("streamed, two processes", 2, 0, (*streamed, "--config.data.workers=1")),
    }
    return {name: dataclasses.replace(known[name], epochs=number) for name, number in epochs.items()}


def make_images(folder: pathlib.Path, train: int = 400, test: int = 80) -> None:
    """Two classes of noise in two brightnesses, as JPEG files of many sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(2):
            (folder / split / f"class {label}").mkdir(parents=True)
            for i in range(count // 2):
                noise = rng.integers(0, 160, (20 + i % 13, 24 + i % 11, 3)) + 60 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / split / f"class {label}" / f"{i:03d}.jpg")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def listing(workdir: pathlib.Path) -> set[str]:
    """Names in checkpoints/."""
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(workdir / checkpoint.FOLDER))
    return set()


def parts(folder: pathlib.Path) -> frozenset[str]:
    """The files that a checkpoint consists of, but for the names of its data."""
    found = set()
    for place, _, files in os.walk(folder):  # which may be deleted meanwhile
        inside = pathlib.Path(place).relative_to(folder)
        found |= {str(inside / ("*" if inside.name == "d" else name)) for name in files}
    return frozenset(found)


def finished(workdir: pathlib.Path, whole: frozenset[str]) -> list[int]:
    """The steps of which there is a checkpoint with all these parts, ascending."""
    folder = workdir / checkpoint.FOLDER
    steps = sorted(int(name) for name in listing(workdir) if name.isdigit())
    return [step for step in steps if parts(folder / str(step)) >= whole]


class Log:
    """metrics.jsonl of a run, as one start of it goes on with it."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir, self.path = workdir, workdir / "metrics.jsonl"
        self._before = self._file()

    def _file(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_ino
        return None

    def taken_over(self) -> bool:
        """Whether this start has come so far that it has dropped what was logged behind its checkpoint."""
        return self._file() != self._before

    def last(self) -> dict[str, Any] | None:
        """The newest record, None if this start has not yet taken the file over or there is none."""
        if not self.taken_over():
            return None
        with open(self.path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):  # cut short by a kill
                return json.loads(line)
        return None

    def last_evaluated(self, epoch_ends: set[int]) -> int | None:
        """The step at which an evaluation is under way."""
        last = self.last()
        under_way = last is not None and last["kind"] == "train" and last["step"] in epoch_ends
        return last["step"] if under_way else None


class Saves:
    """Notices that a checkpoint is being written."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._before = workdir, listing(workdir)

    def began(self) -> bool:
        """Whether one was begun since the last call."""
        before, self._before = self._before, listing(self._workdir)
        new = self._before - before
        quick = any(name.isdigit() and not any(x.startswith(f"{name}.") for x in before) for name in new)
        return quick or any(UNFINISHED.search(name) for name in new)

    def under_way(self) -> bool:
        return any(UNFINISHED.search(name) for name in listing(self._workdir))


def marked(mark: str) -> list[int]:
    """Processes that live and carry this mark."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or it is another user's
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


class Start:
    """One start of a run: its processes, each with its output in a file."""

    numbers = itertools.count()

    def __init__(self, setting: Setting, workdir: pathlib.Path, environment: dict[str, str]):
        number = next(self.numbers)
        self.mark = f"{os.getpid()}-{number}"
        self.log, self.begin = Log(workdir), time.monotonic()
        self.outputs = [workdir.parent / f"start {number}, process {i}.txt" for i in range(setting.processes)]
        self.processes = []
        environment = os.environ | {"JAX_PLATFORMS": "cpu", MARK: self.mark} | environment
        for command, output in zip(setting.commands(workdir), self.outputs, strict=True):
            with open(output, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
                    )
                )

    def ended(self) -> bool:
        """Whether it has come to its end by itself; raises LostError if not to a good one, or if it seems to hang."""
        codes = [process.poll() for process in self.processes]
        if any(codes):
            time.sleep(5)  # the others may have something to say as well
            raise LostError(f"exit codes {[process.poll() for process in self.processes]}\n{self.said()}")
        if time.monotonic() - self.begin > HUNG:
            raise LostError(f"exit codes {codes} after {HUNG} s\n{self.said()}")
        return None not in codes

    def kill(self, chosen: list[int]) -> None:
        for i in chosen:
            self.processes[i].kill()
        for i in chosen:
            self.processes[i].wait()

    def said(self) -> str:
        return "\n".join(f"{output}:\n{output.read_text()[-3000:]}" for output in self.outputs)

    def resumed(self) -> int:
        """The step from which it goes on, 0 where it does not say."""
        found = re.search(r"^resumed at step ([\d,]+)", self.outputs[0].read_text(), re.M)
        return int(found[1].replace(",", "")) if found else 0

    def newest(self) -> int:
        """The last step that it has logged, or else the one from which it goes on."""
        last = self.log.last()
        return max(self.resumed(), last["step"] if last else 0)

    def orphans(self) -> tuple[float, int]:
        """(seconds until none of its processes lived any more, how many had to be ended here)."""
        begin = time.monotonic()
        while left := marked(self.mark):
            if time.monotonic() - begin > ORPHANED:
                self.close()
                return ORPHANED, len(left)
            time.sleep(0.01)
        return time.monotonic() - begin, 0

    def close(self) -> None:
        """Ends whatever is left of it."""
        for process in self.processes:
            process.kill()
            process.wait()
        for number in marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


@contextlib.contextmanager
def started(*arguments: Any) -> Iterator[Start]:
    start = Start(*arguments)
    try:
        yield start
    finally:
        start.close()


@dataclasses.dataclass(frozen=True)
class Uninterrupted:
    """A run that was never killed, and how many seconds its parts took."""

    workdir: pathlib.Path
    total: float
    start_up: float  # until something was logged
    evaluation: float
    saving: float
    saves: int  # how many
    epoch_ends: frozenset[int]
    parts: frozenset[str]  # of its checkpoints


def uninterrupted(setting: Setting, workdir: pathlib.Path, environment: dict[str, str]) -> Uninterrupted:
    start_up, times = None, collections.defaultdict(list)
    with started(setting, workdir, environment) as start:
        saves, since = Saves(workdir), {"evaluation": None, "saving": None}
        batches = None
        while not start.ended():
            now = time.monotonic() - start.begin
            last = start.log.last()
            if start_up is None and last is not None:
                start_up, batches = now, epoch_ends(workdir)
            under_way = {"saving": saves.under_way(), "evaluation": False}
            if batches:
                under_way["evaluation"] = start.log.last_evaluated(batches) is not None
            for name, begin in since.items():
                if under_way[name] and begin is None:
                    since[name] = now
                elif not under_way[name] and begin is not None:
                    times[name].append(now - begin)
                    since[name] = None
            time.sleep(0.004)
        total = time.monotonic() - start.begin
        _, left = start.orphans()
        if left:
            raise LostError(f"{left} processes were left over by a run that has completed")
    middle = {name: statistics.median(times[name] or [0.02]) for name in since}
    ends = frozenset(epoch_ends(workdir))
    return Uninterrupted(
        workdir=workdir,
        total=total,
        start_up=start_up,
        evaluation=middle["evaluation"],
        saving=middle["saving"],
        saves=len(times["saving"]),
        epoch_ends=ends,
        parts=parts(workdir / checkpoint.FOLDER / str(max(ends))),
    )


def epoch_ends(workdir: pathlib.Path) -> set[int]:
    """Steps at which the epochs of the run end, as far as the config and the data tell."""
    config = json.loads((workdir / "config.json").read_text())
    size = json.loads((workdir / "data.json").read_text())["train_images"]
    return {-(-epoch * size // config["batch_size"]) for epoch in range(1, config["epochs"] + 1)}
