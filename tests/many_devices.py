"""Trains the runs of a JSON file in one process, for test_distributed: FILE [COORDINATOR PROCESSES PROCESS]."""

import contextlib
import json
import signal
import sys

import conftest  # noqa: F401 what makes tests compile sooner, and their strict promotion
import jax
from ml_collections import ConfigDict

from nfjax import distributed, preemption
from nfjax.training import loop as train
from nfjax.training.progress import Progress


def terminate_at(step):
    """Only the last process gets the signal: the others have to learn of it."""
    add = Progress.add

    def adding(self, sums):
        add(self, sums)
        if self.step == step and jax.process_index() == jax.process_count() - 1:
            signal.raise_signal(signal.SIGTERM)

    Progress.add = adding


def main():
    if len(sys.argv) > 2:
        distributed.initialize(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    with open(sys.argv[1]) as file:
        described = json.load(file)
    stop_at = described["stop_at"]
    if stop_at is not None:
        terminate_at(stop_at)
    for workdir, config in described["runs"].items():
        with contextlib.suppress(preemption.TrainingPreemptedError) if stop_at else contextlib.nullcontext():
            train.train(ConfigDict(config), workdir)
            assert stop_at is None, "the run was not stopped"
    print("devices", jax.device_count(), "processes", jax.process_count())


if __name__ == "__main__":
    main()
