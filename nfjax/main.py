"""python -m nfjax.main --config=configs/digits_convshort.py --workdir=DIR [--config.optim.learning_rate=0.1 ...]

Trains what a config file describes; run again with the same workdir, it goes on where it stopped.
"""

import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with arguments behind a colon.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its config, metrics, checkpoints and curves.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes train.")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many processes train together; SLURM and TPUs tell by themselves."
)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised, not only what it says.")

INTERRUPTED = 130  # as shells report Ctrl-C
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the scripts in launch/ start the same command again


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what cannot be parsed ends the program with one message, not with a traceback."""
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError):
        sys.exit(f"nfjax: {_unknown_fields(argv)}")
    except flags.Error as error:
        # Where a config file itself raises, absl's message is a traceback; its last line says what is wrong.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(f"nfjax: {lines[-1] if any(line.startswith('Traceback') for line in lines) else ' '.join(lines)}")
    if len(rest) > 1:
        sys.exit(
            f"nfjax: unexpected argument {rest[1]!r}: settings are flags, such as --config.optim.learning_rate=0.1"
        )
    if not (flags.FLAGS.help or flags.FLAGS.helpfull or flags.FLAGS.helpshort):
        for name, example in (("config", "configs/digits_convshort.py"), ("workdir", "runs/digits")):
            if not flags.FLAGS[name].present or flags.FLAGS[name].value == "":
                sys.exit(f"nfjax: --{name} is missing, such as --{name}={example}; --help tells more")
    return rest


def _unknown_fields(argv: list[str]) -> str:
    """Which --config.… flags name no field, and which fields there are."""
    overrides = [arg.partition("=")[0].removeprefix("--config.") for arg in argv if arg.startswith("--config.")]
    sys.argv = [arg for arg in argv if not arg.startswith("--config.")]
    flags.FLAGS.unparse_flags()
    try:
        flags.FLAGS(sys.argv)
    except (AttributeError, KeyError) as error:
        return f"the config file sets or reads a field that does not exist: {error}"
    for path in overrides:
        node = _CONFIG.value
        for i, name in enumerate(path.split(".")):
            if not isinstance(node, ConfigDict) or name not in node:
                known = ", ".join(node) if isinstance(node, ConfigDict) else "nothing below it"
                above = ".".join(["config", *path.split(".")[:i]])
                return f"unknown config field {path!r}: {above} has {known}"
            node = node[name]
    return f"one of the flags {', '.join(overrides)} cannot be set"


def main(argv: list[str]) -> None:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries below tell much; --verbosity=0 shows it
    from nfjax import compilation, distributed, train  # after the flags are parsed, so that --help is quick

    compilation.keep()
    try:
        distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train.train(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, train.TrainingDivergedError, train.TrainingInterruptedError) as error:
        if _TRACEBACK.value:
            raise
        print(f"nfjax: {error}\n(--traceback shows where this was raised)", file=sys.stderr)
        distributed.leave(_code(error))
    except Exception:
        if not distributed.has_others():
            raise
        traceback.print_exc()
        distributed.leave(1)


def _code(error: Exception) -> int:
    from nfjax import train

    if isinstance(error, train.TrainingPreemptedError):
        return START_AGAIN
    return INTERRUPTED if isinstance(error, train.TrainingInterruptedError) else 1


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
