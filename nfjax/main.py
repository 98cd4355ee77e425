"""python -m nfjax.main --config=configs/digits_convshort.py --workdir=DIR [--config.optim.learning_rate=0.1 ...]

Trains what a config file describes; run again with the same workdir, it goes on where it stopped.
"""

import sys
import traceback

from nfjax import preemption

if __name__ == "__main__":
    preemption.begin()

from absl import app, flags, logging

from nfjax.cli import settings

settings.define(flags.FLAGS, sys.argv)
HELP = ("--help", "-help", "-h", "--h", "--helpshort", "-helpshort", "--helpfull", "-helpfull")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its config, metrics, checkpoints and curves.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes train.")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many processes train together; SLURM and TPUs tell by themselves."
)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised, not only what it says.")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what cannot be parsed ends the program with one message, not with a traceback."""
    if asked := [argument for argument in argv[1:] if argument in HELP]:
        print(help_text(full=asked[0].endswith("full")))
        sys.exit(0)
    try:
        rest = settings.parse(flags.FLAGS, argv)
    except ValueError as error:
        sys.exit(f"nfjax: {error}")
    if len(rest) > 1:
        sys.exit(
            f"nfjax: unexpected argument {rest[1]!r}: settings are flags, such as --config.optim.learning_rate=0.1"
        )
    for name, example in (("config", "configs/digits_convshort.py"), ("workdir", "runs/digits")):
        if not flags.FLAGS[name].present or flags.FLAGS[name].value == "":
            sys.exit(f"nfjax: --{name} is missing, such as --{name}={example}; --help tells more")
    return rest


def help_text(full: bool) -> str:
    """What the command does, its flags, and where the settings are listed. full: with the flags of its libraries."""
    own = [flags.FLAGS[name] for name in ("config", "workdir", "coordinator", "processes", "process", "traceback")]
    lines = [f"  --{'[no]' if flag.boolean else ''}{flag.name}: {flag.help}" for flag in own]
    more = flags.FLAGS.get_help() if full else "--helpfull lists the flags of the libraries as well."
    return "\n\n".join([__doc__.strip(), "\n".join(lines), settings.listed(), more])


def main(argv: list[str]) -> None:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries below tell much; --verbosity=0 shows it
    from nfjax import compilation, distributed  # after the flags are parsed, so that --help is quick
    from nfjax.distributed import peers  # after the flags are parsed, so that --help is quick
    from nfjax.training import loop as train  # after the flags are parsed, so that --help is quick

    compilation.keep()
    try:
        distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train.train(flags.FLAGS.config, _WORKDIR.value)
    except (
        ValueError,
        OSError,
        ImportError,
        peers.AbsentError,
        train.TrainingDivergedError,
        preemption.TrainingInterruptedError,
    ) as error:
        if _TRACEBACK.value:
            traceback.print_exc()
        else:
            stopped = isinstance(error, preemption.TrainingInterruptedError)
            hint = "" if stopped else "\n(--traceback shows where this was raised)"
            print(f"nfjax: {error}{hint}", file=sys.stderr)
        distributed.leave(_code(error))
    except Exception:
        traceback.print_exc()
        distributed.leave(1)
    if distributed.has_others():
        distributed.leave(0)


def _code(error: Exception) -> int:
    from nfjax.distributed import peers

    if isinstance(error, preemption.TrainingPreemptedError | peers.AbsentError):
        return preemption.START_AGAIN
    return preemption.INTERRUPTED if isinstance(error, preemption.TrainingInterruptedError) else 1


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
