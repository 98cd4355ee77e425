"""What a run that is over measured, from its workdir."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import logging

from nfjax import storage
from nfjax.reproduce import _records
from nfjax.reproduce._records import Start
from nfjax.runs import metrics


def read(workdir: pathlib.Path, batch_size: int) -> dict[str, Any]:
    """The fields of a `Record` that are measured.

    Args:
        workdir: Of the run.
        batch_size: Of its steps.
    """
    lines = metrics.read(workdir)
    ended = [line for line in lines if line["kind"] == "epoch"]
    seconds, before = 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            if line["images_per_second"]:
                seconds += (line["step"] - before) * batch_size / line["images_per_second"]
            before = line["step"]
    return {
        "epochs": {name: [float(f"{line[name]:.6g}") for line in ended] for name in _records.PER_EPOCH},
        "seconds": round(seconds, 1),
        "starts": _starts(workdir / "versions.json"),
    }


def _starts(path: pathlib.Path) -> list[Start]:
    """None, with a warning, where they cannot be read: what was measured is worth more."""
    try:
        return storage.read_json(path, list[Start], "the record of the run does without")
    except (FileNotFoundError, storage.DamagedFileError) as error:
        logging.warning("%s", error)
        return []
