"""From a command line to a config: --config=FILE, and --config.x.y=value for each field that differs from the file."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from nfjax import config as base


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Adds --config to the flags, with an override for every field that `argv` names."""
    text = "A file of configs/, with arguments behind a colon."
    config_flags.DEFINE_config_file("config", None, text, values, sys_argv=[arg for arg in argv if not _is_none(arg)])


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses `argv`, and returns what is left of it; `values.config` is the config then.

    "none" stands for None where a field may be that. Raises ValueError that says in one message what is wrong.
    """
    emptied = [arg.partition("=")[0].removeprefix("--config.") for arg in argv if _is_none(arg)]
    argv = [arg for arg in argv if not _is_none(arg)]
    file = next((arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")), "")
    try:
        rest = values(argv)
    except SyntaxError as error:
        raise ValueError(f"--config={file} is no config file, which is Python: {error}") from error
    except (AttributeError, KeyError) as error:
        raise ValueError(_unknown_fields(argv, file, error)) from error
    except flags.Error as error:
        # Where a config file itself raises, absl's message is a traceback; its last line says what is wrong.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        is_traceback = any(line.startswith("Traceback") for line in lines)
        raise ValueError(lines[-1] if is_traceback else " ".join(lines)) from error
    for path in emptied if values["config"].value is not None else ():
        set_none(values["config"].value, path)
    return rest


def _is_none(argument: str) -> bool:
    return argument.startswith("--config.") and argument.partition("=")[2].lower() == "none"


def set_none(config: ConfigDict, path: str) -> None:
    """Raises ValueError where `path` is no field, or none that may be None."""
    check_known(config, path)
    *above, name = path.split(".")
    node, default = config, base.base()
    for part in above:
        node, default = node[part], default[part]
    if default[name] is not None:  # a field that may be None is so by default
        raise ValueError(f"--config.{path}=none: expected a value, such as {default[name]!r}")
    node[name] = None


def check_known(config: ConfigDict, path: str) -> None:
    """Raises ValueError, which lists the fields there are, where `path` is no field."""
    node = config
    for i, name in enumerate(path.split(".")):
        if not isinstance(node, ConfigDict) or name not in node:
            known = ", ".join(node) if isinstance(node, ConfigDict) else "nothing below it"
            above = ".".join(["config", *path.split(".")[:i]])
            raise ValueError(f"unknown config field {path!r}: {above} has {known}")
        node = node[name]


def _unknown_fields(argv: Sequence[str], file: str, error: Exception) -> str:
    """Which --config.… flags name no field, and which fields there are; or what is wrong with the file."""
    plain = [arg for arg in argv if not arg.startswith("--config.")]
    values = flags.FlagValues()
    define(values, plain)
    try:
        values([*plain[:1], f"--config={file}"])
        config = values["config"].value
    except Exception as inner:
        if "get_config" in str(inner):
            return f"--config={file} is no config file: it has no function get_config"
        return f"the config file {file} sets or reads a field that does not exist: {inner}"
    for path in (arg.partition("=")[0].removeprefix("--config.") for arg in argv if arg.startswith("--config.")):
        try:
            check_known(config, path)
        except ValueError as unknown:
            return str(unknown)
    return f"a --config flag cannot be set: {error}"
