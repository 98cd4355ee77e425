"""How a command ends: with which exit code and what message, by what was raised."""

from __future__ import annotations

import sys
import traceback

from nfjax.preemption import (
    INTERRUPTED,
    START_AGAIN,
    TrainingInterruptedError,
    TrainingPreemptedError,
)

FAILED = 1
USAGE = 2  # as argparse ends, and most commands do
EXIT_CODES = {
    0: "done",
    FAILED: "failed",
    USAGE: "the command line is wrong",
    START_AGAIN: "stopped by SIGTERM, start the same command again",
    INTERRUPTED: "stopped by Ctrl-C",
}
# Where what is imported comes from, if it is not installed: the extra of pyproject.toml.
EXTRAS = {
    "array_record": "train",
    "clu": "train",
    "cv2": "train",
    "etils": "train",
    "flatbuffers": "train",
    "ml_collections": "train",
    "msgpack": "train",
    "msgspec": "train",
    "optax": "train",
    "orbax": "train",
    "PIL": "train",
    "scipy": "train",
    "simplejpeg": "train",
    "sklearn": "train",
    "tensorboardX": "train",
    "tqdm": "train",
    "turbojpeg": "turbo",
    "tensorflow_datasets": "tfds",
    "importlib_resources": "prepare",
    "jax2onnx": "onnx",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "tensorflow": "prepare",
    "gcsfs": "gcs",
    "wandb": "wandb",
    "datasets": "huggingface",
    "huggingface_hub": "hub",
}


class UsageError(Exception):
    """What the command line asks for cannot be understood, or does not go together."""


class FailedError(Exception):
    """What the command line asks for cannot be done, for the reason that the message tells."""


def explain(error: BaseException, with_traceback: bool = False) -> int:
    """Tells on stderr what was raised.

    What a wrong value, a file or a missing package causes, and all that nfjax raises by itself, is one message.
    Anything else is a mistake in the program, which shows its traceback.

    Args:
        error: That ended the command.
        with_traceback: Whether to show where it was raised in any case.

    Returns:
        The exit code.
    """
    code = _code(error)
    ours = isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("nfjax.")
    if isinstance(error, KeyboardInterrupt):
        print(f"nfjax: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
    elif with_traceback or not ours:
        traceback.print_exception(error)
    else:
        hint = "\n(--traceback shows where this was raised)" if code == FAILED else ""
        print(f"nfjax: {_message(error)}{hint}", file=sys.stderr)
    return code


def _code(error: BaseException) -> int:
    if isinstance(error, UsageError):
        return USAGE
    if isinstance(error, TrainingPreemptedError):
        return START_AGAIN
    return INTERRUPTED if isinstance(error, TrainingInterruptedError | KeyboardInterrupt) else FAILED


def _message(error: BaseException) -> str:
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in EXTRAS:
        return f'{package} is not installed, which this needs: pip install "nfjax[{EXTRAS[package]}]"'
    return str(error)
