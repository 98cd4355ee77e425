"""nfjax export --model=PATH --out=DIR [--format=safetensors,stablehlo,onnx] [--license=NAME]

Writes a folder with a trained network in it: its weights, its settings, a model card, and the network as a program for
other environments. Each file is read again and compared with the network before it is done.
"""

from __future__ import annotations

import argparse

from absl import logging

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
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there already")


def run(arguments: argparse.Namespace) -> None:
    from nfjax import compilation, inference  # here: --help is answered quickly

    logging.set_verbosity(logging.ERROR)
    compilation.keep()
    names = [name.strip() for name in arguments.format.split(",") if name.strip()]
    inference.check_export(arguments.out, names, arguments.overwrite)
    predictor = inference.load(
        arguments.model, step=arguments.step, ema=arguments.ema, dtype=arguments.dtype, trust=arguments.trust
    )
    results = inference.export(
        predictor, arguments.out, names, licence=arguments.license, overwrite=arguments.overwrite
    )
    for result in results:
        print(
            f"{result.file:<18} {result.size / 1e6:9,.2f} MB   differs by {result.difference:.1e} at most "
            f"(allowed {result.bound:.0e}), on {result.images} parts of photographs"
        )
    print(f"{arguments.out}: README.md says what it is and how to use it")
