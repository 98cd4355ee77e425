"""Whether two runs are the same: their metrics line by line, their checkpoints bit by bit."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from chaos.observing import finished, listing, parts

from nfjax.runs import checkpoint

TIMES = ("images_per_second", "data_wait")  # what differs between any two runs


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
    """What is not equal bit for bit: of the metrics, of every checkpoint that both have, of the steps that are kept.

    theirs: a run that was never killed. What is left of a checkpoint that was being deleted does not count as kept.
    """
    found = []
    a, b = logged(ours), logged(theirs)
    places = [(record["kind"], record["step"]) for record in a]
    if len(set(places)) != len(places):
        found.append("steps logged twice: " + ", ".join(str(x) for x in set(places) if places.count(x) > 1))
    if a != b:
        which = next((y for x, y in itertools.zip_longest(a, b) if x != y), None)
        found.append(f"metrics.jsonl: {len(a)} and {len(b)} records, the first that differs: {which}")
    wanted = sorted(int(name) for name in listing(theirs))
    whole = parts(theirs / checkpoint.FOLDER / str(wanted[-1]))
    kept = [step for step in finished(ours, whole) if step in wanted or readable(ours, step)]
    if kept != wanted:
        found.append(f"checkpoints kept: {kept} and {wanted}")
    try:
        for step in sorted(set(kept) & set(wanted)):
            a, b = state(ours, step), state(theirs, step)
            if a.keys() != b.keys():
                found.append(f"checkpoint {step}: other arrays")
            names = [name for name in a.keys() & b.keys() if not same(a[name], b[name])]
            if names:
                found.append(f"checkpoint {step}: {len(names)} of {len(a)} arrays, such as {sorted(names)[0]}")
    except checkpoint.DamagedError as error:
        found.append(f"checkpoint {error.step}: {error.reason}")
    return found


def readable(workdir: pathlib.Path, step: int) -> bool:
    try:
        return bool(state(workdir, step))
    except Exception:  # orbax and tensorstore raise many types for missing files
        return False


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
