"""nfjax train --config=FILE|NAME --workdir=DIR [--config.optim.learning_rate=0.1 ...]
       nfjax train --config=FILE|NAME --find-learning-rate [--out=curve.png]

Trains what a config describes; run again with the same workdir, it goes on where it stopped. With
--find-learning-rate it trains nothing that lasts: it says which learning rate is worth a try, and why.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from nfjax import preemption, storage
from nfjax.cli import settings
from nfjax.cli._outcome import UsageError, explain
from nfjax.cli._parser import PICTURES, Parser, check_file, path


def add_arguments(parser: Parser) -> None:
    settings.add_config(parser)
    parser.add_argument(
        "--workdir", metavar="DIR", help="where the run keeps its config, metrics, checkpoints and curves"
    )
    finding = parser.add_argument_group("before a run, without a workdir")
    finding.add_argument(
        "--find-learning-rate",
        action="store_true",
        help="take steps whose rate rises from 1e-6 to 10, or until they diverge, and suggest one",
    )
    finding.add_argument("--steps", type=int, metavar="N", help="how many (500)")
    finding.add_argument("--out", type=path, metavar="FILE", help="draw the loss by rate: a PNG, SVG or PDF")
    several = parser.add_argument_group("several processes, which SLURM and TPUs tell by themselves")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="how many train together")
    several.add_argument("--process", type=int, metavar="N", help="which of them this is, from 0")
    parser.add_argument("--helpfull", nargs=0, action=_Full, help="list the flags of the libraries as well")
    parser.add_argument("--h", "--helpshort", action="help", help=argparse.SUPPRESS)  # as absl has them
    parser.epilog = settings.listed()


def run(arguments: argparse.Namespace) -> None:
    """Ends the process, unless it is the only one and nothing went wrong."""
    config = settings.read(arguments)
    if arguments.find_learning_rate:
        if arguments.workdir or arguments.coordinator or arguments.processes or arguments.process is not None:
            raise UsageError(
                "--find-learning-rate keeps nothing and runs in one process: expected neither --workdir nor "
                "--coordinator, --processes and --process"
            )
        if arguments.out:
            check_file("--out", arguments.out, PICTURES)
        app.run(lambda _: _find(config, arguments), flags_parser=lambda argv: argv)
        return
    if arguments.out or arguments.steps is not None:
        raise UsageError("--out and --steps go with --find-learning-rate; a run has --config.epochs, and curves.png")
    if not arguments.workdir:
        raise UsageError("--workdir is missing, such as --workdir=runs/digits; nfjax train --help tells more")
    # The surroundings that the libraries expect; their flags are parsed already.
    app.run(lambda _: _train(config, arguments), flags_parser=lambda argv: argv)


def _train(config: ConfigDict, arguments: argparse.Namespace) -> None:
    from nfjax import distributed  # here: --help and wrong flags are answered quickly
    from nfjax.distributed import peers
    from nfjax.training import loop

    _prepare(config)
    try:
        distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
        loop.train(config, arguments.workdir)
    except peers.AbsentError as error:
        distributed.leave(explain(preemption.PeerLostError(str(error)), arguments.traceback))
    except Exception as error:
        distributed.leave(explain(error, arguments.traceback))
    if distributed.has_others():
        distributed.leave(0)


def _find(config: ConfigDict, arguments: argparse.Namespace) -> None:
    from nfjax.training import networks, rate_finder

    _prepare(config)
    search = rate_finder.find(config, rate_finder.STEPS if arguments.steps is None else arguments.steps)
    print(rate_finder.explain(search, config))
    if arguments.out:
        curve = rate_finder.plot(search, f"{networks.title(config)}, {config.data.source}")
        storage.write_figure(pathlib.Path(arguments.out), curve, dpi=150)
        print(f"curve   {arguments.out}")


def _prepare(config: ConfigDict) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries below tell much; --verbosity=0 shows it
    from nfjax import _cpu, compilation

    compilation.keep()
    if config.train.keep_memory:
        _cpu.keep_memory()


class _Full(argparse.Action):
    """--helpfull: what --help tells, and the flags of the libraries."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print(f"{parser.format_help()}\n{flags.FLAGS.get_help()}")
        parser.exit()
