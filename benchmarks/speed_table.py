"""The table of what speed.py has measured, and what it says of each goal."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

SIDES = {
    "nfjax": "nfjax",
    "eager": "PyTorch",
    "compile": "torch.compile",
    "autotune": "torch.compile, max-autotune",
    "timm eager": "timm",
    "timm compile": "timm, torch.compile",
}
CLASSES = {32: 10, 224: 1000}
COMMAND = "python benchmarks/speed.py --torch-python=PYTHON --grid=gpu"


def key(record: dict[str, Any]) -> str:
    """What a record is a measurement of."""
    return json.dumps([record["case"], record["device"]], sort_keys=True)


def rate(record: dict[str, Any], side: str) -> float | None:
    """Images per second, by the median turn; None where it was not measured."""
    seconds = record["sides"].get(side, {}).get("seconds")
    return record["case"]["batch"] / statistics.median(seconds) if seconds else None


def flops(record: dict[str, Any]) -> float | None:
    """FLOP/s of nfjax: three times those of the forward pass, which counts two per multiply-accumulate."""
    measured = rate(record, "nfjax")
    return 6 * record["sides"]["nfjax"]["macs"] * measured if measured else None


def named(case: dict[str, Any]) -> str:
    width = "" if case["width"] == 64 else f", width {case['width']}"
    return f"ResNet-{case['depth']} {case['network']}{width}"


def agreement(record: dict[str, Any]) -> str:
    """Whether all sides do the same work: the losses of the same network agree, and all begin near ln(classes) and
    fall; otherwise what is wrong.
    """
    sides = {name: side["losses"] for name, side in record["sides"].items() if side.get("losses")}
    expected, wrong = math.log(CLASSES[record["case"]["image"]]), []
    tolerance = 0.02 if record["case"]["dtype"] == "float32" else 0.05
    for name, losses in sides.items():
        if not abs(losses[0] / expected - 1) < 0.5:
            wrong.append(f"{SIDES[name]} begins at {losses[0]:.3g}, not near {expected:.3g}")
        if not losses[-1] < losses[0]:
            wrong.append(f"{SIDES[name]} does not fall: {losses[0]:.4g} to {losses[-1]:.4g}")
        if "nfjax" in sides and not name.startswith("timm"):
            pairs = list(zip(losses[:3], sides["nfjax"], strict=False))
            if not all(abs(a - b) <= tolerance * abs(b) for a, b in pairs):
                wrong.append(f"{SIDES[name]} differs from nfjax: {pairs}")
    return "; ".join(wrong)


def line(record: dict[str, Any]) -> str:
    """One record for the person who watches."""
    case = record["case"]
    rates = {name: rate(record, name) for name in record["sides"]}
    cells = [f"{SIDES[name]} {value:,.1f}" if value else f"{SIDES[name]} -" for name, value in rates.items()]
    shape = f"{case['image']} pixels, batch {case['batch']}, {case['dtype']}"
    problems = [agreement(record)] + [
        f"{name}: {side['error']}" for name, side in record["sides"].items() if "error" in side
    ]
    return " | ".join([named(case), shape, *cells, *filter(None, problems)])


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a table per device, then the goals."""
    parts = []
    for device in dict.fromkeys(record["device"] for record in records):
        parts += _of_device(device, [record for record in records if record["device"] == device])
    if all(_is_cpu(record) for record in records):
        parts += ["On an accelerator: not measured yet, by " + f"`{COMMAND}`."]
    return "\n\n".join(parts) + "\n"


def _of_device(device: str, records: list[dict[str, Any]]) -> list[str]:
    names = [name for name in SIDES if any(name in record["sides"] for record in records)]
    rivals = [name for name in names if name != "nfjax"]
    head = ["network", "pixels", "batch", "dtype", *(SIDES[name] for name in names)]
    head += [f"nfjax / {SIDES[name]}" for name in rivals] + ["GiB, " + ", ".join(SIDES[name] for name in names)]
    head += ["TFLOP/s", "of the peak"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for record in records:
        case, ours = record["case"], rate(record, "nfjax")
        rates = [rate(record, name) for name in names]
        cells = [named(case), str(case["image"]), str(case["batch"]), case["dtype"]]
        cells += [_rate(record, name) for name in names]
        cells += [f"{ours / theirs:.2f}" if ours and theirs else "" for theirs in rates[1:]]
        peaks = [record["sides"].get(name, {}).get("peak_bytes") for name in names]
        cells += [", ".join(f"{peak / 2**30:.1f}" if peak else "–" for peak in peaks)]
        achieved = flops(record)
        cells += [f"{achieved / 1e12:.3g}", f"{achieved / max(record['peak'].values()):.0%}"] if achieved else ["", ""]
        rows.append(cells)
    lines = ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    versions = [record["sides"].get(name, {}).get("version") for name in names for record in records]
    peaks = {f"{record['case']['dtype']}": max(record["peak"].values()) for record in records}
    memory = "memory of the process while training"
    if not _is_cpu(records[0]):
        memory = "memory in use while training: PyTorch's allocator tells, and of nfjax the compiled program"
    listed = ", ".join(f"{value / 1e12:.3g} TFLOP/s in {dtype}" for dtype, value in peaks.items())
    last = records[-1]
    turns = " or ".join(dict.fromkeys(f"{record['turns']} turns of {record['steps']} steps" for record in records))
    note = (
        f"Images per second of a training step on {_called(device, records)}, the median of {turns}; "
        f"{', '.join(dict.fromkeys(filter(None, versions)))}. GiB: the largest "
        f"{memory}. The peak is the best of a matrix product and a 3x3 convolution in either library, "
        f"measured in the same run: {listed}. nfjax's step also counts what was right, measures the norms of gradient "
        "and update, and keeps a state that they would spoil."
        f"{'' if _is_cpu(last) else ' Products in float32 are TF32 on both sides.'}"
    )
    wrong = [f"{named(record['case'])}: {text}" for record in records if (text := agreement(record))]
    checked = "The losses of the first three steps agree between nfjax and PyTorch, and all fall."
    return [*lines, note, "Losses: " + "; ".join(wrong) if wrong else checked, *_goals(records)]


def _rate(record: dict[str, Any], name: str) -> str:
    if name not in record["sides"]:
        return ""
    measured = rate(record, name)
    return f"{measured:,.0f}" if measured and measured >= 100 else f"{measured:,.1f}" if measured else "failed"


def _goals(records: list[dict[str, Any]]) -> list[str]:
    """What was aimed at, and what came out."""
    if _is_cpu(records[0]):
        least = [
            ours / theirs for record in records if (ours := rate(record, "nfjax")) and (theirs := rate(record, "eager"))
        ]
        if not least:
            return []
        below = [ratio for ratio in least if ratio < 1]
        missed = f"missed on {len(below)} of {len(least)}, {min(below):.2f} to {max(below):.2f}" if below else "it is"
        return [f"Aimed at: on every network at least as fast as PyTorch, channels last, not compiled; {missed}."]
    compiled = ("compile", "autotune")
    best: dict[str, dict[str, float]] = {}
    for record in records:
        case = record["case"]
        if (case["depth"], case["image"], case["dtype"], case["width"]) == (50, 224, "bfloat16", 64):
            of = best.setdefault(case["network"], {})
            for side, names in (("ours", ("nfjax",)), ("theirs", compiled)):
                of[side] = max([of.get(side, 0.0), *filter(None, (rate(record, name) for name in names))])
    ours = best.get("IdShort", {}).get("ours")
    same, batch_norm = best.get("IdShort", {}).get("theirs"), best.get("BatchNorm", {}).get("theirs")
    if not (ours and same and batch_norm):
        return []
    return [
        f"ResNet-50, 224 pixels, bfloat16, each at its best batch: nfjax IdShort {ours:,.0f} images/s. Compiled "
        f"PyTorch with batch norm {batch_norm:,.0f} ({ours / batch_norm:.2f} times, aimed at 1), without "
        f"{same:,.0f} ({ours / same:.2f} times, aimed at 1.2). The best public figure, MLPerf v4.0 on 8 H200: about "
        "7 940 a chip, with batch norm."
    ]


def _is_cpu(record: dict[str, Any]) -> bool:
    return record["device"] == "cpu"


def _called(device: str, records: list[dict[str, Any]]) -> str:
    cores = records[-1].get("cores")
    return f"{cores} CPU cores" if device == "cpu" and cores else device
