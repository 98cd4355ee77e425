"""The command line: `nfjax train|evaluate|data|spp|cost|reproduce|predict|export`, and `python -m nfjax.main`.

A command is a module with two functions, and one line in `COMMANDS`:

    def add_arguments(parser: Parser) -> None: ...
    def run(arguments: argparse.Namespace) -> None: ...

Its docstring is what --help tells: how it is called in the first paragraph, and what it does. What it raises is told in
one message, and decides the exit code (`explain`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from absl import logging

import nfjax
from nfjax import preemption
from nfjax.cli._outcome import EXIT_CODES, UsageError, explain
from nfjax.cli._parser import Parser

__all__ = ["COMMANDS", "Command", "Parser", "UsageError", "main", "run"]


def __dir__() -> list[str]:
    return __all__


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: With its functions; imported when the command is given, so that the others start quickly.
        help: One line.
        settings: Whether it takes --config.FIELD=VALUE: they are `arguments.settings`.
        flags: Whether it takes the flags of the libraries as well, such as absl's --verbosity.
    """

    module: str
    help: str
    settings: bool = False
    flags: bool = False


Table = Mapping[str, "Command | Table"]

COMMANDS: Table = {
    "train": Command("nfjax.cli.train", "train what a config describes, or go on with it", settings=True, flags=True),
    "evaluate": Command("nfjax.cli.evaluate", "score a checkpoint of a run on its test images"),
    "data": {
        "pack": Command("nfjax.cli.pack", "pack a data set into shards for fast reading"),
        "show": Command("nfjax.cli.show", "draw a batch of a config before and after augmentation", settings=True),
    },
    "spp": Command("nfjax.cli.spp", "signal propagation of a network: a table, a verdict, a picture"),
    "cost": Command("nfjax.cli.cost", "parameters and multiply-accumulates of a network", settings=True),
    "reproduce": Command("nfjax.cli.reproduce", "the paper's tables and figures", settings=True),
    "predict": Command("nfjax.cli.predict", "name what images show, with a trained network"),
    "export": Command("nfjax.cli.export", "write a trained network for other programs"),
    "import": Command("nfjax.cli.import_weights", "make a model of weights from PyTorch"),
}


def main(*command: str) -> NoReturn:
    """Runs what the command line asks for, and ends the process.

    Args:
        *command: Comes before the arguments of the command line: "spp" in `python -m nfjax.spp`.
    """
    preemption.begin()
    sys.exit(run([*command, *sys.argv[1:]]))


def run(argv: Sequence[str]) -> int:
    """Runs a command in this process, and tells in one message what goes wrong.

    Args:
        argv: ["spp", "--depth=50"], as behind `nfjax`.

    Returns:
        The exit code, one of `EXIT_CODES`.
    """
    verbosity = logging.get_verbosity()  # which some commands lower; a program that goes on has its own
    try:
        command, rest, name = _find(argv)
        module = importlib.import_module(command.module)
        parser = Parser(f"nfjax {name}", module.__doc__)
        module.add_arguments(parser)
        module.run(parser.read(rest, settings=command.settings, flags=command.flags))
    except SystemExit as ended:  # of --help, and where a run ends its process itself
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        raise
    except (Exception, KeyboardInterrupt) as error:
        return explain(error, with_traceback="--traceback" in argv)
    finally:
        logging.set_verbosity(verbosity)
    return 0


def _find(argv: Sequence[str]) -> tuple[Command, list[str], str]:
    """The command, its arguments, and how it is called; SystemExit where --help or --version was answered."""
    table, above = COMMANDS, ""
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            print(_help(table, above))
            sys.exit(0)
        if word == "--version" and not above:
            print(f"nfjax {nfjax.__version__}")
            sys.exit(0)
        if word.startswith("-"):
            break
        if word not in table:
            alike = difflib.get_close_matches(word, table, 1)
            hint = f"did you mean {alike[0]}? " if alike else ""
            raise UsageError(f"unknown command {above + word!r}: {hint}Expected one of {', '.join(table)}")
        found = table[word]
        if isinstance(found, Command):
            return found, list(argv[i + 1 :]), above + word
        table, above = found, f"{above}{word} "
    raise UsageError(f"a command is missing: nfjax {above}COMMAND …, with one of {', '.join(table)}")


def _help(table: Table, above: str) -> str:
    lines = [f"usage: nfjax {above}COMMAND [ARGUMENT ...]", ""]
    lines += [] if above else [nfjax.__doc__.partition("\n")[0], ""]
    for name, command in table.items():
        about = command.help if isinstance(command, Command) else ", ".join(command)
        lines.append(f"  {name:<10} {about}")
    lines += ["", f"nfjax {above}COMMAND --help tells what a command takes."]
    codes = [f"  {code:>3} {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines if above else [*lines, "", "Exit codes:", *codes])
