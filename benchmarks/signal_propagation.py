"""Curves of figure 2, measured by nfjax and by PyTorch eager, in turn.

    python benchmarks/signal_propagation.py --torch-python=PYTHON --out=results

PYTHON is an interpreter that has PyTorch (signal_propagation_torch.py runs there); it is not a dependency of nfjax.
One curve is everything that one line of the figure takes: five seeds, each with new parameters drawn and standardized,
new noise, a forward pass with the statistics of every block and of its residual branch, and a backward pass with those
of the gradient. Both processes live through the whole run and take turns; what nfjax compiles on the way is part of its
time. PyTorch computes in its default memory format and in the faster one, channels last. Writes
OUT/signal_propagation.jsonl and OUT/signal_propagation.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time

CURVES = [
    ("identity", None, "he_fan_in"),
    ("identity", None, "he_fan_out"),
    ("identity", "batch", "he_fan_in"),
    ("identity", "batch", "he_fan_out"),
    ("idshort", None, "he_fan_out"),
    ("learnscalar", None, "he_fan_out"),
    ("convshort", None, "he_fan_out"),
    ("idshort", None, "brock"),
    ("learnscalar", None, "brock"),
    ("convshort", None, "brock"),
]
SHAPE = (32, 32, 32, 3)


def work() -> None:
    """A worker: a curve on each line of the standard input, its seconds and ratios on each line of the output."""
    from flax import nnx

    from nfjax import resnet, spp

    for line in sys.stdin:
        depth, rule, norm, init, seeds = json.loads(line)
        start = time.perf_counter()
        profile = spp.propagate_seeds(
            lambda seed, network=(depth, rule, norm, init): resnet.PreActResNet(*network, rngs=nnx.Rngs(seed)),
            spp.noise(SHAPE),
            seeds=seeds,
        )
        seconds = time.perf_counter() - start
        ratios = [float(v[0] / v[-1]) for v in (profile.forward_var, profile.backward_var)]
        print(json.dumps([seconds, *ratios, _peak(), f"jax {importlib.metadata.version('jax')}"]), flush=True)


def _peak() -> float:
    """The process' largest memory so far, in GiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Curves of figure 2 by nfjax and by PyTorch eager, in turn.")
    parser.add_argument("--torch-python", required=True, help="an interpreter that has PyTorch")
    parser.add_argument("--depths", default="50,101")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    torch_script = str(pathlib.Path(__file__).with_name("signal_propagation_torch.py"))
    commands = {
        "nfjax": [sys.executable, __file__, "--work"],
        "torch": [arguments.torch_python, torch_script, "contiguous"],
        "torch_channels_last": [arguments.torch_python, torch_script, "channels_last"],
    }
    workers = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    records = []
    for depth in map(int, arguments.depths.split(",")):
        for rule, norm, init in CURVES:
            record = {"depth": depth, "residual": rule, "norm": norm, "init": init, "seeds": arguments.seeds}
            for name, worker in workers.items():
                worker.stdin.write(json.dumps([depth, rule, norm, init, arguments.seeds]) + "\n")
                worker.stdin.flush()
                seconds, forward, backward, peak, version = json.loads(worker.stdout.readline())
                record[name] = {
                    "seconds": round(seconds, 2), "forward_ratio": forward, "backward_ratio": backward,
                    "peak_gib": round(peak, 2), "version": version,
                }  # fmt: skip
            print(json.dumps(record), flush=True)
            records.append(record)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "signal_propagation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "signal_propagation.md").write_text(table(records))


def table(records: list[dict]) -> str:
    lines = [
        "| curve | nfjax | PyTorch | PyTorch, channels last | nfjax / PyTorch | nfjax / channels last |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    names = ("nfjax", "torch", "torch_channels_last")
    totals = dict.fromkeys(names, 0.0)
    for record in records:
        seconds = [record[name]["seconds"] for name in names]
        totals = {name: totals[name] + value for name, value in zip(names, seconds, strict=True)}
        norm = " with batch norm" if record["norm"] else ""
        lines.append(_row(f"ResNet-{record['depth']} {record['residual']}{norm}, {record['init']}", seconds))
    lines.append(_row("all", list(totals.values())))
    ours, theirs = (records[0][name]["version"] for name in ("nfjax", "torch"))
    note = (
        f"Seconds for a curve of {records[0]['seeds']} seeds, 32x32x32x3, {os.cpu_count()} CPU cores, {ours}, "
        f"PyTorch {theirs} eager; in turn, one run. The first curve of a network includes nfjax's compilation."
    )
    return "\n".join([*lines, "", note, ""])


def _row(name: str, seconds: list[float]) -> str:
    ours, theirs, last = seconds
    return f"| {name} | {ours:.1f} | {theirs:.1f} | {last:.1f} | {ours / theirs:.2f} | {ours / last:.2f} |"


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
