"""Kills runs at chosen moments, starts them again until they are complete, compares them with runs never killed.

SIGKILL comes at a moment that is drawn uniformly over the time of an uninterrupted run, and as often at one that is
aimed at: during start-up, while a checkpoint is written, during an evaluation. Of two processes either both are killed,
or one, and the other has to end by itself. Where a run completes before all kills are used up, another one is started
in a new workdir.
"""

from __future__ import annotations

import collections
import itertools
import pathlib
import random
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

from chaos.comparing import differences, leftover_files
from chaos.observing import (
    UNFINISHED,
    Saves,
    Setting,
    Start,
    Uninterrupted,
    finished,
    listing,
    started,
    uninterrupted,
)  # fmt: skip

from nfjax import distributed

AIMS = ("any", "saving", "any", "start-up", "any", "evaluation")
# Seconds for which a process is waited for whose peer was killed: it may be waiting for the peer to arrive, or for its
# heartbeat.
PATIENCE = distributed.START + distributed.HEARTBEAT + 60
TELLING = re.compile(r"nfjax: |F\d{4} |Fatal ")  # lines that say why a process has ended


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
    half_gone = {name for name in names if name.isdigit()} - set(map(str, finished(start.log.workdir, whole.parts)))
    found = ["evaluation" if under_way else "training"]
    found += ["saving"] if any(UNFINISHED.search(name) for name in names) else []
    return found + (["deleting"] if half_gone else [])


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
            saved = max([saved, *finished(workdir, whole.parts)])
    return told


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
