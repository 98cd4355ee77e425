"""How long a run will take, from a measured step, and whether it ends in the time that is left."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import tempfile
import time
from typing import Annotated

import jax
import msgspec
from absl import logging
from ml_collections import ConfigDict

from nfjax import storage
from nfjax.runs import metrics, workdirs
from nfjax.training import failures, networks, setup
from nfjax.training.progress import Progress
from nfjax.training.state import Steps

FILE = "paces.json"
TIMED = 2.0  # seconds of steps that are timed, at least two dispatches of them
EVALUATION = 1 / 3  # of the time of a training step for as many images: it goes forward, and back, which is twice that
RESERVE = 1.1  # so many times what is expected has to be left
# What changes nothing in the time of a step.
ELSEWHERE = ("seed", "epochs", "model.init", "optim.learning_rate", "optim.weight_decay", "data.share")


@dataclasses.dataclass(frozen=True)
class Pace:
    """Of a network on a device.

    Attributes:
        start: Seconds of building, compiling and the first dispatch.
        step: Seconds of a training step.
    """

    start: Annotated[float, msgspec.Meta(ge=0)]
    step: Annotated[float, msgspec.Meta(ge=0)]

    def seconds(self, config: ConfigDict, images: tuple[int, int], epochs: int = 0) -> float:
        """Of a run on so many training and test images, of which so many `epochs` are there already."""
        progress = Progress(images[0], config.batch_size, config.epochs, config.log.every_steps)
        before = progress.epoch_ends[epochs - 1] if epochs else 0
        tested = (config.epochs - epochs) * images[1] / config.batch_size
        return self.start + self.step * (progress.total - before + EVALUATION * tested)


def measure(config: ConfigDict) -> Pace:
    """The pace of a run on the devices of this process; what is compiled for it is what the run itself takes.

    Raises:
        ValueError: Whatever the run itself would, such as where the memory does not suffice.
    """
    begin, seconds, steps = time.perf_counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stdout(io.StringIO()):
        try:
            run = setup.build(config, workdirs.open_for(config, f"{parent}/run"))
            with setup.closing(run), run.bar, contextlib.closing(run.work()) as work:
                start = None
                for dispatch in work:
                    before = time.perf_counter()
                    run.state, _ = run.train_step(run.state, dispatch, run.key)
                    jax.block_until_ready(run.state)
                    if start is None:
                        start = time.perf_counter() - begin
                        continue
                    seconds += time.perf_counter() - before
                    steps += int(dispatch.count) if isinstance(dispatch, Steps) else 1
                    if seconds > TIMED:
                        break
        except jax.errors.JaxRuntimeError as error:
            raise failures.of_runtime(error, parent) from error
    return Pace(round(start, 2), seconds / steps if steps else start)


class Forecast:
    """How long each run will take, and which does not end in time.

    Args:
        until: By `time.monotonic`, when all has to be over; infinity for no end, where nothing is measured or told.
        folder: Keeps what was measured for the next time.
        images: How many there are to train on and to test with.
    """

    def __init__(self, until: float, folder: pathlib.Path, images: tuple[int, int]):
        self._until, self._path, self._images = until, folder / FILE, images
        self._paces = _read(self._path)
        self._longest = 0.0  # seconds that it took to measure a network
        self._too_deep = math.inf  # layers from which on a run takes too long
        self._least = math.inf  # minutes with which the quickest of the runs that were left out would end
        self.left_out = 0

    @property
    def left(self) -> float:
        """Seconds."""
        return self._until - time.monotonic()

    def of(self, config: ConfigDict, workdir: pathlib.Path) -> tuple[bool, str]:
        """Whether a run is to be started, and its time or why not, for a person."""
        if math.isinf(self._until):
            return True, ""
        if isinstance(pace := self._pace(config), str):
            self.left_out += 1
            return False, f": not started, {pace}"
        done = _epochs_done(workdir, config.epochs)
        needed, left = pace.seconds(config, self._images, done), self.left
        told = f"about {shown(needed)} at {1000 * pace.step:.3g} ms a step, {shown(left)} are left"
        if RESERVE * needed <= left:
            return True, f": {told}"
        if not done and (room := int((left / RESERVE - pace.start) / (needed - pace.start) * config.epochs)) > 0:
            told += f", room for --epochs={room}"
        self.left_out += 1
        self._too_deep = min(self._too_deep, config.model.depth)
        self._least = min(self._least, RESERVE * needed / 60)
        return False, f": not started, {told}"

    def summary(self) -> str:
        """What was left out, and the way out."""
        enough = (
            f"--minutes={math.ceil(self._least)} is enough for the shortest, and " if self._least < math.inf else ""
        )
        runs = "1 run does" if self.left_out == 1 else f"{self.left_out} runs do"
        return f"{runs} not end in the time that is left: {enough}fewer --epochs make all of them shorter"

    def _pace(self, config: ConfigDict) -> Pace | str:
        """Why not, where there is no use in measuring it."""
        key = _key(config)
        if key not in self._paces:
            # A deeper network takes no less time than one that was measured, and whatever is compiled takes time.
            if config.model.depth > self._too_deep:
                return "deeper than one that does not end in time"
            if self.left <= self._longest:
                return f"measuring a step takes the {shown(self.left)} that are left"
            print(f"\nmeasuring a step of {networks.title(config)}", flush=True)
            begin = time.monotonic()
            self._paces[key] = measure(config)
            self._longest = max(self._longest, time.monotonic() - begin)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_json(self._path, {name: dataclasses.asdict(pace) for name, pace in self._paces.items()})
        return self._paces[key]


def shown(seconds: float) -> str:
    """ "45 s", "12 min"."""
    seconds = max(seconds, 0.0)
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _epochs_done(workdir: pathlib.Path, epochs: int) -> int:
    """How many of a run's epochs are there; a log that is damaged is the training's to mend, and counts for none."""
    try:
        return min(sum(line["kind"] == "epoch" for line in metrics.read(workdir)), epochs)
    except storage.DamagedFileError:
        return 0


def _key(config: ConfigDict) -> str:
    """ "ResNet-18 convshort on 1 x H100, 0123abcd": the same for all runs whose steps take the same time."""
    settings = {name: value for name, value in workdirs.essence(config).items() if name not in ELSEWHERE}
    where = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    digest = hashlib.sha256(json.dumps([settings, where], sort_keys=True).encode()).hexdigest()[:8]
    return f"{networks.title(config)} on {where}, {digest}"


def _read(path: pathlib.Path) -> dict[str, Pace]:
    """None, with a warning, where they cannot be read: they are measured again."""
    try:
        return storage.read_json(path, dict[str, Pace], "it is written anew")
    except FileNotFoundError:
        return {}
    except storage.DamagedFileError as error:
        logging.warning("%s", error)
        return {}
