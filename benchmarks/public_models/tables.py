"""The records of public models as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
# What is measured of every model, by the name in the records -> in the tables.
SIDES = {
    "as it is": "as it is",
    "lsuv": "`lsuv`",
    "balance": "`balance`",
    "balance, shares held": "`balance`, shares held",
    "AnyInit": "AnyInit",
}
SHOWN = 3  # of what is named, for a person
END = "<!-- end of the overview -->"  # up to which the documentation shows it


def table(records: Sequence[Record]) -> str:
    """All of it: in short, side by side, and what was refused, word by word."""
    parts = [_overview(records), END, "", _sides(records)]
    if refused := _refused(records):
        parts.append(refused)
    if failed := _failed(records):
        parts.append(failed)
    return "\n".join(parts)


def in_short(record: Record) -> str:
    """One line for a terminal."""
    if "error" in record:
        return record["error"]
    found = [f"{name} {_worst(side, 'forward')}/{_worst(side, 'backward')}" for name, side in record["sides"].items()]
    return f"{_blocks(record)}; variances forward/backward, largest over smallest: {', '.join(found)}"


def _overview(records: Sequence[Record]) -> str:
    lines = [
        "| model | repository | API | parameters | blocks | forward: "
        + " / ".join(SIDES.values())
        + " | backward: likewise |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        head = [record["model"], record["repository"], record.get("api", ""), _thousands(record.get("parameters"))]
        if "error" in record:
            lines.append(_row([*head, "", "not measured, see below", ""]))
            continue
        ways = [
            " / ".join(_worst(record["sides"].get(name), direction) for name in SIDES)
            for direction in ("forward", "backward")
        ]
        lines.append(_row([*head, _blocks(record), *ways]))
    return "\n".join(
        [
            "Largest over smallest variance of all blocks; × where a side refuses the model or fails:",
            "",
            *lines,
            "",
        ]
    )


def _sides(records: Sequence[Record]) -> str:
    lines = [
        "| model | | forward, first → last | backward, first → last | least share of a branch | kernels' outputs | "
        "processor seconds | not reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for name, title in SIDES.items():
            side = record.get("sides", {}).get(name)
            if side is None or "error" in side:
                continue
            ways = [f"{_number(side[way]['first'])} → {_number(side[way]['last'])}" for way in ("forward", "backward")]
            kernels = f"{_number(side['kernels']['smallest'])} to {_number(side['kernels']['largest'])}"
            seconds = "" if name == "as it is" else f"{side['seconds']:.1f}"
            cells = [record["model"] if name == "as it is" else "", title, *ways, _number(side["share"]), kernels]
            lines.append(_row([*cells, seconds, _unreached(name, side)]))
    return "\n".join(
        [
            "Variance of the activations and of the gradient at the first and at the last block; the least share that "
            "a residual block adds of its output's variance; the variances of what the kernels return, which `lsuv` "
            "sets to 1:",
            "",
            *lines,
            "",
        ]
    )


def _unreached(name: str, side: Record) -> str:
    if name == "AnyInit":
        parts = [f"{len(side['notes'])} warnings"] if side.get("notes") else []
    else:
        parts = [f"{count} × {note}" for note, count in side.get("notes", {}).items()]
    if others := side.get("others"):
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        parts.append(f"left: {', '.join(f'`{path}`' for path in others[:SHOWN])}{more}")
    return "; ".join(parts)


def _refused(records: Sequence[Record]) -> str:
    found = [record for record in records if "refusal" in record.get("blocks", {})]
    lines = [f"- **{record['model']}**: {record['blocks']['refusal']}" for record in found]
    return (
        "\n".join(["Where no blocks are found by default, with the `where=` that was used then:", "", *lines, ""])
        if found
        else ""
    )


def _failed(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        if "error" in record:
            lines.append(f"- **{record['model']}**: {_one_line(record['error'])}")
        for name, side in record.get("sides", {}).items():
            if "error" in side:
                lines.append(f"- **{record['model']}**, {SIDES[name]}: {_one_line(side['error'])}")
    return "\n".join(["What failed, word by word:", "", *lines, ""]) if lines else ""


def _blocks(record: Record) -> str:
    sides = [side for side in record["sides"].values() if "blocks" in side]
    number = sides[0]["blocks"] if sides else 0
    named = ", ".join(f"`{name}`" for name in record["blocks"]["classes"])
    return f"{number} {named}{' by where=' if 'refusal' in record['blocks'] else ''}"


def _worst(side: Record | None, direction: str) -> str:
    return "–" if side is None else "×" if "error" in side else _number(side[direction]["worst"])


def _number(value: float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _thousands(value: int | None) -> str:
    return "" if value is None else f"{value / 1000:.0f} k"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())
