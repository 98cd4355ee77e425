"""The best checkpoint of a run, or a chosen one: its network, and how good it is on the run's images or on others.

`python -m nfjax.evaluate` is the same as `nfjax evaluate`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from nfjax import cli

    cli.main("evaluate")  # which imports this module, and ends the process

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from nfjax import data
from nfjax._names import lookup
from nfjax.assessment import Assessment
from nfjax.data.sources import folder as class_folders
from nfjax.runs import checkpoint, checksums, files, mirror, workdirs
from nfjax.training import evaluation, loader, networks, preprocessing, rng, sharding


def load_model(workdir: str | os.PathLike[str], step: int | None = None, ema: bool = False) -> nnx.Module:
    """The trained network of a run, in evaluation mode.

    Args:
        workdir: Of the run.
        step: Of the checkpoint, by default the best one: the highest test accuracy among those that were kept.
        ema: Whether its parameters are the average over the steps, where the run had `optim.ema_decay`.

    Raises:
        FileNotFoundError: There is no run or no such checkpoint.
        ValueError: It cannot be read, or has no average.
    """
    folder = mirror.pull(os.fspath(workdir), "evaluation")
    return restore(folder, files.read_config(folder), step, ema)[0]


def restore(
    folder: pathlib.Path, config: ConfigDict, step: int | None = None, ema: bool = False
) -> tuple[nnx.Module, int]:
    """(`load_model`, the step of its checkpoint); errors as of that.

    Args:
        folder: Of the run, on this machine (`mirror.pull`).
        config: Of the run; its `model.dtype` may be another one.
        step: Of the checkpoint.
        ema: Whether to take the average of the weights.
    """
    step, model = _known_step(folder, step), _network(folder, config)
    return _trained(model, folder, config, step, _restored(folder, step), ema), step


def _network(folder: pathlib.Path, config: ConfigDict) -> nnx.Module:
    """The network of a run, its shapes alone. Raises ValueError where the config describes none."""
    try:
        return networks.shapes(config, len(files.read_data(folder).class_names))
    except ValueError as error:
        raise ValueError(f"{folder / files.CONFIG} describes no network that can be built: {error}") from error


def _restored(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """The state in a checkpoint. Raises ValueError where it cannot be read."""
    checkpoints = checkpoint.Checkpoints(mirror.location(folder), read_only=True)
    try:
        return checkpoints.restore_untyped(step).get("state", {})
    except checkpoint.DamagedError as error:
        others = [known for known in checkpoints.steps() if known != step]
        raise ValueError(f"{error}; choose another of {others} by step") from error
    finally:
        checkpoints.close()


def _trained(
    model: nnx.Module, folder: pathlib.Path, config: ConfigDict, step: int, state: dict[str, Any], ema: bool
) -> nnx.Module:
    """`model` with the weights of a checkpoint's state; other arguments and errors as of `load_model`."""
    if ema and "ema" not in state:
        raise ValueError(f"{folder} has no average of the weights: it was trained without --config.optim.ema_decay")
    weights, where = state["ema"] if ema else state, mirror.location(folder).absolute() / checkpoint.FOLDER
    for kind, name in ((nnx.Param, "params"), (networks.STATE, "batch_stats")):
        part, found = nnx.state(model, kind), weights.get(name, {})
        expected, there = checksums.described(nnx.to_pure_dict(part)), checksums.described(found)
        if ema:  # which is kept in float32
            expected, there = ([(name, shape) for name, _, shape in leaves] for leaves in (expected, there))
        if list(expected) != list(there):
            raise ValueError(
                f"checkpoint {step} in {where} is of another network than {folder / files.CONFIG} describes: were "
                "files of several runs mixed?"
            )
        leaves, structure = jax.tree.flatten(part)
        found = jax.tree.leaves(_with_keys_of(nnx.to_pure_dict(part), found))
        cast = [jnp.asarray(there, leaf.dtype) for there, leaf in zip(found, leaves, strict=True)]
        nnx.update(model, jax.tree.unflatten(structure, cast))
    networks.begin_streams(model, rng.of_seed(config.seed, "training"))
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


def evaluate(
    workdir: str | os.PathLike[str], step: int | None = None, data_dir: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """{"step", "images", "loss", "accuracy"} of the checkpoint at `step`, by default the best one; "ema_loss" and
    "ema_accuracy", too, where the run has an average of the weights.

    Args:
        workdir: Of the run.
        step: Of the checkpoint.
        data_dir: In place of the data directory of the run, where the images have moved.

    Raises:
        FileNotFoundError: There is no run or no checkpoint.
        ValueError: The images are of other classes, or the checkpoint cannot be read.
    """
    folder = mirror.pull(os.fspath(workdir), "evaluation")
    config = files.read_config(folder)
    step = _known_step(folder, step)
    dataset = loader.open_data(config, config.data.dir if data_dir is None else data_dir)
    workdirs.check_classes(folder, dataset)
    mesh, normalize = sharding.make(), preprocessing.make_normalize(config)
    test_loader = loader.build(config, dataset, "test", mesh, folder)

    state = _restored(folder, step)

    def score(ema: bool) -> dict[str, float]:
        network, *weights = networks.as_functions(_trained(_network(folder, config), folder, config, step, state, ema))
        weights = sharding.place(weights, sharding.replicated(mesh))
        return evaluation.score(network, normalize, test_loader, *weights, config.train.onednn)

    scores = {"step": step, **score(ema=False)}
    if config.optim.ema_decay is not None:
        averaged = score(ema=True)
        scores |= {"ema_loss": averaged["loss"], "ema_accuracy": averaged["accuracy"]}
    return scores


SPLITS = ("test", "train")


@dataclasses.dataclass(frozen=True, eq=False)
class Assessed:
    """A checkpoint's predictions for images, and these images.

    Attributes:
        step: Of the checkpoint.
        has_average: Whether there is an average of its weights, too.
        assessment: Of the predictions, for the images that could be read.
        name: From the number of an image among them to how a person finds it.
        image: To its pixels, as the network sees them before they are normalized, uint8 [H, W, 3].
    """

    step: int
    has_average: bool
    assessment: Assessment
    name: Callable[[int], str]
    image: Callable[[int], np.ndarray]


def assess(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    split: str = "test",
    images: str | os.PathLike[str] | None = None,
    ema: bool = False,
) -> Assessed:
    """How good a checkpoint is beyond its accuracy: by class, what it takes for what, whether its confidence is earned.

    Args:
        workdir: Of the run.
        step: Of the checkpoint, by default the best one.
        data_dir: In place of the data directory of the run, where the images have moved.
        split: "test" or "train"; the images of either are cut out and resized as test images are.
        images: A folder of other images in their place, `images/<class>/*.jpg`; a class of the run may be missing.
        ema: Whether the weights are the average over the steps, where the run had `optim.ema_decay`.

    Raises:
        FileNotFoundError: There is no run, no checkpoint, or no image.
        ValueError: The images are of other classes, or the checkpoint cannot be read.
    """
    lookup("split", split, dict.fromkeys(SPLITS), callables=False)
    folder = mirror.pull(os.fspath(workdir), "evaluation")
    config = files.read_config(folder).copy_and_resolve_references()
    step = _known_step(folder, step)
    class_names = tuple(files.read_data(folder).class_names)
    with config.unlocked():  # read where they lie: what is decoded has lost its name
        config.data.keep = "disk"
    if images is not None:
        chosen: data.Images | data.Encoded = class_folders.of_class_folders(os.fspath(images), class_names)
    else:
        directory = config.data.dir if data_dir is None else data_dir
        dataset = data.load(config.data.source, directory, config.data.image_size).thinned(config.data.share)
        workdirs.check_classes(folder, dataset)
        chosen = getattr(dataset, split)
    mesh, normalize = sharding.make(), preprocessing.make_normalize(config)
    shown = data.Dataset(chosen, chosen, class_names)
    batches = loader.build(config, shown, "test", mesh, None)
    state = _restored(folder, step)
    network, *weights = networks.as_functions(_trained(_network(folder, config), folder, config, step, state, ema))
    weights = sharding.place(weights, sharding.replicated(mesh))
    try:
        found = evaluation.predictions(network, normalize, batches, *weights, config.train.onednn)
    finally:
        batches.close()
    middle = loader.transform(config, "test")

    def name(i: int) -> str:
        example = int(found.examples[i])
        return f"{split} image {example}" if isinstance(chosen, data.Images) else chosen.name(example)

    def pixels(i: int) -> np.ndarray:
        example = int(found.examples[i])
        if isinstance(chosen, data.Images):
            return chosen.images[example]
        return middle(chosen.reader(chosen.reference(example))[0]).copy()

    return Assessed(step, "ema" in state, Assessment(class_names, *found[1:]), name, pixels)
