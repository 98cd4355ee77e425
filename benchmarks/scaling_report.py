"""The records of scaling.py as Markdown."""

from __future__ import annotations

import collections
import math
from typing import Any

from scaling_plan import EPOCHS, Records
from scaling_programs import BATCHES, DEVICES, KINDS


def report(records: Records) -> str:
    of = collections.defaultdict(list)
    for record in records:
        of[record["kind"]].append(record)
    setting = of["setting"][0]
    parts = [
        f"Measured on {setting['machine']} with jax {setting['jax']}, flax {setting['flax']} and Python "
        f"{setting['python']}, without an accelerator: devices are simulated on the CPU."
    ]
    sections = {
        "bytes": bytes_section,
        "variant": variant_section,
        "tpu": tpu_section,
        "overhead": overhead_section,
        "tradeoff": tradeoff_section,
        "peak": peak_section,
        "plan": plan_section,
    }
    parts += [section(of[kind], of) for kind, section in sections.items() if of[kind]]
    return "\n\n".join(parts) + "\n"


def planned(records: Records) -> str:
    """The plan alone, for the README; empty where there is none yet."""
    of = {kind: [record for record in records if record["kind"] == kind] for kind in ("network", "plan")}
    return plan_section(of["plan"], of) + "\n" if of["plan"] else ""


def table(rows: list[dict[str, str]], words: int = 1) -> str:
    """Markdown of rows that map titles to cells; the first `words` columns are text, the others numbers."""
    titles = list(rows[0])
    rule = ["---" if column < words else "---:" for column in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, rule, *(row.values() for row in rows)])


def mega(value: float) -> str:
    return f"{value / 1e6:,.2f}"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}"


def least_and_most(values: list[float], scale: float, digits: int) -> str:
    return f"{min(values) * scale:.{digits}f} to {max(values) * scale:.{digits}f}"


CROSS = "kernels' gradients cross, times"
LESS = f"batch {BATCHES[-1]} less batch {BATCHES[0]}, bytes"


def bytes_section(records: Records, of: dict[str, Records]) -> str:
    rows = []
    at = {(r["network"], r["data"], r["feed"], r["devices"], r["batch"]): r for r in records}
    for where in dict.fromkeys((r["network"], r["data"], r["feed"]) for r in records):
        most, small = (at[(*where, DEVICES[-1], batch)] for batch in reversed(BATCHES))
        sent = {f"MB, {devices} devices": at[(*where, devices, BATCHES[-1])]["sent"] for devices in DEVICES[1:]}
        rows.append(
            {
                **dict(zip(("network", "shapes", "images on"), where, strict=True)),
                "parameters (M)": mega(most["parameters"]),
                **{title: mega(value) for title, value in sent.items()},
                f"minimum, {DEVICES[-1]} devices": mega(most["minimum"]),
                "above it, bytes": f"{most['sent'] - most['minimum']:,.0f}",
                CROSS: f"{most['crossings']:.3f}",
                LESS: f"{most['sent'] - small['sent']:,.0f}",
            }
        )
    alone = max(record["sent"] for record in records if record["devices"] == 1)
    asking = [
        f"{network}: {askers(at[network, 'CIFAR-10', 'host', DEVICES[-1], BATCHES[-1]])}"
        for network in ("ResNet-50 ConvShort", "ResNet-50 BatchNorm")
    ]
    return (
        f"**Bytes that each device sends in a training step.**\n\n{table(rows, 3)}\n\n"
        "Megabytes (10^6) by the collectives of the compiled program: float32, full width, the configs' own "
        f"augmentation with RandAugment, global batch {BATCHES[-1]}. On a ring, an all-reduce of S bytes over n "
        "devices sends 2 (n - 1) / n S, a gather half of that. The minimum is the all-reduce of 4 bytes for each "
        f"parameter. On one device: {alone:,.0f} bytes. BatchNorm has identity shortcuts. Who asks, at {DEVICES[-1]} "
        "devices. "
        f"{'. '.join(asking)}."
    )


def askers(record: dict[str, Any]) -> str:
    """The operations behind what is sent, most bytes first."""
    shown = [
        f"`{entry['purpose']}` ({entry['collectives']} {entry['kind']} of {entry['arrays']} arrays, "
        f"{entry['sent']:,.0f} bytes)"
        for entry in record["by_purpose"][:4]
    ]
    return "; ".join(shown)


def variant_rows(records: Records) -> list[dict[str, str]]:
    rows = []
    at = {(record["variant"], record["batch"]): record for record in records}
    kinds = [kind for kind in KINDS if any(kind in record["sent_by_kind"] for record in records)]
    for variant in dict.fromkeys(record["variant"] for record in records):
        small, large = (at[variant, batch] for batch in BATCHES)
        rows.append(
            {
                "step": variant,
                "MB": mega(large["sent"]),
                "of the minimum": f"{large['sent'] / large['minimum']:.2f}",
                **{kind: mega(large["sent_by_kind"].get(kind, 0)) for kind in kinds},
                CROSS: f"{large['crossings']:.2f}",
                LESS: f"{large['sent'] - small['sent']:,.0f}",
                "what grows": growing(small, large),
            }
        )
    return rows


def growing(small: dict[str, Any], large: dict[str, Any]) -> str:
    """Which operations send more in the larger batch, and by how many bytes."""
    totals = []
    for record in (small, large):
        total = collections.Counter()
        for entry in record["by_purpose"]:
            total[entry["kind"], entry["purpose"]] += entry["sent"]
        totals.append(total)
    more = [(*key, totals[1][key] - totals[0][key]) for key in totals[0] | totals[1]]
    more = sorted((item for item in more if item[2]), key=lambda item: -abs(item[2]))
    shown = [f"{kind} of `{name}` {value:+,.0f}" for kind, name, value in more[:3]]
    return "; ".join(shown) + (f"; {len(more) - 3} others" if len(more) > 3 else "")


def variant_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    return (
        f"**The same, for what else a step may do.**\n\n{table(variant_rows(records))}\n\n"
        f"{first['network']}, {first['data']} shapes, {first['devices']} devices, images from the host unless said "
        f"otherwise; megabytes that each device sends, global batch {BATCHES[-1]}. An array counts as a kernel's "
        "gradient if it is all-reduced and has two axes or more. The CPU's compiler makes no reduce-scatter, and "
        "reduces in float32 what it is given in bfloat16. Where the state is divided, the parameters are gathered "
        "before a step. In a loop is how accelerators accumulate, compiled here for the CPU."
    )


def tpu_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    memory = {record["variant"]: record["memory"] for record in records if record["batch"] == BATCHES[-1]}
    rows = [row | {"GiB per chip": gibibytes(memory[row["step"]])} for row in variant_rows(records)]
    return (
        f"**The same, from TPU's compiler.**\n\n{table(rows)}\n\n"
        f"libtpu {first['libtpu']}, compiled for {first['devices']} chips ({first['topology']}) that are not there; "
        f"nothing was run. {first['network']}, or BatchNorm, {first['data']} shapes, images from the host; megabytes "
        f"that each chip sends, global batch {BATCHES[-1]}. GiB: what a step takes, by the compiler."
    )


def overhead_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    rows = [
        {
            "simulated devices": str(record["devices"]),
            "ms per step": f"{record['ms']:.0f}",
            "of one device": f"{record['ms'] / first['ms']:.2f}",
            "least to most": least_and_most(record["all_ms"], 1, 0),
        }
        for record in records
    ]
    return (
        f"**One batch on more devices, which share {of['setting'][0]['cores']} cores.**\n\n{table(rows)}\n\n"
        f"{first['network']}, {first['data']} shapes, global batch {first['batch']}; median of {len(first['all_ms'])} "
        f"steps, in turn; load average {first['load']}. The work is the same: this is what "
        "dividing it costs, and says nothing about speed."
    )


def tradeoff_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    rows = [
        {
            "step": record["variant"],
            "GiB": gibibytes(record["memory"]),
            "of the first": f"{record['memory'] / first['memory']:.2f}",
            "s per step": f"{record['ms'] / 1e3:.2f}",
            "time of the first": f"{record['ms'] / first['ms']:.2f}",
            "least to most": least_and_most(record["all_ms"], 1e-3, 2),
        }
        for record in records
    ]
    return (
        f"**Memory against time.**\n\n{table(rows)}\n\n"
        f"{first['network']}, {first['data']} shapes, batch {first['batch']}, one device. GiB by `nfjax.footprint`; "
        f"seconds: median of {len(first['all_ms'])} steps, in turn; load average {first['load']}. "
        "On CPU the parts of a batch are unrolled."
    )


def peak_section(records: Records, of: dict[str, Records]) -> str:
    rows = [
        {
            "network": record["network"],
            "shapes": record["data"],
            "batch": str(record["batch"]),
            "GiB, told": gibibytes(record["memory"]),
            "GiB, one step": gibibytes(record["growth_1"]),
            "GiB, three steps": gibibytes(record["growth_3"]),
            "taken / told": f"{record['growth_3'] / record['memory']:.2f}",
        }
        for record in records
    ]
    return (
        f"**Memory: told before the first step, and taken.**\n\n{table(rows, 2)}\n\n"
        "Taken: growth of the process's highest resident size, from before the state is made; the step is compiled "
        "already, and the high-water mark set back (/proc/self/clear_refs). It includes what the allocator keeps and "
        "the scratch memory of the convolutions, of which the compiler does not know."
    )


def plan_section(records: Records, of: dict[str, Records]) -> str:
    first = records[0]
    at = {(record["chips"], record["input"]): record for record in records}
    inputs = {record["input"]: record["host_images_per_second_per_core"] for record in records}
    rows = []
    for chips in dict.fromkeys(record["chips"] for record in records):
        record = at[chips, first["input"]]
        rows.append(
            {
                "chips": str(chips),
                "batch": f"{chips * record['batch_per_chip']:,}",
                "link, GB/s": f"{record['link_bytes_per_second'] / 1e9:g}" if chips > 1 else "",
                "computing, ms": f"{1e3 * record['computing']:.1f}",
                "sending, ms": f"{1e3 * record['sending']:.2f}",
                "images/s": between(record, "images_per_second", ",.0f"),
                "hours": between(record, "hours", ".2f"),
                **{f"host cores, {name}": f"{math.ceil(at[chips, name]['host_cores_beside']):,}" for name in inputs},
            }
        )
    rates = " and ".join(f"{rate:,.0f} ({name})" for name, rate in inputs.items())
    return (
        f"**ImageNet, {EPOCHS} epochs: calculated, not measured.**\n\n{table(rows, 0)}\n\n"
        f"From {first['images_per_second_per_chip']:,.0f} images/s per chip: {first['source']}."
        f"{heavier(of['network'])} A ring all-reduce of {first['parameters'] / 1e6:.1f} M gradients of 4 bytes over "
        "the links assumed; where two values are given, sending comes after computing, or goes on beside it and costs "
        "nothing. Latency, evaluation and checkpoints are left out. Host cores: all together, for the greater rate, "
        f"without a reserve, at {rates} images/s per core."
    )


def between(record: dict[str, Any], name: str, form: str) -> str:
    """The value with sending after computing, and beside it."""
    behind, beside = (format(record[f"{name}_{way}"], form) for way in ("behind", "beside"))
    return behind if behind == beside else f"{behind} to {beside}"


def heavier(networks: Records) -> str:
    """What the rate of the BatchNorm network does not tell about ConvShort."""
    macs = {record["network"]: record["macs"] for record in networks if record["data"] == "ImageNet"}
    ours, theirs = (macs.get(f"ResNet-50 {rule}") for rule in ("ConvShort", "BatchNorm"))
    if ours is None or theirs is None:
        return ""
    return (
        f" ConvShort has {ours / theirs:.2f} times the multiply-accumulates of our BatchNorm network "
        f"({ours / 1e9:.2f} against {theirs / 1e9:.2f} G per image), which this rate leaves out."
    )
