"""The model card of an export: README.md, as the Hugging Face Hub and people read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax

from nfjax.data.loading.skips import printable
from nfjax.inference.predictor import Origin, Predictor
from nfjax.training import deployment

FILE = "README.md"
MOST_NAMES = 50  # of classes that are listed
# What of the run's settings is told, of those that there are.
TOLD = (
    "seed", "batch_size", "epochs", "data.source", "data.share", "data.balance_classes", "model.rescale", "optim.name",
    "optim.arguments", "optim.learning_rate", "optim.warmup_epochs", "optim.schedule", "optim.layer_decay",
    "optim.rate_by_pattern", "optim.freeze", "optim.momentum", "optim.weight_decay", "optim.clip_norm",
    "optim.adaptive_clip", "optim.label_smoothing", "optim.class_weights", "optim.ema_decay", "augment.crop_padding",
    "augment.flip", "augment.resized_crop_scale", "augment.rand_operations", "augment.mixup_alpha",
    "augment.cutmix_alpha", "augment.erasing_probability",
)  # fmt: skip
OPENED = {
    "safetensors": """\
With nfjax (`pip install "nfjax[train]"`):

```python
import nfjax

predictor = nfjax.load("FOLDER")
print(predictor("image.jpg").top(5))
```""",
    "stablehlo": """\
`model.stablehlo` needs JAX alone (and the package flatbuffers). It takes uint8 images [batch, SIDE, SIDE, 3] and
returns probabilities [batch, CLASSES]; the weights and the normalization are inside. It runs on {platforms}. Versions
of JAX that are up to six months newer than the one that wrote it, VERSION, can read it; the weights in
model.safetensors last longer.

```python
import pathlib
import jax
import numpy

program = jax.export.deserialize(bytearray(pathlib.Path("FOLDER/model.stablehlo").read_bytes()))
probabilities = program.call(numpy.zeros((1, SIDE, SIDE, 3), "uint8"))
```""",
    "onnx": """\
`model.onnx` takes and returns the same, in onnxruntime:

```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
images = numpy.zeros((1, SIDE, SIDE, 3), "uint8")
(probabilities,) = session.run(None, {session.get_inputs()[0].name: images})
```""",
}


@dataclasses.dataclass(frozen=True)
class Compared:
    """An exported file beside its network.

    Attributes:
        format: Its name in `nfjax.inference.FORMATS`.
        file: Its name.
        size: In bytes.
        difference: The largest one of a probability, on `images` photographs.
        bound: On it.
        images: How many they were.
    """

    format: str
    file: str
    size: int
    difference: float
    bound: float
    images: int


def text(
    predictor: Predictor,
    results: Sequence[Compared],
    licence: str | None,
    platforms: Sequence[str],
    data_name: str | None = None,
) -> str:
    """The card.

    Args:
        predictor: The network.
        results: Of its files.
        licence: Of the weights.
        platforms: On which the program of JAX runs.
        data_name: What it was trained and scored on; None where that is not known.
    """
    of_what = f" of {_plain(data_name)}" if data_name else ""
    parts = [_head(licence), "# " + _title(predictor), _about(predictor)]
    parts += ["## Accuracy", _accuracy(predictor.origin, of_what), "## How to use it", _pixels(predictor)]
    parts += [_opened(predictor, result.format, platforms) for result in results]
    parts += ["## Files", _files(results), "## Classes", _classes(predictor.class_names)]
    if predictor.origin is not None:
        parts += ["## How it was trained", _training(predictor.origin, of_what)]
    return (
        "\n\n".join([*parts, "## What it is not good for", _limits(predictor), "## License", _licence(licence)]) + "\n"
    )


def _head(licence: str | None) -> str:
    told = json.dumps(licence) if licence else "unknown"  # JSON's texts are YAML's
    return f"---\nlibrary_name: nfjax\npipeline_tag: image-classification\nlicense: {told}\n---"


def _title(predictor: Predictor) -> str:
    return f"{_plain(predictor.architecture.name)}, {len(predictor.class_names)} classes"


def _about(predictor: Predictor) -> str:
    made, side = predictor.architecture, predictor.preprocessing.image_size
    settings = [_code(f"{name}={value}") for name, value in made.arguments.items() if value is not None]
    count = sum(leaf.size for leaf in jax.tree.leaves(predictor.params))
    return (
        f"A network for images of {side}x{side} pixels with {count:,} parameters, which computes in {made.dtype}"
        f"{': ' + ', '.join(settings) if settings else ''}. "
        f"{'Trained and exported' if predictor.origin else 'Exported'} by nfjax."
    )


def _accuracy(origin: Origin | None, of_what: str) -> str:
    if origin is None or origin.accuracy is None:
        return "Not known: it was not scored on test images when these weights were saved."
    weights = "the average of the weights at" if origin.ema else "the weights of"
    return (
        f"{origin.accuracy:.2%} of n = {origin.test_images:,} test images{of_what}, for {weights} step "
        f"{origin.step:,}. The step may have been chosen for its accuracy on these very images, which flatters it a "
        "little."
    )


def _pixels(predictor: Predictor) -> str:
    made = predictor.preprocessing
    turned = ", turned as EXIF says" if made.exif_orientation else ", as it is stored, whatever EXIF says"
    return (
        f"An image is read as RGB{turned}; its short side is resized to {made.resize} pixels (bilinear, antialiased), "
        f"and the middle {made.image_size}x{made.image_size} of it is what the network takes, in uint8. Inside, "
        f"it becomes (pixels / 255 - mean) / std with mean {list(made.mean)} and std {list(made.std)}."
    )


def _opened(predictor: Predictor, name: str, platforms: Sequence[str]) -> str:
    filled = OPENED.get(name, f"`{name}`: see the documentation of nfjax.")
    for word, value in {
        "SIDE": str(predictor.preprocessing.image_size),
        "CLASSES": str(len(predictor.class_names)),
        "VERSION": jax.__version__,
        "{platforms}": ", ".join(platforms),
    }.items():
        filled = filled.replace(word, value)
    return filled


def _files(results: Sequence[Compared]) -> str:
    rows = [
        f"| `{result.file}` | {result.size:,} | {result.difference:.1e} | {result.bound:.0e} |" for result in results
    ]
    return "\n".join(
        [
            "Each was read again and compared with the trained network on parts of two photographs: the largest "
            "difference of a probability, and what was allowed.",
            "",
            "| file | bytes | difference | allowed |",
            "|---|---:|---:|---:|",
            *rows,
        ]
    )


def _classes(names: Sequence[str]) -> str:
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(_plain(name) for name in names[:MOST_NAMES]) + more


def _training(origin: Origin, of_what: str) -> str:
    flat = dict(_flat(origin.settings))
    off = (None, 0.0, False, "")
    told = [name for name in TOLD if name in flat and (flat[name] not in off or name == "seed")]
    rows = [f"| {name} | {_plain(flat[name])} |" for name in told]
    return "\n".join(
        [
            f"On {origin.training_images:,} images{of_what}, for {origin.step:,} steps.{_beginning(flat)}",
            "",
            "| setting | |",
            "|---|---|",
            *rows,
        ]
    )


def _beginning(settings: dict[str, Any]) -> str:
    if not (source := settings.get("init_from")):
        return ""
    return (
        f" It began with the weights of {_plain(deployment.source_name(str(source)))}: their license, and that of the "
        "images on which they were trained, may bind these weights, too."
    )


def _limits(predictor: Predictor) -> str:
    return (
        f"- Images of anything else than its {len(predictor.class_names)} classes: it always names one of them, often "
        "with a high probability.\n"
        "- Images that look unlike those it was trained on, by camera, light, crop, or time: the accuracy above says "
        "nothing of them.\n"
        "- Its probabilities were not calibrated: 90 % does not mean right in nine of ten cases.\n"
        "- It was not examined for bias, nor for resistance to images made to deceive it. Decisions about people, "
        "health or safety need more than this."
    )


def _licence(licence: str | None) -> str:
    if licence:
        return _plain(licence)
    return "Not stated. Ask whoever gave you these weights; the license of the training images may restrict them, too."


def _flat(settings: dict[str, Any], above: str = "") -> Any:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _code(text: str) -> str:
    """A text as code, which Markdown shows as it is, but for the mark that would end it."""
    return f"`{printable(text).replace('`', chr(39))}`"


def _plain(value: Any) -> str:
    """A text in which Markdown and HTML mean nothing."""
    shown = printable(str(value))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~$" else c for c in shown)
