"""Weights from PyTorch: the state dicts of timm's pre-activation networks, in our networks.

    weights = torch_weights.read("resnetv2_50.safetensors")     # or .pth, opened with weights only
    model, settings = torch_weights.convert(weights)            # settings: what `resnet.PreActResNet` was called with

What network it is follows from the names and shapes: `resnetv2_18` to `resnetv2_152` (batch norm), `resnetv2_*_bit`
(BiT: group norm, standardized weights), `nf_resnet26` to `nf_resnet101` (NF-ResNet). Outputs are those of timm to
rounding. A new layout is a function and a line in `LAYOUTS`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfjax import _names, initializers, resnet
from nfjax.inference import _folder, _safetensors

SHOWN = 5  # names in a message
_IGNORED = "num_batches_tracked"  # which batch norm of PyTorch counts and does not use
_WRAPPERS = ("state_dict", "model", "model_state_dict", "params")  # under which training programs keep the weights
_RELU_GAIN = math.sqrt(initializers.gain(jax.nn.relu).channel)
# PyTorch's ReLU gain of the NF-ResNets in timm, rounded as it is there.
_TIMM_GAIN = 1.7139588594436646


# By residual rule: (mean, std) of pixels in [0, 1] that timm's pages give for weights of these networks.
COLOURS = {
    "identity": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "nf": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class BitStem(resnet.ImageNetStem):
    """As `ImageNetStem`, but max-pooling sees zeros around its input, as in BiT (Kolesnikov et al. 2020)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(self.conv(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a family of PyTorch networks calls its parameters.

    Attributes:
        mark: A parameter that it has, and the families below it in the table have not.
        block: A regular expression of a parameter in a block, with the groups stage and index.
        prefix: Of the parameters of a block, a format of the same.
        settings: Arguments of `resnet.PreActResNet` that all its networks have.
        translate: (name of the layer in ours, name of the value, PyTorch's weights below its prefix) -> its values.
    """

    mark: str
    block: str
    prefix: str
    settings: Mapping[str, Any]
    translate: Callable[[str, str, Mapping[str, np.ndarray]], np.ndarray]


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The weights in a file, by name: .safetensors, or .pth, .pt and .bin of PyTorch, opened with weights only.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, holds more than weights, or ends otherwise.
        ImportError: PyTorch, which alone reads its own format safely, is not installed.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"{file} {what}: expected a file of weights, such as resnetv2_50.safetensors")
    ending = file.suffix.lower()
    if ending == ".safetensors":
        places = _safetensors.read_places(file)
        found = _safetensors.decode(file.read_bytes(), places)
        return {
            name: value.astype(np.float32) if value.dtype.kind not in "iub" else value for name, value in found.items()
        }
    if ending not in (".pth", ".pt", ".bin", ".tar"):
        raise ValueError(f"{file}: expected a name that ends with .safetensors, .pth, .pt or .bin")
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file} is PyTorch's own format, which PyTorch alone reads safely: install it, or save the weights there "
            "as safetensors: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip, torch
        raise ValueError(
            f"{file} holds more than weights, or is damaged; it is not opened otherwise, for a pickle can run any "
            f"program. Save model.state_dict() alone ({type(error).__name__})"
        ) from error
    for name in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{file} holds no state dict: expected names with tensors, as of model.state_dict()")
    return {
        name: value.float().numpy() if value.is_floating_point() else value.numpy() for name, value in found.items()
    }


def convert(weights: Mapping[str, Any], **settings: Any) -> tuple[resnet.PreActResNet, dict[str, Any]]:
    """The network of a state dict, in evaluation mode.

    Args:
        weights: By name, arrays as PyTorch has them.
        **settings: Of `resnet.PreActResNet` that no weight tells: `dtype`, `image_size`, `remat`.

    Returns:
        The network, and the arguments of `PreActResNet` that follow from the weights, a function as
        "package.module:name".

    Raises:
        ValueError: They are of no network that is known here; the message lists what is missing, left over, or of
            another shape.
    """
    given = {name.removeprefix("module."): np.asarray(value) for name, value in weights.items()}
    given = {name: value for name, value in given.items() if not name.endswith(_IGNORED)}
    if name := _folder.not_finite(given):
        raise ValueError(f"{name} has values that are not finite: the weights are damaged")
    layout, sizes = _recognize(given)
    found = {**layout.settings, **_shape(given, layout, sizes)}
    # Nothing is drawn: every value comes from the file.
    settings |= {"init": jax.nn.initializers.zeros, "head_init": jax.nn.initializers.zeros}
    imported = {
        name: _names.imported(name, value) for name, value in found.items() if isinstance(value, str) and ":" in value
    }
    model = nnx.eval_shape(lambda: resnet.PreActResNet(**{**found, **imported}, **settings, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    flat, used, wrong = nnx.to_flat_state(state), set(), []
    values = []
    for path, leaf in flat:
        *layer, value = ("/".join(map(str, path))).rsplit("/", 1)
        prefix = _their_name(layer[0], layout, sizes)
        below = {name[len(prefix) :]: array for name, array in given.items() if name.startswith(prefix)}
        try:
            array = layout.translate(layer[0], value, _Noting(below, prefix, used))
        except KeyError as error:
            wrong.append(f"{prefix}{error.args[0]} is missing")
            continue
        if array.shape != leaf.shape:
            wrong.append(f"{prefix} has {list(array.shape)} where {layer[0]}/{value} has {list(leaf.shape)}")
            continue
        values.append((path, leaf.replace(jnp.asarray(array, leaf.dtype))))
    wrong += [f"{name} {list(given[name].shape)} is left over" for name in given if name not in used]
    if wrong:
        more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"the weights are of no network that is known here: {'; '.join(wrong[:SHOWN])}{more}")
    nnx.update(model, nnx.from_flat_state(values))
    model.eval()
    return model, found


class _Noting(dict):
    """Weights below a prefix; those that are read are noted."""

    def __init__(self, below: Mapping[str, np.ndarray], prefix: str, used: set[str]):
        super().__init__(below)
        self._prefix, self._used = prefix, used

    def __getitem__(self, name: str) -> np.ndarray:
        value = super().__getitem__(name)
        self._used.add(self._prefix + name)
        return value


# ---------------------------------------------------------------- which network it is


def _recognize(given: Mapping[str, np.ndarray]) -> tuple[Layout, tuple[int, ...]]:
    """The layout, and how many blocks each stage has."""
    for layout in LAYOUTS.values():
        blocks = collections.defaultdict(set)
        for name in given:
            if match := re.match(layout.block, name):
                blocks[int(match["stage"])].add(int(match["index"]))
        if blocks and layout.mark in given:
            sizes = tuple(len(blocks[stage]) for stage in range(len(blocks)))
            if all(sizes):
                _check_norms(given, layout, sizes)
                return layout, sizes
    shown = ", ".join(list(given)[:SHOWN]) or "nothing"
    post = (
        "; ResNets of torchvision activate behind the sum, which ours do not"
        if "layer1.0.conv1.weight" in given
        else ""
    )
    raise ValueError(f"expected the names of timm's resnetv2 or nf_resnet networks, found {shown}{post}")


def _check_norms(given: Mapping[str, np.ndarray], layout: Layout, sizes: tuple[int, ...]) -> None:
    """BiT is known by having no running statistics, and so is a batch norm that has lost them."""
    first = layout.prefix.format(stage=0, index=0)
    if layout is LAYOUTS["bit"] and f"{first}conv3.weight" not in given:
        raise ValueError(
            "norm.running_mean is missing, and the blocks are not the bottlenecks of BiT, whose norms have none: save "
            "model.state_dict(), which has what parameters alone leave out"
        )


def _shape(given: Mapping[str, np.ndarray], layout: Layout, sizes: tuple[int, ...]) -> dict[str, Any]:
    first = layout.prefix.format(stage=0, index=0)
    head = given.get("head.fc.weight")
    if head is None:
        raise ValueError("the weights have no head.fc.weight: the number of classes is unknown")
    block = "bottleneck" if f"{first}conv3.weight" in given else "basic"
    return {
        "stage_sizes": sizes,
        "block": block,
        "width": int(given["stem.conv.weight"].shape[0]),
        "num_classes": int(head.shape[0]),
    }


def _their_name(ours: str, layout: Layout, sizes: tuple[int, ...]) -> str:
    """The prefix of a layer's parameters, up to and with the last full stop."""
    named = {"stem/conv": "stem.conv.", "activation/norm": "norm.", "classifier": "head.fc."}
    if ours in named:
        return named[ours]
    _, number, *inner = ours.split("/")
    stage, index = 0, int(number)
    while index >= sizes[stage]:
        stage, index = stage + 1, index - sizes[stage]
    match inner:
        case ["activation", "norm"]:
            layer = "norm1."
        case ["branch", "activations", i, "norm"]:
            layer = f"norm{int(i) + 2}."
        case ["branch", "convolutions", i]:
            layer = f"conv{int(i) + 1}."
        case _:
            layer = "downsample.conv."
    return layout.prefix.format(stage=stage, index=index) + layer


# ---------------------------------------------------------------- how values are translated


def _kernel(weight: np.ndarray) -> np.ndarray:
    """[C', C, k, k] or [C', C] to [k, k, C, C'] or [C, C']."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _resnetv2(layer: str, value: str, theirs: Mapping[str, np.ndarray]) -> np.ndarray:
    if layer == "classifier":
        return theirs["bias"] if value == "bias" else _kernel(theirs["weight"].reshape(theirs["weight"].shape[:2]))
    if value == "kernel":
        return _kernel(theirs["weight"])
    return theirs[{"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}[value]]


def _bit(layer: str, value: str, theirs: Mapping[str, np.ndarray]) -> np.ndarray:
    """timm adds 1e-8 to the variance of a kernel that it standardizes, and ours 1e-10 to that of a tenth of it."""
    found = _resnetv2(layer, value, theirs)
    return found if value != "kernel" or layer == "classifier" else found / 10


def _nf_resnet(layer: str, value: str, theirs: Mapping[str, np.ndarray]) -> np.ndarray:
    """timm has the gain of ReLU in the kernels, where ours has it in the activations: in that before the head, too, but
    not before the stem. It adds 1e-5 to a kernel's variance, which ours gets as a part of the gain.
    """
    if layer == "classifier":
        return theirs["bias"] if value == "bias" else _kernel(theirs["weight"]) / _RELU_GAIN
    weight = theirs["weight"]
    if value == "kernel":
        return _kernel(weight)
    if value == "bias":
        return theirs["bias"]
    variance = weight.reshape(len(weight), -1).var(axis=1, dtype=np.float64)
    gain = theirs["gain"].reshape(-1) * np.sqrt(variance / (variance + 1e-5))
    return gain * (_TIMM_GAIN if layer == "stem/conv" else _TIMM_GAIN / _RELU_GAIN)


_STAGES = r"stages\.(?P<stage>\d+)\.blocks\.(?P<index>\d+)\.", "stages.{stage}.blocks.{index}."
LAYOUTS: dict[str, Layout] = {
    "resnetv2": Layout(
        "norm.running_mean", *_STAGES, {"residual": "identity", "norm": "batch", "stem": "imagenet"}, _resnetv2
    ),
    "bit": Layout(
        "norm.weight", *_STAGES, {"residual": "identity", "norm": "group", "stem": f"{__name__}:BitStem"}, _bit
    ),
    "nf_resnet": Layout(
        "stem.conv.gain",
        r"stages\.(?P<stage>\d+)\.(?P<index>\d+)\.",
        "stages.{stage}.{index}.",
        {"residual": "nf", "stem": "imagenet", "conv": "nfjax.layers:with_mean_pooled_shortcuts"},
        _nf_resnet,
    ),
}
