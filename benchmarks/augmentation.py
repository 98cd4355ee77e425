"""RandAugment: does it give torchvision's pixels, and what does it cost?

    python benchmarks/augmentation.py --torch-python=PYTHON --images=DIR --out=results

PYTHON is an interpreter that has PyTorch and torchvision (augmentation_torch.py runs there); neither is a dependency of
nfjax. DIR holds images in any folders below it; without it, pieces of scikit-learn's two photographs serve.

Agreement: every operation at all 31 bins with both signs, and the whole policy with the same operations and signs
forced on both sides. Cost: milliseconds per batch of this library's form; of the obvious one, a `switch` over fourteen
operations in a `vmap`, of which every image runs all; of the same switch in a loop over the images; and beside a
training step of a ResNet-18. Runs on whatever device JAX finds. Writes OUT/augmentation.jsonl and OUT/augmentation.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from nfjax import augment, resnet
from nfjax.augment import _color, _geometry, _operations
from nfjax.training import optimizers as optim
from nfjax.training import step as steps

BINS = 31
FILL = (124, 116, 104)
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
SIZES = ((32, 32), (61, 47))  # height, width, for the agreement
BATCHES = ((128, 32), (64, 224))  # images and their side, for the cost
CHUNK = 4096  # images per call in the agreement


# ---------------------------------------------------------------- images


def load_images(folder: str | None, count: int) -> list[Image.Image]:
    """`count` images, evenly from the folder."""
    if folder is None:
        from sklearn.datasets import load_sample_images

        photographs = [Image.fromarray(image) for image in load_sample_images().images]
        random = np.random.default_rng(0)
        corners = random.integers((0, 0), (640 - 96, 427 - 96), (count, 2)).tolist()
        return [photographs[i % 2].crop((x, y, x + 96, y + 96)) for i, (x, y) in enumerate(corners)]
    suffixes = (".jpg", ".jpeg", ".png")
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in suffixes)
    if len(paths) < count:
        raise SystemExit(f"--images={folder} holds {len(paths)} images: {count} are needed (--count)")
    return [Image.open(paths[i * len(paths) // count], formats=("JPEG", "PNG")).convert("RGB") for i in range(count)]


def resized(images: list[Image.Image], height: int, width: int) -> np.ndarray:
    """uint8 [B, H, W, 3]"""
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images])


# ---------------------------------------------------------------- agreement


class Torchvision:
    """The worker in the other interpreter."""

    def __init__(self, python: str, folder: str):
        script = str(pathlib.Path(__file__).with_name("augmentation_torch.py"))
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = pathlib.Path(folder)

    def ask(self, what: str, images: np.ndarray, **request: object) -> tuple[object, dict[str, str]]:
        """The answer, an array or a number, and the versions."""
        files = {name: str(self.folder / f"{name}.npy") for name in ("input", "output")}
        np.save(files["input"], images)
        self.process.stdin.write(json.dumps({"what": what, **files, **request}) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        answer = reply["answer"]
        return (np.load(files["output"]) if answer is None else answer), reply["versions"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    difference = np.abs(ours.astype(np.int16) - theirs)
    return {
        "values": difference.size,
        "different": int((difference > 0).sum()),
        "max_difference": int(difference.max()),
    }


def agreement_of_operation(torchvision: Torchvision, name: str, images: np.ndarray, interpolation: str) -> dict:
    theirs, _ = torchvision.ask("operation", images, name=name, interpolation=interpolation, fill=FILL)
    position = list(augment.OPERATIONS).index(name)
    settings = [(i, sign) for i in range(BINS) for sign in (1, -1)]
    bins, signs = (np.repeat(column, len(images)).astype(np.int32) for column in zip(*settings, strict=True))
    apply = jitted_apply(interpolation)
    ours = []
    for start in range(0, len(bins), CHUNK):
        # The last chunk is as long as the others, so that all are one program.
        at = np.minimum(np.arange(start, start + CHUNK), len(bins) - 1)
        chosen = np.full(CHUNK, position, np.int32)
        ours.append(np.asarray(apply(images[at % len(images)], chosen, bins[at], signs[at]))[: len(bins) - start])
    return {"operation": name, **compare(np.concatenate(ours), theirs)}


@functools.cache
def jitted_apply(interpolation: str) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(augment.apply, fill=FILL, interpolation=interpolation))


def agreement_of_policy(torchvision: Torchvision, images: np.ndarray, interpolation: str) -> dict:
    names, total = list(augment.OPERATIONS), {"values": 0, "different": 0, "max_difference": 0}
    for seed, magnitude in enumerate((5, 9, 15, 30)):
        key = jax.random.key(seed)
        ours = jax.jit(
            functools.partial(augment.rand_augment, magnitude=magnitude, fill=FILL, interpolation=interpolation)
        )(key, images)
        chosen, signs = (np.asarray(x).tolist() for x in augment.choose(key, len(images), 2))
        theirs, _ = torchvision.ask(
            "policy", images, operations=[[names[i] for i in row] for row in chosen], signs=signs,
            magnitude=magnitude, interpolation=interpolation, fill=FILL,
        )  # fmt: skip
        found = compare(np.asarray(ours), theirs)
        total = {
            "values": total["values"] + found["values"],
            "different": total["different"] + found["different"],
            "max_difference": max(total["max_difference"], found["max_difference"]),
        }
    return {"operation": "policy", **total}


# ---------------------------------------------------------------- other forms of the same function


def branch(name: str, size: int, magnitude: int, interpolation: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(image, is_negative) -> image`: one operation and nothing else, on uint8 [H, W, 3]."""
    table = _operations.numbers_of_changes((augment.OPERATIONS[name],), BINS, size, size, interpolation)
    table = {key: values[0, magnitude] for key, values in table.items()}

    def alone(image: jax.Array, is_negative: jax.Array) -> jax.Array:
        images, number = image[None], {key: jnp.asarray(values)[is_negative][None] for key, values in table.items()}
        factor = number["factor"][:, None, None, None]
        if name in GEOMETRIC:
            images = _geometry.resample(images, number["matrix"], (0, 0, 0), interpolation)
        elif name == "autocontrast":
            images = _color.apply_table(images, _color.autocontrast_table(_color.histogram(images)))
        elif name == "equalize":
            images = _color.apply_table(images, _color.equalize_table(_color.histogram(images)))
        elif name in ("posterize", "solarize"):
            images = _color.posterize_solarize(images, number["mask"], number["threshold"])
        elif name == "brightness":
            images = _color.blend(jnp.zeros_like(images, jnp.int32), images, factor)
        elif name == "contrast":
            images = _color.blend(_color.mean_grey(images)[:, None, None, None], images, factor)
        elif name == "color":
            images = _color.blend(_color.grey(images)[..., None], images, factor)
        elif name == "sharpness":
            images = _color.blend(_color.smooth(images), images, factor)
        return images[0]

    return alone


def by_switch(loop: Callable, size: int, interpolation: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`rand_augment` with a `switch` for each image. loop: `(function, arrays) -> array` over the images."""
    branches = [branch(name, size, 9, interpolation) for name in augment.OPERATIONS]

    def function(key: jax.Array, images: jax.Array) -> jax.Array:
        chosen, signs = augment.choose(key, images.shape[0], 2)
        for i in range(2):
            is_negative = (signs[i] < 0).astype(jnp.int32)
            images = loop(lambda x: jax.lax.switch(x[1], branches, x[0], x[2]), (images, chosen[i], is_negative))
        return images

    return function


# ---------------------------------------------------------------- cost


def crop_flip_normalize(key: jax.Array, images: jax.Array) -> jax.Array:
    keys = jax.random.split(key)
    images = augment.random_flip(keys[1], augment.random_crop(keys[0], images, 4))
    return augment.normalize(images, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


def forms(size: int) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    found = {"crop, flip, normalise": crop_flip_normalize}
    for interpolation in _geometry.INTERPOLATIONS:
        found |= {
            f"rand_augment, {interpolation}": functools.partial(augment.rand_augment, interpolation=interpolation),
            f"vmap(switch), {interpolation}": by_switch(lambda f, x: jax.vmap(f)(x), size, interpolation),
            f"lax.map(switch), {interpolation}": by_switch(jax.lax.map, size, interpolation),
        }
    found["histogram by scatter"] = lambda key, images: _color.histogram_by_scatter(images)
    # On a CPU the other way takes many seconds for the larger images.
    if jax.default_backend() != "cpu" or size < 64:
        found["histogram by comparison"] = lambda key, images: _color.histogram_by_comparison(images)
    return found


def milliseconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians; in turn, so that whatever else the machine does falls on all."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def cost(images: np.ndarray, repeats: int) -> dict[str, float]:
    key, on_device = jax.random.key(0), jnp.asarray(images)
    compiled = {name: jax.jit(form) for name, form in forms(images.shape[1]).items()}
    expected = compiled["rand_augment, nearest"](key, on_device)
    for name in ("vmap(switch), nearest", "lax.map(switch), nearest"):
        np.testing.assert_array_equal(compiled[name](key, on_device), expected)
    return milliseconds({name: functools.partial(f, key, on_device) for name, f in compiled.items()}, repeats)


def training_step(images: np.ndarray, repeats: int, dtype: str) -> float:
    """Milliseconds of a step of a ResNet-18, width 64, on 32x32 images, with crop, flip and normalization."""
    from flax import nnx

    model = resnet.PreActResNet(18, "convshort", dtype=jnp.dtype(dtype), num_classes=10, rngs=nnx.Rngs(0))
    network, params, batch_stats = steps.as_functions(model)
    optimizer = optim.sgd(optim.cosine_by_step(0.01, 1000), 0.9, 5e-4)
    state = steps.initial_state(params, batch_stats, optimizer)
    step = jax.jit(
        steps.make_train_step(network, optimizer, crop_flip_normalize, jax.random.key(0), 0.0), donate_argnums=0
    )
    batch = {
        "image": jnp.asarray(images),
        "label": jnp.arange(len(images), dtype=jnp.int32) % 10,
        "mask": jnp.ones(len(images), jnp.float32),
    }
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch | {"step": jnp.int32(i)}))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


# ---------------------------------------------------------------- report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="an interpreter that has PyTorch and torchvision; without it, cost only")
    parser.add_argument("--images", help="a folder of images")
    parser.add_argument("--count", type=int, default=300, help="images in the agreement")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--step-repeats", type=int, default=3, help="training steps that are timed")
    parser.add_argument("--dtype", default="float32", help="of the training step")
    parser.add_argument("--out", default="results")
    arguments = parser.parse_args()
    images = load_images(arguments.images, max(arguments.count, 128))
    records = [{"kind": "setting", "jax": jax.__version__, "device": device(), "count": arguments.count}]
    if arguments.torch_python:
        with tempfile.TemporaryDirectory() as folder:
            records += agreement(Torchvision(arguments.torch_python, folder), images[: arguments.count])
    for batch, side in BATCHES:
        for form, value in cost(resized(images[:batch], side, side), arguments.repeats).items():
            records.append({"kind": "cost", "batch": batch, "side": side, "form": form, "ms": value})
            print(records[-1], flush=True)
    small = resized(images[:128], 32, 32)
    step = training_step(small, arguments.step_repeats, arguments.dtype)
    records.append(
        {"kind": "cost", "batch": 128, "side": 32, "form": "training step", "dtype": arguments.dtype, "ms": step}
    )
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "augmentation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "augmentation.md").write_text(report(records))
    print((out / "augmentation.md").read_text())


def agreement(torchvision: Torchvision, images: list[Image.Image]) -> list[dict]:
    records = []
    for height, width in SIZES:
        pixels = resized(images, height, width)
        for interpolation in _geometry.INTERPOLATIONS:
            names = augment.OPERATIONS if interpolation == "nearest" else GEOMETRIC
            found = [agreement_of_operation(torchvision, name, pixels, interpolation) for name in names]
            found.append(agreement_of_policy(torchvision, pixels, interpolation))
            for record in found:
                where = {"height": height, "width": width, "interpolation": interpolation}
                records.append({"kind": "agreement", **where, **record})
                print(records[-1], flush=True)
    for batch, side in BATCHES:
        pixels = resized(images[:batch], side, side)
        for interpolation in _geometry.INTERPOLATIONS:
            value, versions = torchvision.ask("timing", pixels, interpolation=interpolation)
            form = f"torchvision, {interpolation}"
            records.append({"kind": "cost", "batch": batch, "side": side, "form": form, "ms": value, **versions})
    torchvision.close()
    return records


def device() -> str:
    kind = jax.devices()[0].device_kind
    return f"{os.cpu_count()} CPU cores" if kind == "cpu" else kind


def report(records: list[dict]) -> str:
    setting = records[0]
    note = f"{setting['device']}, jax {setting['jax']}"
    parts = []
    compared = [record for record in records if record["kind"] == "agreement"]
    if compared:
        parts += agreement_table(compared)
        versions = next(record for record in records if "torchvision" in record)
        sizes = " and ".join(f"{height}x{width}" for height, width in SIZES)
        parts += [
            "",
            f"Levels (0 to 255) from torchvision {versions['torchvision']} with Pillow {versions['Pillow']} and from "
            f"nfjax, over {setting['count']} images at {sizes}, all 31 bins and both signs. The policy draws 2 "
            "operations per image, at magnitudes 5, 9, 15 and 30; the second can widen the difference of one level "
            f"that a bilinear rotation leaves. Interpolation concerns the first five. {note}.",
            "",
        ]
    parts += cost_table([record for record in records if record["kind"] == "cost"])
    parts += ["", f"Milliseconds per batch, uint8 in and out, medians, the forms of nfjax in turn; {note}.", ""]
    return "\n".join(parts)


def agreement_table(records: list[dict]) -> list[str]:
    lines = [
        "| operation | equal, nearest | greatest difference | equal, bilinear | greatest difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in (*GEOMETRIC, *(name for name in augment.OPERATIONS if name not in GEOMETRIC), "policy"):
        cells = []
        for interpolation in _geometry.INTERPOLATIONS:
            found = [r for r in records if r["operation"] == name and r["interpolation"] == interpolation]
            if not found:
                cells += ["", ""]
                continue
            values, different = (sum(record[key] for record in found) for key in ("values", "different"))
            share = "all" if different == 0 else f"{1 - different / values:.4%}"
            cells += [f"{share} of {values / 1e6:.1f} M", str(max(record["max_difference"] for record in found))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cost_table(records: list[dict]) -> list[str]:
    step = next(record["ms"] for record in records if record["form"] == "training step")
    values = {(record["form"], record["side"]): record["ms"] for record in records}
    titles = " | ".join(f"{batch} of {side}x{side}" for batch, side in BATCHES)
    lines = [f"| 2 operations at magnitude 9 | {titles} | share of a training step |", "|---|---:|---:|---:|"]
    for form in dict.fromkeys(record["form"] for record in records):
        cells = [f"{values[form, side]:,.2f}" if (form, side) in values else "" for _, side in BATCHES]
        share = "" if "histogram" in form or "torchvision" in form else f"{values[form, 32] / step:.2%}"
        dtype = next((f" ({r['dtype']})" for r in records if r["form"] == form and "dtype" in r), "")
        name = f"ResNet-18{dtype}, {form}" if form == "training step" else form
        lines.append(f"| {name} | {' | '.join(cells)} | {share} |")
    return lines


if __name__ == "__main__":
    main()
