"""python -m nfjax.evaluate --workdir=DIR [--step=N] [--data-dir=DIR]

Scores the best checkpoint of a run, or a chosen one, on the run's test images: each of them counts exactly once.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import jax
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from nfjax import checkpoint, data, steps, train
from nfjax import workdir as workdirs
from nfjax.progress import Progress


def evaluate(workdir: str, step: int | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """{"step", "loss", "accuracy", "images"} of the checkpoint at `step`, by default the one with the best test
    accuracy.

    data_dir replaces the data directory of the run, where the images have moved. Raises FileNotFoundError if there is
    no run or no checkpoint.
    """
    folder = pathlib.Path(workdir)
    config = workdirs.read_config(folder)
    if data_dir is not None:
        config.data.dir = data_dir
    train.check(config)
    if not (folder / checkpoint.FOLDER).is_dir():
        raise FileNotFoundError(f"{folder} has no checkpoints yet: the run was stopped before its first one")
    checkpoints = checkpoint.Checkpoints(folder, read_only=True)
    known = checkpoints.steps()
    step = checkpoints.best_step() if step is None else step
    if step not in known:
        raise FileNotFoundError(
            f"{folder} has no checkpoint at step {step}: expected one of "
            f"{', '.join(map(str, known)) or 'none, there are none'}"
        )

    dataset = data.load(config.data.source, config.data.dir, config.data.image_size)
    mesh = train.make_mesh()
    network, params, batch_stats = steps.as_functions(train.build_model(config, len(dataset.class_names)))
    progress = Progress(len(dataset.train), config.batch_size, config.epochs, config.log.every_steps)
    optimizer, _ = train.build_optimizer(config, progress)
    state = jax.device_put(steps.initial_state(params, batch_stats, optimizer), NamedSharding(mesh, PartitionSpec()))
    try:
        state = checkpoints.restore(checkpoint.template({"state": state, "sums": progress.sums}), step)["state"]
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise ValueError(
            f"the checkpoint at step {step} of {folder} cannot be read; others are {known}: choose one with --step"
        ) from error
    finally:
        checkpoints.close()
    score = train.make_evaluation(
        config, steps.Feed(dataset.test, mesh, config.data.on_device), network, len(dataset.test)
    )
    return {"step": step, "images": len(dataset.test), **score(state)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nfjax.evaluate", description=__doc__.split("\n\n")[1])
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument("--step", type=int, help="of the checkpoint; by default the one with the best test accuracy")
    parser.add_argument("--data-dir", help="where the images are now, if they have moved")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    try:
        score = evaluate(arguments.workdir, arguments.step, arguments.data_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"nfjax: {error}")
    print(
        f"step {score['step']:,}: test accuracy {score['accuracy']:.2%}, loss {score['loss']:.4f}, of "
        f"{score['images']:,} images"
    )


if __name__ == "__main__":
    main()
