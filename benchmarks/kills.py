"""Kills training runs at random moments, starts them again until they complete, compares them with runs never killed.

    python benchmarks/kills.py --kills=20 --out=results

Each run is `python -m nfjax.main` as a user starts it: with its data in memory and streamed from the disk, in one
process and in two. SIGKILL comes at a moment that is drawn uniformly over the time of an uninterrupted run, and as
often at one that is aimed at: during start-up, while a checkpoint is written, during an evaluation. Of two processes
either both are killed, or one, and the other has to end by itself. Where a run completes before all kills are used up,
another one is started in a new workdir. Linux only: it finds leftover processes in /proc. Writes OUT/kills.jsonl and
OUT/kills.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from nfjax import checkpoint, distributed

ROOT = pathlib.Path(__file__).parent.parent
MARK = "NFJAX_KILLS"  # an environment variable that processes inherit: those of one start are found by it
AIMS = ("any", "saving", "any", "start-up", "any", "evaluation")
# Seconds for which a process is waited for whose peer was killed: it may be waiting for the peer to arrive, or for its
# heartbeat.
PATIENCE = distributed.START + distributed.HEARTBEAT + 60
ORPHANED = 30  # seconds after which a process that a killed one has started counts as left over
HUNG = 1800  # seconds after which a start that was not killed counts as hung
TIMES = ("images_per_second", "data_wait")  # what differs between any two runs
UNFINISHED = re.compile(r"\.orbax-checkpoint-tmp")
TELLING = re.compile(r"nfjax: |F\d{4} |Fatal ")  # lines that say why a process has ended
WHOLE = ("_CHECKPOINT_METADATA", "metrics/metrics", "default/_METADATA", "default/manifest.ocdbt")  # of a checkpoint


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


# ---------------------------------------------------------------- what can be seen of a run from outside


def listing(workdir: pathlib.Path) -> set[str]:
    """Names in checkpoints/."""
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(workdir / checkpoint.FOLDER))
    return set()


def finished(workdir: pathlib.Path) -> list[int]:
    """The steps of which there is a whole checkpoint, ascending."""
    folder = workdir / checkpoint.FOLDER
    names = [name for name in listing(workdir) if name.isdigit()]
    return sorted(int(name) for name in names if all((folder / name / part).exists() for part in WHOLE))


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


# ---------------------------------------------------------------- a run that is never killed


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
    return Uninterrupted(workdir, total, start_up, middle["evaluation"], middle["saving"], len(times["saving"]), ends)


def epoch_ends(workdir: pathlib.Path) -> set[int]:
    """Steps at which the epochs of the run end, as far as the config and the data tell."""
    config = json.loads((workdir / "config.json").read_text())
    size = json.loads((workdir / "data.json").read_text())["train_images"]
    return {-(-epoch * size // config["batch_size"]) for epoch in range(1, config["epochs"] + 1)}


# ---------------------------------------------------------------- runs that are killed


def aims(kills: int, rng: random.Random) -> list[str]:
    """What each kill is aimed at, in random order."""
    chosen = list(itertools.islice(itertools.cycle(AIMS), kills))
    rng.shuffle(chosen)
    return chosen


def reached(start: Start, aim: str, whole: Uninterrupted, rng: random.Random) -> bool:
    """Returns True at the moment that is aimed at, or False when the run completes before."""
    share, due = rng.random(), None
    if aim in ("any", "start-up"):
        due = start.begin + share * (whole.total if aim == "any" else whole.start_up)
        which = 1
    else:
        number = whole.saves if aim == "saving" else len(whole.epoch_ends)
        which = rng.randint(1, max(1, number // 4))
    saves, evaluated = Saves(start.log.workdir), set()
    while not start.ended():
        now = time.monotonic()
        if due is None and aim == "saving" and saves.began():
            which -= 1
            due = now + share * whole.saving if not which else None
        if due is None and aim == "evaluation":
            step = start.log.last_evaluated(whole.epoch_ends)
            if step is not None and step not in evaluated:
                evaluated.add(step)
                due = now + share * whole.evaluation if len(evaluated) == which else None
        if due is not None and now >= due:
            return True
        time.sleep(0.002 if due is None else min(0.02, due - now))
    return False


def seen_at_kill(start: Start, whole: Uninterrupted) -> list[str]:
    """What the kill has hit, as the files tell: one of "start-up", "training", "evaluation", then "saving" where a
    checkpoint is unfinished and "deleting" where one is half gone."""
    last = start.log.last()
    if last is None or last["step"] <= start.resumed():
        return ["start-up"]
    under_way = start.log.last_evaluated(whole.epoch_ends) is not None
    names = listing(start.log.workdir)
    half_gone = {name for name in names if name.isdigit()} - set(map(str, finished(start.log.workdir)))
    parts = ["evaluation" if under_way else "training"]
    parts += ["saving"] if any(UNFINISHED.search(name) for name in names) else []
    return parts + (["deleting"] if half_gone else [])


def kill(start: Start, setting: Setting, whole: Uninterrupted, rng: random.Random) -> dict[str, Any]:
    """Kills the start, or one of its processes and waits for the other; tells what was hit."""
    everyone = list(range(setting.processes))
    chosen = everyone if setting.processes == 1 or rng.random() < 0.5 else [rng.choice(everyone)]
    rng.shuffle(chosen)
    after = time.monotonic() - start.begin
    start.kill(chosen)
    record = {"after": round(after, 3), "hit": seen_at_kill(start, whole), "killed": sorted(chosen)}
    others = [start.processes[i] for i in everyone if i not in chosen]
    begin = time.monotonic()
    for process in others:
        try:
            record["other_code"] = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            record["other_code"] = None
        record["other_seconds"] = round(time.monotonic() - begin, 2)
        output = start.outputs[start.processes.index(process)].read_text()
        record["other_said"] = [line[:200] for line in output.splitlines() if TELLING.match(line)]
    return record


def killed_until_complete(
    setting: Setting, workdir: pathlib.Path, environment: dict[str, str], pending: list[str], whole: Uninterrupted,
    rng: random.Random,
) -> dict[str, Any]:  # fmt: skip
    """One run, killed at what `pending` holds, from which that is taken, and started again until it completes."""
    told: dict[str, Any] = {"kills": [], "starts": 0, "trained": 0, "orphans": 0, "orphan_seconds": 0.0, "fell_back": 0}
    saved = 0
    complete = False
    while not complete:
        with started(setting, workdir, environment) as start:
            told["starts"] += 1
            if pending and reached(start, pending[0], whole, rng):
                told["kills"].append({"aim": pending.pop(0)} | kill(start, setting, whole, rng))
            else:
                while not start.ended():
                    time.sleep(0.02)
                complete = True
            seconds, left = start.orphans()
            told["orphans"] += left
            told["orphan_seconds"] = round(max(told["orphan_seconds"], seconds), 3)
            told["trained"] += max(0, start.newest() - start.resumed())
            if start.log.taken_over() and start.resumed() < saved:
                told["fell_back"] += 1
            saved = max([saved, *finished(workdir)])
    return told


# ---------------------------------------------------------------- comparisons


def state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by default of the last one."""
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    try:
        tree = checkpoints.restore_untyped(checkpoints.steps()[-1] if step is None else step)
    finally:
        checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def logged(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, line by line, without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in TIMES} for line in lines]


def differences(ours: pathlib.Path, theirs: pathlib.Path) -> list[str]:
    """What is not equal bit for bit: of the metrics, of every checkpoint that both have, of the steps that are kept."""
    found = []
    a, b = logged(ours), logged(theirs)
    places = [(record["kind"], record["step"]) for record in a]
    if len(set(places)) != len(places):
        found.append("steps logged twice: " + ", ".join(str(x) for x in set(places) if places.count(x) > 1))
    if a != b:
        which = next((y for x, y in itertools.zip_longest(a, b) if x != y), None)
        found.append(f"metrics.jsonl: {len(a)} and {len(b)} records, the first that differs: {which}")
    if finished(ours) != finished(theirs):
        found.append(f"checkpoints kept: {finished(ours)} and {finished(theirs)}")
    for step in sorted(set(finished(ours)) & set(finished(theirs))):
        a, b = state(ours, step), state(theirs, step)
        if a.keys() != b.keys():
            found.append(f"checkpoint {step}: other arrays")
        names = [name for name in a.keys() & b.keys() if not same(a[name], b[name])]
        if names:
            found.append(f"checkpoint {step}: {len(names)} of {len(a)} arrays, such as {sorted(names)[0]}")
    return found


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def distance(ours: pathlib.Path, theirs: pathlib.Path) -> dict[str, float]:
    """The largest relative differences: of a loss in the first epoch, of any loss, and of a number of the final state
    to the largest of its array.
    """
    first, losses, numbers = [0.0], [0.0], [0.0]
    for a, b in zip(logged(ours), logged(theirs), strict=True):
        losses += [abs(a[name] - b[name]) / b[name] for name in a if name.endswith("loss")]
        first += losses[1:] if a["kind"] == "epoch" and a["epoch"] == 1 else []
    a, b = state(ours), state(theirs)
    for name, x in b.items():
        if name.startswith("['state']") and np.issubdtype(x.dtype, np.floating) and x.size and x.any():
            numbers.append(float(np.abs(a[name] - x).max() / np.abs(x).max()))
    return {"losses_of_first_epoch": float(max(first)), "losses": float(max(losses)), "state": max(numbers)}


def leftover_files(ours: pathlib.Path, theirs: pathlib.Path) -> list[str]:
    """What lies in the workdir and in checkpoints/ and not in those of the other run; each start has its own events."""

    def names(workdir: pathlib.Path) -> set[str]:
        top = {name for name in os.listdir(workdir) if not name.startswith("events.")}
        return top | {f"{checkpoint.FOLDER}/{name}" for name in listing(workdir)}

    return sorted(names(ours) - names(theirs))


def examine(
    setting: Setting,
    folder: pathlib.Path,
    wanted: list[str],
    rng: random.Random,
    environment: dict[str, str],
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Trains `setting` below `folder` without a kill, and with as many kills as `wanted` has aims; compares.

    Raises LostError where a run does not go on.
    """
    whole = uninterrupted(setting, folder / "whole", environment)
    tell(f"{setting.name}: {whole.total:.1f} s uninterrupted, of which {whole.start_up:.1f} s start-up")
    pending, runs, found, leftover = list(wanted), [], [], []
    while pending:
        workdir = folder / f"killed {len(runs)}"
        runs.append(killed_until_complete(setting, workdir, environment, pending, whole, rng))
        found += differences(workdir, whole.workdir)
        leftover += leftover_files(workdir, whole.workdir)
        hits = ", ".join(f"{'+'.join(x['hit'])} after {x['after']:.1f} s" for x in runs[-1]["kills"])
        tell(f"  run {len(runs)}: {runs[-1]['starts']} starts; killed in {hits or 'no moment'}")
        for text in found:
            tell(f"  DIFFERS {text}")
    kills = [x for run in runs for x in run["kills"]]
    steps = max(whole.epoch_ends)
    return {
        "setting": setting.name,
        "processes": setting.processes,
        "epochs": setting.epochs,
        "steps": steps,
        "seconds": {
            "total": round(whole.total, 2),
            "start_up": round(whole.start_up, 2),
            "evaluation": round(whole.evaluation, 3),
            "saving": round(whole.saving, 3),
        },
        "runs": len(runs),
        "starts": sum(run["starts"] for run in runs),
        "hits": dict(collections.Counter(part for x in kills for part in x["hit"])),
        "repeated_steps": sum(run["trained"] - steps for run in runs),
        "fell_back": sum(run["fell_back"] for run in runs),
        "differences": found,
        "leftover_processes": sum(run["orphans"] for run in runs),
        "orphans_ended_within_seconds": max(run["orphan_seconds"] for run in runs),
        "leftover_files": leftover,
        "kills": kills,
    }


# ---------------------------------------------------------------- the benchmark

EPOCHS = {"memory": 32, "streamed": 20, "memory2": 10, "streamed2": 10}


def row(record: dict[str, Any]) -> str:
    hits = record["hits"]
    kills = ", ".join(f"{hits.get(x, 0)}" for x in ("start-up", "training", "evaluation"))
    halves = f"{hits.get('saving', 0)} / {hits.get('deleting', 0)}"
    equal = "bit for bit" if not record["differences"] else f"{len(record['differences'])} differences"
    others = [x for x in record["kills"] if "other_seconds" in x]
    codes = collections.Counter(x["other_code"] for x in others)
    ends = ", ".join(f"{number} x {code}" for code, number in codes.items())
    alone = f"{max(x['other_seconds'] for x in others):.1f} s, with {ends}" if others else "-"
    return (
        f"| {record['setting']} | {record['seconds']['total']:.0f} s, {record['steps']} steps "
        f"| {len(record['kills'])} ({kills}) | {halves} | {record['starts']} / {record['runs']} "
        f"| {record['repeated_steps']} | {equal} | {alone} "
        f"| {record['leftover_processes']} | {len(record['leftover_files'])} |"
    )


HEAD = (
    "| run | uninterrupted | kills (start-up, training, evaluation) | with a checkpoint half written / half deleted "
    "| starts / runs completed | steps repeated | equal to the uninterrupted run "
    "| one of two killed: the other ended within, with code | leftover processes | leftover files |\n"
    "|---|---|---|---|---|---:|---|---|---:|---:|"
)
NOTE = """
Real training processes on {cores} CPU cores, killed with SIGKILL at random moments (seed {seed}), half of them drawn
uniformly over the time of an uninterrupted run, the others aimed at start-up, saving and evaluation, and started again
with the same command until they completed. Compared with a run that was never killed: every array of the checkpoints
that are kept at the end (parameters, optimizer state, sums), and every line of metrics.jsonl but for images/s and the
time that was waited for data; each step is logged once. Steps repeated: those that had been logged after the checkpoint
from which a start went on.

{facts}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each setting")
    parser.add_argument("--out", default="results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", default=",".join(EPOCHS), help="some of them, separated by commas")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)  # orbax warns of folders that are opened to be read only
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nfjax-kills-"))
    print(f"seed {arguments.seed}, runs below {folder}", flush=True)
    make_images(folder / "images")
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    wanted = {name: EPOCHS[name] for name in arguments.settings.split(",")}
    records = []
    for name, setting in settings(folder / "images", wanted).items():
        rng = random.Random(f"{arguments.seed} {name}")
        below = folder / name
        below.mkdir()
        # Fills the compile cache, so that starts are quick; and shows whether equal runs are equal at all.
        first = uninterrupted(setting, below / "first", environment).workdir
        record = examine(
            setting, below, aims(arguments.kills, rng), rng, environment, lambda text: print(text, flush=True)
        )
        record["control_differences"] = differences(first, below / "whole")
        if setting.processes > 1:
            alone = dataclasses.replace(setting, processes=1)
            one = uninterrupted(alone, below / "one process", environment).workdir
            record["distance_to_one_process"] = distance(below / "whole", one)
            devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={setting.processes}"}
            many = uninterrupted(alone, below / "one process, many devices", environment | devices).workdir
            record["differences_to_one_process_with_as_many_devices"] = differences(below / "whole", many)
        record |= {"seed": arguments.seed, "cores": os.cpu_count()}
        record["versions"] = {x: importlib.metadata.version(x) for x in ("jax", "flax", "orbax-checkpoint")}
        records.append(record)
        print(row(record), flush=True)
        write(pathlib.Path(arguments.out), records)
    if any(record["differences"] or record["leftover_processes"] for record in records):
        sys.exit(f"runs differ or leave processes behind; everything is kept in {folder}")
    shutil.rmtree(folder)


def write(out: pathlib.Path, records: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "kills.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = [
        "Starts that fell back behind the newest whole checkpoint: "
        f"{sum(record['fell_back'] for record in records) or 'none'}.",
        "Two uninterrupted runs of a setting, one of which compiles and one of which finds everything compiled, "
        + ("differ." if any(record["control_differences"] for record in records) else "are equal as well."),
    ]
    for x in records:
        if "distance_to_one_process" in x:
            far, other = x["distance_to_one_process"], x["differences_to_one_process_with_as_many_devices"]
            facts.append(
                f"Without kills, the run {x['setting']}, {'is not' if other else 'is'} bit for bit that of one process "
                f"with two devices; from that of one process with one device its losses differ by up to "
                f"{far['losses_of_first_epoch']:.0e} in the first epoch and {far['losses']:.0e} later, the final state "
                f"by {far['state']:.0e} (rounding, which training enlarges)."
            )
    note = NOTE.format(cores=records[0]["cores"], seed=records[0]["seed"], facts="\n".join(facts))
    (out / "kills.md").write_text("\n".join([HEAD, *map(row, records)]) + "\n" + note)


if __name__ == "__main__":
    main()
