"""python -m nfjax.main --config=configs/digits_convshort.py --workdir=DIR [--config.optim.lr=…]

Trains what a config file describes; run again with the same workdir, it goes on where it stopped.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with arguments behind a colon where it takes any.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its config, metrics, checkpoints and curves.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised, not only what it says.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}: settings are flags, such as --config.optim.learning_rate=0.1"
        )
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries below tell much; --verbosity=0 shows it
    from nfjax import train  # after the flags are parsed, so that --help is quick

    try:
        train.train(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, train.TrainingDivergedError, train.TrainingInterruptedError) as error:
        if _TRACEBACK.value:
            raise
        print(f"nfjax: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, train.TrainingInterruptedError) else 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
