"""The best checkpoint of a run, or a chosen one: its network, and its score on the run's test images.

`python -m nfjax.evaluate` is the same as `nfjax evaluate`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from nfjax import cli

    cli.main("evaluate")  # which imports this module, and ends the process

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfjax.runs import checkpoint, checksums, files, mirror
from nfjax.runs import workdir as workdirs
from nfjax.training import assembly
from nfjax.training import loop as train
from nfjax.training import sharding as meshes
from nfjax.training import step as steps


def load_model(workdir: str, step: int | None = None) -> nnx.Module:
    """The trained network of a run, in evaluation mode, from the checkpoint at `step`, by default the best one.

    Best is the highest test accuracy among the checkpoints that were kept.
    Raises FileNotFoundError if there is no run or no such checkpoint, ValueError if it cannot be read.
    """
    folder = mirror.pull(workdir, "evaluation")
    config = files.read_config(folder)
    step = _known_step(folder, step)
    key = jax.random.key(0)  # every parameter is replaced below
    num_classes = len(files.read_data(folder).class_names)
    try:
        model = nnx.eval_shape(lambda: assembly.build_model(config, num_classes, key))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / files.CONFIG} describes no network that can be built: {error}") from error
    checkpoints = checkpoint.Checkpoints(mirror.location(folder), read_only=True)
    try:
        stored = checkpoints.restore_untyped(step)
    except checkpoint.DamagedError as error:
        others = [known for known in checkpoints.steps() if known != step]
        raise ValueError(f"{error}; choose another of {others} by step") from error
    finally:
        checkpoints.close()
    for kind, name in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        state, found = nnx.state(model, kind), stored.get("state", {}).get(name, {})
        if checksums.described(nnx.to_pure_dict(state)) != checksums.described(found):
            raise ValueError(
                f"checkpoint {step} in {checkpoints.directory} is of another network than {folder / files.CONFIG} "
                "describes: were files of several runs mixed?"
            )
        leaves = jax.tree.leaves(_with_keys_of(nnx.to_pure_dict(state), found))
        nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(leaf) for leaf in leaves]))
    model.eval()
    return model


def _known_step(folder: pathlib.Path, step: int | None) -> int:
    if not (mirror.location(folder) / checkpoint.FOLDER).is_dir():
        raise FileNotFoundError(f"{folder} has no checkpoints: the run was stopped before its first one")
    checkpoints = checkpoint.Checkpoints(mirror.location(folder), read_only=True)
    known, best = checkpoints.steps(), checkpoints.best_step()
    checkpoints.close()
    step = best if step is None else step
    if step not in known:
        listed = f"expected one of {', '.join(map(str, known))}" if known else "there are none"
        raise FileNotFoundError(f"{folder} has no checkpoint at step {step}: {listed}")
    return step


def _with_keys_of(template: Any, stored: Any) -> Any:
    """`stored` with the keys of `template`: a checkpoint read without one has strings for integers."""
    if not isinstance(template, dict):
        return stored
    return {key: _with_keys_of(inner, stored[str(key)]) for key, inner in template.items()}


def evaluate(workdir: str, step: int | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """{"step", "images", "loss", "accuracy"} of the checkpoint at `step`, by default the best one.

    data_dir replaces the data directory of the run, where the images have moved.
    Raises FileNotFoundError if there is no run or no checkpoint, ValueError for images of other classes.
    """
    folder = mirror.pull(workdir, "evaluation")
    config = files.read_config(folder)
    step = _known_step(folder, step)
    dataset = assembly.open_data(config, config.data.dir if data_dir is None else data_dir)
    workdirs.check_classes(folder, dataset)
    network, params, batch_stats = steps.as_functions(load_model(workdir, step))
    mesh = meshes.make()
    state = {"params": params, "batch_stats": batch_stats}
    state = meshes.place(state, meshes.replicated(mesh))
    feed = assembly.make_feed(config, dataset, "test", mesh, folder)
    score = train.make_evaluation(config, feed, network, len(dataset.test))(state)
    return {"step": step, **score}
