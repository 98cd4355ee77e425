"""nfjax evaluate --workdir=DIR [--step=N] [--data-dir=DIR]

Scores the best checkpoint of a run, or a chosen one, on the run's test images: each of them counts exactly once.
"""

from __future__ import annotations

import argparse

from absl import logging

from nfjax.cli._parser import Parser, path


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a training run")
    parser.add_argument(
        "--step", type=int, metavar="N", help="of the checkpoint; by default the one with the best test accuracy"
    )
    parser.add_argument("--data-dir", type=path, metavar="DIR", help="where the images are now, if they have moved")


def run(arguments: argparse.Namespace) -> None:
    from nfjax import compilation, evaluate  # here: --help is answered quickly

    logging.set_verbosity(logging.ERROR)
    compilation.keep()
    score = evaluate.evaluate(arguments.workdir, arguments.step, arguments.data_dir)
    print(
        f"step {score['step']:,}: test accuracy {score['accuracy']:.2%}, loss {score['loss']:.4f}, of "
        f"{score['images']:,} images"
    )
    if "ema_accuracy" in score:
        print(f"average of the weights: test accuracy {score['ema_accuracy']:.2%}, loss {score['ema_loss']:.4f}")
