"""From a command line to a config: --config=FILE, and --config.x.y=value for each field that differs from the file."""

from __future__ import annotations

import importlib.util
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from nfjax import config as base

LISTED = "nfjax/config.py"
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


class _ConfigError(Exception):
    """What is wrong with a config file or an override: absl takes a ValueError for its own, and adds a traceback."""


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Adds --config to the flags, with an override for every field that `argv` names."""
    argv = [arg for arg in argv if not _is_none(arg)]
    text = f"A config file, such as those in configs/, with arguments behind a colon; settings: see {LISTED}."
    config_flags.DEFINE_config_file("config", None, text, values, sys_argv=argv)
    values["config"].parser = _FileParser(argv)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses `argv`, and returns what is left of it; `values.config` is the config then.

    "none" stands for None where a field may be that. Raises ValueError that says in one message what is wrong.
    """
    emptied = [arg.partition("=")[0].removeprefix("--config.") for arg in argv if _is_none(arg)]
    argv = [arg for arg in argv if not _is_none(arg)]
    # Of these two, absl says that the value should be one of a config file's.
    if not any(re.match(r"--?config(=|$)", arg) for arg in argv) and any(map(_OVERRIDE.match, argv)):
        raise ValueError("--config is missing, such as --config=configs/digits_convshort.py, before what changes it")
    try:
        rest = values(argv)
    except _ConfigError as error:
        raise ValueError(str(error)) from error.__cause__
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # of a value that its field cannot take
        raise ValueError(f"a --config flag cannot be set: {error}") from error
    except flags.Error as error:
        raise ValueError(" ".join(line.strip() for line in str(error).splitlines() if line.strip())) from error
    for path in emptied if values["config"].value is not None else ():
        set_none(values["config"].value, path)
    return rest


def load(text: str) -> ConfigDict:
    """The config of "FILE" or "FILE:ARGUMENTS", locked. Raises ValueError or OSError that name the file."""
    path, arguments = split(text)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"--config={text}: there is no file {path} (from {os.getcwd()}); expected a config file, such as "
            "configs/digits_convshort.py"
        )
    if not os.path.isfile(path):
        raise ValueError(f"--config={text}: {path} is no file; expected a config file")
    get_config = _get_config(text, path)
    try:
        config = get_config(*arguments)
    except (ValueError, OSError):
        raise
    except AttributeError as error:
        raise ValueError(f"the config file {path} sets or reads a field that does not exist: {error}") from error
    except TypeError as error:
        hint = ": it takes no arguments behind a colon" if arguments and "positional argument" in str(error) else ""
        raise ValueError(f"the config file {path} raises TypeError{hint}: {error}") from error
    except Exception as error:
        raise ValueError(f"the config file {path} raises {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"the config file {path} returns {type(config).__name__} from get_config, expected a ConfigDict: start "
            "from one of nfjax.config, change what differs, and return it"
        )
    return config.lock()


def split(text: str) -> tuple[str, list[str]]:
    """The path of a config file, "~" replaced, and what stands behind its colon, if there is one.

    A colon that is part of an existing path separates nothing.
    """
    ends = [match.start() for match in re.finditer(":", text)] + [len(text)]
    expanded = [(os.path.expanduser(text[:end]), [text[end + 1 :]] if end < len(text) else []) for end in ends]
    python = [pair for pair in expanded if pair[0].endswith(".py")]
    return next((pair for pair in reversed(expanded) if os.path.isfile(pair[0])), (python or expanded)[0])


def _get_config(text: str, path: str) -> Callable[..., Any]:
    """The function of that name in a config file."""
    spec = importlib.util.spec_from_loader("config_file", loader=None)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = os.path.abspath(path)
    try:
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec")
    except (SyntaxError, ValueError) as error:  # the second of null bytes
        raise ValueError(f"--config={text} is no config file, which is Python: {error}") from error
    try:
        exec(code, vars(module))
    except Exception as error:
        raise ValueError(f"--config={text} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"--config={text} is no config file: it has no function get_config")
    return module.get_config


class _FileParser(flags.ArgumentParser):
    """Loads the config file, and looks at the names of all overrides before absl sets the first."""

    def __init__(self, argv: Sequence[str]):
        self._argv = argv

    def parse(self, text: str) -> ConfigDict:
        try:
            config = load(text)
            for argument in self._argv:
                if match := _OVERRIDE.match(argument):
                    node = check_known(config, match[1])
                    if isinstance(node, ConfigDict):
                        raise ValueError(f"{argument}: {match[1]} has fields of its own, {', '.join(node)}")
        except (ValueError, OSError) as error:
            raise _ConfigError(str(error)) from error
        return config

    def flag_type(self) -> str:
        return "config object"


def _is_none(argument: str) -> bool:
    return argument.startswith("--config.") and argument.partition("=")[2].lower() == "none"


def set_none(config: ConfigDict, path: str) -> None:
    """Raises ValueError where `path` is no field, or none that may be None."""
    check_known(config, path)
    *above, name = path.split(".")
    node, default = config, base.base()
    for part in above:
        node, default = node[part], default[part]
    if default.get(name) is not None:  # a field that may be None is so by default
        raise ValueError(f"--config.{path}=none: expected a value, such as {default[name]!r}")
    node[name] = None


def check_known(config: ConfigDict, path: str) -> Any:
    """What `path` leads to. Raises ValueError, which says what there is, where it is no field."""
    node = config
    for i, name in enumerate(path.split(".")):
        plain, bracket, _ = name.partition("[")
        above = ".".join(["config", *path.split(".")[:i]])
        if bracket and isinstance(node, ConfigDict) and isinstance(node.get(plain), tuple | list):
            whole = ", ".join(map(str, node[plain]))
            raise ValueError(f"--config.{path}: {above}.{plain} is set as a whole, --{above}.{plain}='({whole})'")
        if not isinstance(node, ConfigDict) or name not in node:
            known = ", ".join(node) if isinstance(node, ConfigDict) else "nothing below it"
            raise ValueError(f"unknown config field {path!r}: {above} has {known}")
        node = node[name]
    return node


def listed() -> str:
    """For --help: every field with its default, and where their meaning is told."""

    def fields(config: ConfigDict, above: str) -> Iterator[str]:
        for name in config:
            if isinstance(config[name], ConfigDict):
                yield from fields(config[name], f"{above}{name}.")
            else:
                yield f"{above}{name}={str(config[name]).replace(' ', '')}"

    names = textwrap.fill("  ".join(fields(base.base(), "")), 78, initial_indent="  ", subsequent_indent="  ")
    return (
        f"Settings are --config.FIELD=VALUE, behind --config=FILE; {LISTED} tells what each of them means, and the\n"
        f"file what it changes. Fields with their defaults:\n{names}"
    )
