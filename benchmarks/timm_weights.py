"""Are the networks that `nfjax.inference.torch_weights` makes of timm's weights the same functions?

    python -m benchmarks.timm_weights --torch-python=PYTHON --out=results

PYTHON is an interpreter that has PyTorch and timm. Each network is made there with random weights and run on two
images; here its weights are converted and run on the same. `--small=tests/timm_weights.npz` writes networks of a few
thousand weights, for the tests, instead.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from benchmarks import tables
from nfjax import storage
from nfjax.inference import torch_weights

NETWORKS = (
    "resnetv2_18", "resnetv2_34", "resnetv2_50", "resnetv2_101", "resnetv2_152", "resnetv2_50x1_bit",
    "resnetv2_101x1_bit", "nf_resnet26", "nf_resnet50", "nf_resnet101",
)  # fmt: skip
SMALL = ("small_basic", "small_bottleneck", "small_bit", "small_nf")


def compare(made: dict[str, np.ndarray]) -> dict[str, float]:
    """{"parameters", "error", "seconds"}: the largest difference of a logit, by their standard deviation."""
    weights = {name.removeprefix("weights/"): value for name, value in made.items() if name.startswith("weights/")}
    begin = time.perf_counter()
    model, _ = torch_weights.convert(weights)
    seconds = time.perf_counter() - begin
    logits = nnx.jit(lambda model, images: model(images))(model, made["images"].transpose(0, 2, 3, 1))
    return {
        "parameters": sum(value.size for value in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "error": float(np.abs(np.asarray(logits) - made["logits"]).max() / made["logits"].std()),
        "seconds": seconds,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.timm_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", required=True, help="an interpreter that has PyTorch and timm")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--only", help="names of networks, separated by commas")
    parser.add_argument("--small", type=pathlib.Path, help="writes the small networks into this file instead")
    arguments = parser.parse_args(words)
    names = SMALL if arguments.small else arguments.only.split(",") if arguments.only else NETWORKS
    rows, versions, kept = [], "", {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            command = [arguments.torch_python, "-m", "benchmarks.sides.timm_weights", folder, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            versions = done.stdout.split("\n")[-2]
            with np.load(pathlib.Path(folder) / f"{name}.npz") as file:
                made = dict(file)
        found = compare(made)
        rows.append([f"`{name}`", f"{found['parameters']:,}", f"{found['error']:.1e}", f"{found['seconds']:.1f}"])
        print(*rows[-1], flush=True)
        kept |= {f"{name}/{key}": value for key, value in made.items()}
    if arguments.small:
        with storage.replacing(arguments.small) as part, open(part, "wb") as stream:
            np.savez_compressed(stream, **kept)
        return
    timm, torch = versions.split()
    lines = [
        tables.markdown(["network", "parameters", "largest difference", "seconds to convert"], rows),
        "",
        "Random weights, two images of 97 pixels, float32 on a CPU; the largest difference of a logit over the logits' "
        f"standard deviation. timm {timm}, PyTorch {torch}, jax {jax.__version__}.",
    ]
    storage.write_text(arguments.out / "timm_weights.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
