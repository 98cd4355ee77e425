"""nfjax export --model=PATH --out=DIR [--format=safetensors,stablehlo,onnx] [--license=NAME] [--to-hub=USER/NAME]

Writes a folder with a trained network in it: its weights, its settings, a model card, and the network as a program for
other environments. Each file is read again and compared with the network before it is done.
"""

from __future__ import annotations

import argparse
import pathlib

from absl import logging

from nfjax.cli._outcome import UsageError
from nfjax.cli._parser import Parser, path
from nfjax.cli.predict import add_model

USUAL = "safetensors,stablehlo"


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="the folder, which is made")
    parser.add_argument(
        "--format", default=USUAL, metavar="NAMES", help=f"safetensors, stablehlo, onnx, separated by commas ({USUAL})"
    )
    parser.add_argument("--dtype", metavar="NAME", help="to compute in, float32 or bfloat16 (that of the training)")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the card, such as cc-by-4.0")
    parser.add_argument("--data-name", metavar="NAME", help="of the run's images, for the card, such as CIFAR-10")
    parser.add_argument("--to-hub", metavar="USER/NAME", help="send it to the Hugging Face Hub, when it is written")
    parser.add_argument("--private", action="store_true", help="there, into a repository for you alone")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there already")


def run(arguments: argparse.Namespace) -> None:
    from nfjax import compilation, inference  # here: --help is answered quickly
    from nfjax.inference import hub

    logging.set_verbosity(logging.ERROR)
    compilation.keep()
    names = [name.strip() for name in arguments.format.split(",") if name.strip()]
    inference.check_export(arguments.out, names, arguments.overwrite)
    if arguments.to_hub:
        hub.check_name(arguments.to_hub)
    elif arguments.private:
        raise UsageError("--private goes with --to-hub")
    predictor = inference.load(
        arguments.model, step=arguments.step, ema=arguments.ema, dtype=arguments.dtype, trust=arguments.trust
    )
    results = inference.export(
        predictor,
        arguments.out,
        names,
        licence=arguments.license,
        data_name=arguments.data_name,
        overwrite=arguments.overwrite,
    )
    for result in results:
        print(
            f"{result.file:<18} {result.size / 1e6:9,.2f} MB   differs by {result.difference:.1e} at most "
            f"(allowed {result.bound:.0e}), on {result.images} parts of photographs"
        )
    print(f"{arguments.out}: README.md says what it is and how to use it")
    if arguments.to_hub:
        address = hub.send(pathlib.Path(arguments.out), arguments.to_hub, private=arguments.private)
        print(f'sent: nfjax predict --model={address}, or nfjax.load("{address}")')
