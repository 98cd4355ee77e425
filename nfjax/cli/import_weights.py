"""nfjax import --weights=FILE --out=DIR [--class-names=FILE] [--image-size=224] [--mean=R,G,B] [--std=R,G,B]

Makes a model of nfjax of weights from PyTorch: timm's resnetv2 networks with batch norm, BiT, and nf_resnet. FILE is
.safetensors, or .pth, .pt or .bin, which PyTorch opens with weights only. The folder DIR is that of nfjax export:
nfjax predict takes it, and --config.init_from=DIR begins a training with it.

Weights do not tell how images were prepared. Left out, it is as timm's pages say of the kind of network, and printed.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
from typing import Any

from absl import logging

from nfjax.cli._outcome import UsageError
from nfjax.cli._parser import Parser, path, positive


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--weights", required=True, type=path, metavar="FILE", help="a state dict of PyTorch")
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="the folder, which is made")
    parser.add_argument(
        "--class-names", type=path, metavar="FILE", help="a name in each line, in the order of the logits"
    )
    parser.add_argument("--image-size", type=positive, metavar="N", help="pixels of what the network sees (224)")
    parser.add_argument("--resize", type=positive, metavar="N", help="of the short side before (8/7 of that)")
    parser.add_argument("--mean", type=_colours, metavar="R,G,B", help="of pixels in [0, 1]")
    parser.add_argument("--std", type=_colours, metavar="R,G,B", help="likewise")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the card, such as apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there already")


def run(arguments: argparse.Namespace) -> None:
    from nfjax import compilation, inference  # here: --help is answered quickly
    from nfjax.inference import torch_weights
    from nfjax.training.networks import Architecture

    logging.set_verbosity(logging.ERROR)
    compilation.keep()
    inference.check_export(arguments.out, ["safetensors"], arguments.overwrite)
    model, network = torch_weights.convert(torch_weights.read(arguments.weights))
    size = arguments.image_size or 224
    mean, std = torch_weights.COLOURS[network["residual"]]
    preprocessing = inference.Preprocessing(
        size, arguments.resize or round(size * 8 / 7), arguments.mean or mean, arguments.std or std
    )
    classes = network.pop("num_classes")
    predictor = inference.Predictor(
        model,
        preprocessing,
        _class_names(arguments.class_names, classes),
        architecture=Architecture("preact_resnet", network),
    )
    (result,) = inference.export(
        predictor, arguments.out, ["safetensors"], licence=arguments.license, overwrite=arguments.overwrite
    )
    described = ", ".join(f"{name} {value}" for name, value in network.items())
    print(f"network  {described}; {classes:,} classes, {result.size / 1e6:,.1f} MB")
    print(
        f"images   short side {preprocessing.resize}, middle {size}x{size}, mean {preprocessing.mean}, std "
        f"{preprocessing.std}{'' if arguments.mean and arguments.std else ' (as timm has it, unless you know better)'}"
    )
    print(f"{arguments.out}: README.md says what it is and how to use it")
    print(f"to fine-tune it: nfjax train --config=CONFIG --config.init_from={arguments.out} {_flags(network)}")


def _flags(network: dict[str, Any]) -> str:
    """The settings of a run with this network."""
    from nfjax.training.networks import FIELDS

    fields = {name: value for name, value in network.items() if name in FIELDS}
    others = ",".join(f"{name}='{value}'" for name, value in network.items() if name not in FIELDS)
    flags = [shlex.quote(f"--config.model.{name}={value}") for name, value in fields.items()]
    return " ".join([*flags, *([shlex.quote(f"--config.model.arguments={others}")] if others else [])])


def _class_names(file: str | None, classes: int) -> list[str]:
    if file is None:
        return [f"class {label}" for label in range(classes)]
    names = [line.strip() for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != classes:
        raise UsageError(f"--class-names={file} has {len(names):,} names: expected {classes:,}, one for each logit")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"--class-names={file} has {twice!r} more than once: expected a name for each class")
    return names


def _colours(text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected three numbers, such as 0.485,0.456,0.406") from None
    return red, green, blue
