"""The page of all commands, made from `nfjax.cli`: what each of them answers to --help."""

from __future__ import annotations

import importlib
import os
import re

from nfjax import cli
from nfjax.cli._outcome import EXIT_CODES

WIDTH = "88"  # columns of the help

HEAD = """# Commands

`pip install nfjax` gives `nfjax spp` and `nfjax cost`, `pip install "nfjax[train]"` the other commands as well. Some
also answer to a module's name, and take the same arguments:

| command | the same as |
|---|---|
| `nfjax train` | `python -m nfjax.main` |
| `nfjax evaluate` | `python -m nfjax.evaluate` |
| `nfjax data pack`, `nfjax data show` | `python -m nfjax.data pack`, `python -m nfjax.data show` |
| `nfjax spp` | `python -m nfjax.spp` |
| `nfjax reproduce` | `python -m nfjax.reproduce` |

`--config=` takes a file, or the name of a config that comes with nfjax, such as `imagenet_convshort`; every
[setting](config.md) is a flag behind it, `--config.optim.learning_rate=0.1`. The value `none` empties a setting or an
argument that may be empty. An argument that does not exist is an error, with the closest one that does.

What goes wrong is one message on stderr, and `--traceback` shows where it was raised. Every command ends with one of
these exit codes:

"""


def commands(table: cli.Table = cli.COMMANDS, above: str = "nfjax") -> dict[str, cli.Command]:
    """{"nfjax train": Command, ...}, those of groups included."""
    found = {}
    for name, command in table.items():
        inner = {f"{above} {name}": command}
        found |= inner if isinstance(command, cli.Command) else commands(command, f"{above} {name}")
    return found


def section(name: str, command: cli.Command) -> str:
    """What the command is for, and what it answers to --help, but for the settings, which have a page of their own."""
    module = importlib.import_module(command.module)
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), WIDTH  # argparse asks for it
    try:
        parser = cli.Parser(name, module.__doc__)
        module.add_arguments(parser)
        about = re.sub(r"--[a-z][\w.-]*\w(?:=\w+)?", r"`\g<0>`", parser.description)
        parser.description = parser.epilog = None
        return f"## {name}\n\n{about}\n\n```text\n{parser.format_help()}```\n"
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def markdown() -> str:
    """The whole page."""
    codes = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    parts = [HEAD + "\n".join(["| exit code | |", "|---:|---|", *codes, ""])]
    return "\n".join([*parts, *(section(name, command) for name, command in commands().items())])
