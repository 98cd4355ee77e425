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
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from comparing import differences, distance, leftover_files
from killing import aims, killed_until_complete
from observing import Setting, make_images, settings, uninterrupted


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
    out = pathlib.Path(arguments.out)
    path = out / "kills.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    known = {record["setting"]: record for record in map(json.loads, lines)}  # other settings keep theirs
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
        known[record["setting"]] = record
        print(row(record), flush=True)
        write(out, list(known.values()))
    if any(record["differences"] or record["leftover_processes"] for record in known.values()):
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
