"""The table of the runs that were killed, results/kills.md."""

from __future__ import annotations

import collections
from typing import Any


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


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each setting, and what was compared."""
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
    return "\n".join([HEAD, *map(row, records)]) + "\n" + note
