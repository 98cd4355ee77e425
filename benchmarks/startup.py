"""From an empty process to the first training step: import, building, compiling; with and without kept programs.

    python benchmarks/startup.py --torch-python=PYTHON --out=results

Every line is a fresh process that imports, builds a network with its optimizer, and takes a step on eight images of
32x32. nfjax keeps compiled programs in the user's cache directory, as its commands do (nfjax.compilation); here that is
a temporary one, empty at first. PyTorch is eager, and compiled with an empty and with a filled cache of its own. Writes
OUT/startup.jsonl, a line per network, way and device, and OUT/startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import turns

HERE = pathlib.Path(__file__).parent
NETWORKS = {"ResNet-18 ConvShort": (18, "convshort"), "ResNet-50 ConvShort": (50, "convshort")}
# way -> (whether it is PyTorch, what the child is told, whether it keeps what it compiles)
WAYS = {
    "nfjax, nothing kept": (False, "off", False),
    "nfjax, first run": (False, "on", True),
    "nfjax, next run": (False, "on", True),
    "PyTorch eager": (True, "eager", False),
    "torch.compile, first run": (True, "compile", True),
    "torch.compile, next run": (True, "compile", True),
}
NFJAX = """
import json, sys, time
start = time.perf_counter()
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from nfjax import compilation, resnet
from nfjax.training import optimizers as optim, step as steps, loop as train
marks = [time.perf_counter()]
depth, residual, keep = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "on"
if keep:
    compilation.keep()
model = resnet.PreActResNet(depth, residual, rngs=nnx.Rngs(0))
network, params, batch_stats = steps.as_functions(model)
optimizer = optim.sgd(lambda step: jnp.float32(0.01), 0.9)
state = steps.initial_state(params, batch_stats, optimizer)
jax.block_until_ready(state)
marks.append(time.perf_counter())
step = steps.make_train_step(network, optimizer, lambda key, x: x.astype(jnp.float32) / 255, jax.random.key(0), 0.0)
batch = {"image": np.zeros((8, 32, 32, 3), np.uint8), "label": np.zeros(8, np.int32), "mask": np.ones(8, np.float32)}
state, sums = jax.jit(step, donate_argnums=0)(state, batch | {"step": np.int32(0)})
jax.block_until_ready(state)
marks.append(time.perf_counter())
parts, device = [b - a for a, b in zip([start, *marks], marks)], jax.devices()[0].device_kind
print(json.dumps([*parts, f"jax {jax.__version__}", device]))
"""
TORCH = """
import json, sys, time
start = time.perf_counter()
import torch
from torch_networks import PreActResNet, initialize
marks = [time.perf_counter()]
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_float32_matmul_precision("high")  # TF32, as nfjax
model = PreActResNet(int(sys.argv[1]), sys.argv[2], False, 10, False)
initialize(model)
model = model.to(device, memory_format=torch.channels_last).train()
optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
marks.append(time.perf_counter())
def loss(x, y):
    return torch.nn.functional.cross_entropy(model(x.float() / 255), y)
loss = loss if sys.argv[3] == "eager" else torch.compile(loss)
x = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device).contiguous(memory_format=torch.channels_last)
loss(x, torch.zeros(8, dtype=torch.long, device=device)).backward()
optimizer.step()
if device == "cuda":
    torch.cuda.synchronize()
marks.append(time.perf_counter())
named = torch.cuda.get_device_name() if device == "cuda" else "cpu"
print(json.dumps([b - a for a, b in zip([start, *marks], marks)] + [f"PyTorch {torch.__version__}", named]))
"""


def measure(torch_python: str, network: str, way: str, cache: str) -> dict:
    """One fresh process."""
    is_torch, told, keeps = WAYS[way]
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "NFJAX_CACHE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment |= {"XDG_CACHE_HOME": cache} | turns.ONE_DEVICE
    if is_torch:
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
    interpreter = torch_python if is_torch else sys.executable
    command = [interpreter, "-c", TORCH if is_torch else NFJAX, *map(str, NETWORKS[network]), told]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"{interpreter} cannot be started: {error.strerror}")
    whole = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    *parts, version, device = json.loads(done.stdout.splitlines()[-1])
    files = [path for path in pathlib.Path(cache).rglob("*") if path.is_file()] if keeps else []
    return {
        "network": network,
        "way": way,
        **dict(zip(("import", "build", "first_step"), (round(part, 3) for part in parts), strict=True)),
        "process": round(whole, 3),
        "kept_mib": round(sum(path.stat().st_size for path in files) / 2**20, 2),
        "version": version,
        "device": device,
        "cores": os.cpu_count(),
    }


def table(records: list[dict]) -> str:
    """One for each device."""
    devices = dict.fromkeys((r["device"], r["cores"]) for r in records)
    parts = [_of_device([r for r in records if (r["device"], r["cores"]) == device]) for device in devices]
    if all(device == "cpu" for device, _ in devices):
        parts.append("On an accelerator: not measured yet, by `python benchmarks/startup.py --torch-python=PYTHON`.")
    return "\n\n".join(parts) + "\n"


def _of_device(records: list[dict]) -> str:
    lines = ["| network | | import | building | first step | whole process | kept, MiB |", "|---|---|" + "---:|" * 5]
    for r in records:
        times = " | ".join(f"{r[name]:.1f}" for name in ("import", "build", "first_step", "process"))
        lines.append(f"| {r['network']} | {r['way']} | {times} | {r['kept_mib'] or ''} |")
    versions = ", ".join(dict.fromkeys(r["version"] for r in records))
    cores = f"{records[0]['cores']} CPU cores"
    device = cores if records[0]["device"] == "cpu" else f"{records[0]['device']}, {cores}"
    note = f"Seconds in a fresh process, 8 images of 32x32, float32; {device}, {versions}. One process each, in turn."
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="an interpreter that has PyTorch")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    networks, ways = arguments.networks.split(","), arguments.ways.split(";")
    for flag, given, known in (("networks", networks, NETWORKS), ("ways", ways, WAYS)):
        if unknown := [one for one in given if one not in known]:
            parser.error(f"--{flag}: unknown {', '.join(unknown)}; expected some of {'; '.join(known)}")
    records = []
    for network in networks:
        with tempfile.TemporaryDirectory() as nfjax_cache, tempfile.TemporaryDirectory() as torch_cache:
            for way in ways:
                cache = torch_cache if WAYS[way][0] else nfjax_cache
                records.append(measure(arguments.torch_python, network, way, cache))
                print(json.dumps(records[-1]), flush=True)
    platforms = {WAYS[r["way"]][0]: {"platform": r["device"]} for r in records}
    turns.check_same_device({"PyTorch" if torch else "nfjax": machine for torch, machine in platforms.items()})
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "startup.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {json.dumps([r[name] for name in ("device", "cores", "network", "way")]): r for r in [*before, *records]}
    path.write_text("".join(json.dumps(record) + "\n" for record in known.values()))
    (out / "startup.md").write_text(table([*known.values()]))
    print(table([*known.values()]))


if __name__ == "__main__":
    main()
