"""The parser of every command: argparse, strict about names, and one way to say none."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import absl.app
import absl.flags

from nfjax.cli._outcome import UsageError

T = TypeVar("T")
PICTURES = (".png", ".svg", ".pdf")  # the endings of what is drawn
_SETTING = re.compile(r"--?(?P<no>no)?config\.(?P<field>[^=]+)(?P<equals>=(?P<text>.*))?", re.S)


@dataclasses.dataclass(frozen=True)
class Setting:
    """--config.FIELD=TEXT, as it was typed.

    Attributes:
        field: Where in the config, such as "optim.learning_rate".
        text: The value; "none" stands for None.
    """

    field: str
    text: str

    def __str__(self) -> str:
        return f"--config.{self.field}={self.text}"


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises `UsageError` for what it cannot read."""

    def __init__(self, prog: str, about: str):
        """For `nfjax SPP`.

        Args:
            prog: "nfjax spp".
            about: How the command is called, a blank line, and what it does.
        """
        usage, _, description = about.strip().partition("\n\n")
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--traceback", action="store_true", help="show where in the code an error was raised, not only what it says"
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help tells more")

    def read(self, argv: Sequence[str], *, settings: bool = False, flags: bool = False) -> argparse.Namespace:
        """The arguments by name, as argparse returns them.

        Args:
            argv: As typed, behind the command.
            settings: Whether `arguments.settings` takes --config.FIELD=VALUE.
            flags: Whether absl takes what is not known here, for the libraries.

        Raises:
            UsageError: Something is missing, cannot be read, or is not known.
        """
        found = []
        if flags:
            argv = absl.flags.FLAGS.read_flags_from_files(argv, force_gnu=False)  # --flagfile
            argv = [re.sub(r"^-(?=[a-z]{2})", "--", argument) for argument in argv]
        if settings:
            found, argv = separate(argv)
        arguments, rest = self.parse_known_intermixed_args(argv)
        if flags:
            rest = self._flags_of_libraries(rest, settings)
        if rest:
            raise self.unknown(rest[0], settings)
        arguments.settings = found
        return arguments

    def _flags_of_libraries(self, argv: Sequence[str], settings: bool) -> list[str]:
        """Sets them, and returns what is none of them."""
        try:
            return absl.flags.FLAGS([self.prog, *argv])[1:]
        except absl.flags.UnrecognizedFlagError as error:
            given = next(argument for argument in argv if argument.lstrip("-").startswith(error.flagname))
            raise self.unknown(given, settings) from error
        except absl.flags.Error as error:
            raise UsageError(" ".join(line.strip() for line in str(error).splitlines() if line.strip())) from error

    def unknown(self, argument: str, settings: bool) -> UsageError:
        """For an argument that is not known: what it may have been meant for."""
        name = f"--{argument.partition('=')[0].lstrip('-')}"
        options = [option for option in self._option_string_actions if option.startswith("--")]
        if argument.startswith("-") and (alike := difflib.get_close_matches(name, options, 1, 0.75)):
            return UsageError(f"unknown argument {argument!r}: did you mean {alike[0]}?")
        if not settings:
            return UsageError(f"unknown argument {argument!r}: {self.prog} --help lists those that there are")
        kind = "unknown" if argument.startswith("-") else "unexpected"
        field = _field(name[2:]) if kind == "unknown" else None
        example = f"--config.{field}={argument.partition('=')[2] or 'VALUE'}" if field else "--config.model.width=8"
        return UsageError(
            f"{kind} argument {argument!r}: settings are flags such as {example}; {self.prog} --help tells more"
        )


def separate(argv: Sequence[str]) -> tuple[list[Setting], list[str]]:
    """What of a command line is a setting, and what is left of it.

    As in absl: one dash or two, the value behind "=" or as the next argument; of a switch, the field alone for true and
    --noconfig.FIELD for false.
    """
    found, rest, waiting = [], [], list(argv)
    while waiting:
        argument = waiting.pop(0)
        match = _SETTING.fullmatch(argument)
        if match is None:
            rest.append(argument)
        elif match["equals"]:
            found.append(Setting(match["field"], match["text"]))
        elif match["no"] or _is_switch(match["field"]):
            found.append(Setting(match["field"], "false" if match["no"] else "true"))
        elif waiting:
            found.append(Setting(match["field"], waiting.pop(0)))
        else:
            raise UsageError(f"{argument} has no value: expected {argument}=VALUE")
    return found, rest


def _field(name: str) -> str | None:
    """The only field of that name: "optim.learning_rate" of "learning_rate"."""
    try:
        found = [field for field, _ in fields() if name == field.rpartition(".")[2]]
    except ImportError:  # not installed for training
        return None
    return found[0] if len(found) == 1 else None


def _is_switch(field: str) -> bool:
    return isinstance(dict(fields()).get(field), bool)


def fields() -> Iterator[tuple[str, Any]]:
    """Every field with its default: ("optim.learning_rate", 0.01)."""

    from nfjax import config  # here: some commands need nothing of training

    def below(section: Any, above: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if hasattr(value, "items"):
                yield from below(value, f"{above}{name}.")
            else:
                yield f"{above}{name}", value

    return below(config.base(), "")


def is_none(text: str) -> bool:
    """Whether a value of the command line stands for None."""
    return text.lower() == "none"


def optional(convert: Callable[[str], T]) -> Callable[[str], T | None]:
    """For `add_argument(type=)`: none, or what `convert` makes of the text."""

    def read(text: str) -> T | None:
        return None if is_none(text) else convert(text)

    read.__name__ = convert.__name__  # argparse names it where the text is wrong
    return read


def positive(text: str) -> int:
    """For `add_argument(type=)`: an integer, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def path(text: str) -> str:
    """For `add_argument(type=)`: a path, "~" replaced."""
    return os.path.expanduser(text)


def check_file(option: str, name: str, endings: Iterable[str]) -> None:
    """Refuses, before anything is computed, a file that could not be written when it is.

    Args:
        option: Such as "--out".
        name: The path that it was given.
        endings: Those that have a meaning, such as ".png".

    Raises:
        UsageError: It has another ending, is a folder, or lies in none.
    """
    if os.path.splitext(name)[1].lower() not in endings:
        raise UsageError(f"{option}={name}: expected a file that ends with one of {', '.join(endings)}")
    if os.path.isdir(name) or not os.path.isdir(os.path.dirname(name) or "."):
        raise UsageError(f"{option}={name}: expected a file in a folder that exists")


def names(table: Iterable[object]) -> str:
    """For `add_argument(help=)`: the names that there are."""
    return ", ".join(map(str, table))
