"""From the workdir of a run, or a folder that `nfjax export` wrote, to a predictor."""

from __future__ import annotations

import os
import pathlib

from nfjax import _streams as streams
from nfjax import resnet
from nfjax.data import remote
from nfjax.inference import _folder, hub
from nfjax.inference.predictor import BATCH_SIZE, Origin, Predictor
from nfjax.inference.preprocessing import Preprocessing
from nfjax.runs import files, metrics, mirror
from nfjax.training import deployment, networks, rng

SMALL_BLOCKS, SMALL_HEAD = 64, 2**24  # of an export's network, which is built in any case


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str | None = None,
    batch_size: int = BATCH_SIZE,
    trust: bool = False,
) -> Predictor:
    """A trained network, ready to be used::

        predictor = nfjax.load("runs/mine")
        predictor(["cat.jpg", "dog.png"]).labels

    Args:
        path: The workdir of a run, which may be one in a bucket; a folder that `nfjax export` wrote; or
            "hf://USER/NAME", one that it sent to the Hugging Face Hub, "hf://USER/NAME@REVISION" for a certain one.
        step: Of the checkpoint of a run, by default the one with the best test accuracy.
        ema: Whether a run's weights are the average over the steps, where it had `optim.ema_decay`.
        dtype: In which the network computes, "float32" or "bfloat16"; None for that in which it was trained. The
            parameters keep theirs.
        batch_size: Images that are computed together, over all devices.
        trust: Whether code that the folder names may be run: a network of one's own is made by a function
            "package.module:function", and to import that module is to run it.

    Raises:
        ConnectionError: It is on the Hub, which cannot be reached, and not on this machine.
        FileNotFoundError: There is no such folder, no model in it, or no such checkpoint.
        ValueError: A file is damaged, of a later version or of another network; or the network is of somebody's own
            code, and not trusted.
    """
    place = os.fspath(path)
    folder = hub.fetch(place) if place.startswith(hub.PREFIX) else mirror.pull(place, "inference")
    if not remote.is_remote(place) and not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{place} {what}: expected the workdir of a run, or a folder that nfjax export wrote")
    if not (folder / _folder.SETTINGS).exists():
        raise FileNotFoundError(
            f"{place} is no model: it has no {_folder.SETTINGS}; expected the workdir of a run, or a folder that nfjax "
            "export wrote"
        )
    if not _folder.is_export(folder):
        if place.startswith(hub.PREFIX):
            raise ValueError(f"{place} is no export: its {_folder.SETTINGS} is of something else than nfjax export")
        return _of_run(folder, step, ema, dtype, batch_size, trust)
    if remote.is_remote(place) and not place.startswith(hub.PREFIX):
        raise ValueError(f"{place} is an export in a bucket: copy it to this machine, and load the copy")
    if step is not None or ema:
        asked = f"step={step}" if step is not None else f"ema={ema}"
        raise ValueError(f"{place} is an export, which holds one network: {asked} is for the workdir of a run")
    return _of_export(folder, dtype, batch_size, trust)


def _of_run(
    folder: pathlib.Path, step: int | None, ema: bool, dtype: str | None, batch_size: int, trust: bool
) -> Predictor:
    from nfjax import evaluate  # here: an export needs neither checkpoints nor the loaders of images

    config, described = files.read_config(folder), files.read_data(folder)
    _check_trusted(folder, networks.architecture(config), trust)
    config = deployment.computing_in(config, dtype)
    model, step = evaluate.restore(folder, config, step, ema)
    return Predictor(
        model,
        Preprocessing(**deployment.pixels(config, described.identity)),
        described.class_names,
        batch_size=batch_size,
        architecture=networks.architecture(config),
        origin=Origin(
            step, ema, _accuracy(folder, step, ema), described.test_images, described.train_images,
            deployment.settings(config),
        ),
    )  # fmt: skip


def _of_export(folder: pathlib.Path, dtype: str | None, batch_size: int, trust: bool) -> Predictor:
    settings = _folder.read(folder)
    architecture = _folder.architecture(settings)
    _check_trusted(folder, architecture, trust)
    if dtype is not None:
        architecture.check_dtype(dtype)
        architecture = networks.Architecture(architecture.name, architecture.arguments, dtype)
    preprocessing = _folder.preprocessing(settings, folder / _folder.SETTINGS)
    sizes = _folder.sizes(folder)
    try:
        _check_arguments(architecture, len(settings.class_names), sizes)
        model = architecture.shapes(len(settings.class_names), preprocessing.image_size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / _folder.SETTINGS} describes no network that can be built: {error}") from error
    _folder.load_weights(folder, model, settings)
    networks.begin_streams(model, rng.of_seed(0, "training"))
    return Predictor(
        model,
        preprocessing,
        map(streams.printable, settings.class_names),
        batch_size=batch_size,
        architecture=architecture,
        origin=_folder.origin(settings),
    )


def _check_arguments(made: networks.Architecture, classes: int, sizes: list[int]) -> None:
    """ValueError where a network of nfjax would be far larger than its weights, whose `sizes` these are: to build it,
    only to find that they are of another one, could take hours; or where an argument has a kind that it never looks at.
    """
    given = made.arguments
    if not made.is_ours():
        return
    if not isinstance(given.get("remat", False), bool):
        raise ValueError(f"remat={given['remat']!r}: expected true or false")
    stages, width = given.get("stage_sizes"), given.get("width")
    stages = (1,) if stages is None else resnet.stages(None, stages, "basic")[1]
    most = min(networks.MOST_BLOCKS, max(SMALL_BLOCKS, len(sizes)))
    if sum(stages) > most:
        raise ValueError(f"stage_sizes has {sum(stages):,} blocks: expected at most {most:,} for {len(sizes):,} arrays")
    if isinstance(width, int) and width * 2 ** (len(stages) - 1) * classes > max([SMALL_HEAD, *sizes]):
        raise ValueError(f"width={width}: no array of {_folder.WEIGHTS} is as large as the head would be")


def _check_trusted(folder: pathlib.Path, architecture: networks.Architecture, trust: bool) -> None:
    if (code := architecture.code()) and not trust:
        raise ValueError(
            f"{folder / _folder.SETTINGS} names {', '.join(map(repr, code))}: a function of somebody's own, and to "
            "load the network is to import that module, which runs its code. If you know that code, load it with "
            "trust=True (--trust on the command line)"
        )


def _accuracy(folder: pathlib.Path, step: int, ema: bool) -> float | None:
    """On the test images, where the run has scored them at this step."""
    name = "test_ema_accuracy" if ema else "test_accuracy"
    scored = [record for record in metrics.read(folder) if record["kind"] == "epoch" and record["step"] == step]
    return scored[-1].get(name) if scored else None
