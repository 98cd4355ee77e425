"""nfjax cost --depth=50 --residual=convshort
       nfjax cost --config=imagenet_convshort --num-classes=1000
       nfjax cost --module=my_package.my_module:make_model --input-shape=1,32,32,3

What a network costs for one image: its parameters, and the multiply-accumulates of its convolutions and matrix
products. Nothing is computed.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
from flax import nnx

from nfjax import cost
from nfjax.cli import _networks as networks
from nfjax.cli._outcome import UsageError
from nfjax.cli._parser import Parser, positive


def add_arguments(parser: Parser) -> None:
    networks.add_paper_arguments(parser)
    networks.add_own_arguments(parser)
    parser.add_argument(
        "--config", metavar="FILE|NAME",
        help="the network of a config, with --config.FIELD=VALUE for what differs from it",
    )  # fmt: skip
    parser.add_argument(
        "--num-classes", type=positive, metavar="N", help="of a network of the paper or of a config (10)"
    )


def run(arguments: argparse.Namespace) -> None:
    title, counted, shape = _of_config(arguments) if arguments.config else _counted(arguments)
    rows = {
        "parameters": counted.parameters,
        "  of normalization": counted.norm_parameters,
        "multiply-accumulates": counted.macs,
        "FLOPs, two each": counted.flops,
    }
    print(f"{title}, for an input of {shape}\n")
    print("\n".join(f"{name:<20} {number:>18,}" for name, number in rows.items()))
    for name, number in counted.unsure:
        print(f"\n{number:,} parameters of {name} may belong to normalization, which its name does not tell")


def _of_config(arguments: argparse.Namespace) -> tuple[str, cost.Cost, str]:
    from nfjax.cli import settings  # here: the others need nothing of training
    from nfjax.training import checks
    from nfjax.training import networks as trained

    if arguments.module or arguments.depth is not None:
        raise UsageError("--config describes a network; it goes neither with --depth nor with --module")
    networks.refuse(arguments, networks.PAPER, "--config")
    config = settings.read(arguments)
    checks.check(config)
    size = config.data.image_size
    classes = arguments.num_classes or 10
    model = nnx.eval_shape(lambda: trained.build(config, classes, jax.random.key(0)))
    return arguments.config, cost.count(model, (1, size, size, 3)), f"{size}x{size} pixels, {classes} classes"


def _counted(arguments: argparse.Namespace) -> tuple[str, cost.Cost, str]:
    if arguments.settings:
        raise UsageError(f"{arguments.settings[0]} goes with --config")
    networks.check(arguments, paper=(*networks.PAPER, "num_classes"))
    if arguments.module:
        own = networks.OwnModel(arguments)
        inputs = [x(jax.random.key(0)) if callable(x) else x for x in own.inputs]
        counted = cost.count(own.model, *inputs, **dict(arguments.arg))
        return type(own.model).__name__, counted, ", ".join(map(_shape, inputs))
    classes = arguments.num_classes or 10
    title, make, size = networks.paper_network(arguments, classes)
    model = nnx.eval_shape(lambda: make(0))
    return title, cost.count(model, (1, size, size, 3)), f"{size}x{size} pixels, {classes} classes"


def _shape(x: Any) -> str:
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__
