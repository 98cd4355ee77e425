"""From a command line to a config: --config=FILE, and --config.FIELD=VALUE for each field that differs from it."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import pathlib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

import nfjax
from nfjax import config as base
from nfjax.cli._outcome import UsageError
from nfjax.cli._parser import Setting, fields, is_none

LISTED = "nfjax/config.py"


def add_config(parser: argparse.ArgumentParser) -> None:
    """The argument that `read` needs."""
    parser.add_argument(
        "--config",
        metavar="FILE|NAME",
        help="a config file, or the name of one that comes with nfjax, with arguments behind a colon; "
        f"--config.FIELD=VALUE changes it, and {LISTED} lists the fields",
    )


def read(arguments: argparse.Namespace) -> ConfigDict:
    """The config that a command line names, with what it changes; locked.

    Args:
        arguments: With `config` and `settings`.

    Raises:
        UsageError: There is no such config, it cannot be read, or has no such field or value.
    """
    if not arguments.config:
        before = ", before what changes it" if arguments.settings else ""
        raise UsageError(f"--config is missing, such as --config=configs/digits_convshort.py{before}")
    try:
        config = load(arguments.config)
        config.update_from_flattened_dict(values(config, arguments.settings))
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return config


def values(config: ConfigDict, settings: Sequence[Setting]) -> dict[str, Any]:
    """What to change in a config, {"optim.learning_rate": 0.1}, as `update_from_flattened_dict` takes it.

    Of several values for one field the last one counts, except that those of a tuple are put together.

    Raises:
        ValueError: There is no such field, or it cannot have such a value; all fields are looked for before the first
            value is read.
    """
    for setting in settings:
        node = check_known(config, setting.field)
        if isinstance(node, ConfigDict):
            raise ValueError(f"{setting}: {setting.field} has fields of its own, {', '.join(node)}")
    found: dict[str, Any] = {}
    for setting in settings:
        value = _value(config, setting)
        several = isinstance(value, tuple) and isinstance(found.get(setting.field), tuple)
        found[setting.field] = (*found[setting.field], *value) if several else value
    return found


def _value(config: ConfigDict, setting: Setting) -> Any:
    *above, name = setting.field.split(".")
    node, default = config, base.base()
    for part in above:
        node, default = node[part], default.get(part, ConfigDict())
    if is_none(setting.text):
        if default.get(name) is not None:  # a field that may be None is so by default
            raise ValueError(f"{setting}: expected a value, such as {default[name]!r}")
        return None
    try:
        return _KINDS.get(node.get_type(name), ast.literal_eval)(setting.text)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{setting}: expected a value of the kind of {node[name]!r} ({error})") from None


def _tuple(text: str) -> tuple[Any, ...]:
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


_KINDS: Mapping[type, Callable[[str], Any]] = {
    bool: flags.BooleanParser().parse,
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    str: str,
    tuple: _tuple,
}


def shipped() -> dict[str, pathlib.Path]:
    """The configs that come with nfjax, by name: {"cifar10": PATH}."""
    package = pathlib.Path(nfjax.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):  # of a wheel, and of a checkout
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.py"))}
    return {}


def load(text: str) -> ConfigDict:
    """The config of "FILE" or "NAME", which may have ":ARGUMENTS" behind it; locked.

    Raises:
        ValueError: It is no config file, or one that does not work.
        OSError: There is neither such a file nor such a name, or it cannot be read.
    """
    path, arguments = split(text)
    if not os.path.isfile(path):
        path = str(shipped().get(path, path))
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"--config={text}: there is no file {path} (from {os.getcwd()}); expected a config file, such as "
            f"configs/digits_convshort.py, or one of {', '.join(shipped())}"
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
    shown = "  ".join(f"{name}={str(value).replace(' ', '')}" for name, value in fields())
    names = textwrap.fill(shown, 78, initial_indent="  ", subsequent_indent="  ")
    return (
        f"Settings are --config.FIELD=VALUE, behind --config=FILE; {LISTED} tells what each of them means, and the\n"
        f"file what it changes. Fields with their defaults:\n{names}"
    )
