"""Where a run's numbers go, several places at once: JSON Lines, which the run itself reads, TensorBoard, W&B.

A tracker is one class and one line in `TRACKERS`: `tracker(folder, step, settings)` begins to write for a run in
`folder` that goes on from `step`, whose config is the nested dict `settings`; `write(kind, step, values)` takes one
record, and `close()` ends it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec
from absl import logging
from ml_collections import ConfigDict

from nfjax import _names, storage
from nfjax.runs import metrics


class Tracker(Protocol):
    """Takes the records of a run."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One record.

        Args:
            kind: "train" (since the last one), "epoch" (of the epoch that ends at this step) or "signal" (of the state
                at this step, and of the step that led to it).
            step: Steps taken so far.
            values: Numbers by name.
        """

    def close(self) -> None:
        """Nothing more will be written."""


class JsonLines:
    """Appends records to `metrics.jsonl`.

    A run that goes on from `step` first drops what it had written after that step, and from step 0 all of it: each step
    stands there once. Where lines are damaged, the file is set aside as it was, and goes on without them.
    """

    def __init__(self, folder: pathlib.Path, step: int, settings: Mapping[str, Any]):
        del settings
        self.path = folder / metrics.FILE
        kept = [record for record in metrics.read_whole(self.path) if step and record["step"] <= step]
        storage.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """A line {"kind", "step", ...}."""
        self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._stream.flush()

    def check(self) -> None:
        """Raises OSError where the file that was opened is no longer the one of this name: whoever deletes or moves a
        workdir does it to an open file, too, and what is written then is lost.
        """
        opened = os.fstat(self._stream.fileno())
        try:
            there = self.path.stat()
            same = (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)
        except OSError:
            same = False
        if not same:
            what = self.path if self.path.parent.is_dir() else f"the workdir {self.path.parent}"
            raise OSError(
                f"{what} has been deleted, moved or replaced while the run was at work: the run ends, for what it "
                "writes would be lost. Put it back and start the same command again, or give the place it was moved to "
                "as --workdir"
            )

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class TensorBoard:
    """Event files, `events.out.tfevents.*`, read by TensorBoard."""

    def __init__(self, folder: pathlib.Path, step: int, settings: Mapping[str, Any]):
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and whoever writes then waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        del settings
        self._events = EventsWriter(str(folder / "events"))
        # Tells TensorBoard to forget what it had read of later steps.
        start = step + 1 if step else 0
        self._events.write_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """A scalar "kind/name" for each number."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            summary = scalar(f"{kind}/{name}", value)
            self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class _WandbRun(msgspec.Struct):
    id: str


class WandB:
    """A run of Weights & Biases, of the project "nfjax" or $WANDB_PROJECT; needs `pip install "nfjax[wandb]"`.

    A workdir that goes on is the same run there; its id is kept in wandb.json. Records carry their step as "step".
    """

    FILE = "wandb.json"

    def __init__(self, folder: pathlib.Path, step: int, settings: Mapping[str, Any]):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "nfjax")
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=self._id(folder, step),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One point "kind/name" for each number."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()} | {"step": step})

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()

    def _id(self, folder: pathlib.Path, step: int) -> str:
        path = folder / self.FILE
        if step:
            with contextlib.suppress(OSError, storage.DamagedFileError):
                return storage.read_json(path, _WandbRun, "a new run begins at W&B").id
        name = uuid.uuid4().hex[:8]
        storage.write_json(path, {"id": name})
        return name


TRACKERS: dict[str, Callable[[pathlib.Path, int, Mapping[str, Any]], Tracker]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


class Trackers:
    """All trackers of a run as one. JSON Lines are always among them: the run reads them itself."""

    def __init__(
        self, folder: pathlib.Path, step: int, names: str = "jsonl", settings: Mapping[str, Any] | None = None
    ):
        """Opens them.

        Args:
            folder: The workdir.
            step: From which the run goes on.
            names: Names in `TRACKERS` or "package.module:class", separated by commas.
            settings: The config as a nested dict.

        One that cannot be opened ends a run that begins; a run that goes on does so without it, with a warning.

        Raises:
            ValueError: There is no such tracker, or it cannot be opened.
            OSError: Something cannot be written.
        """
        self._folder = folder
        self._open: dict[str, Tracker] = {}
        with self._explained(step):
            self._record = JsonLines(folder, step, settings or {})
            try:
                for name, tracker in named(names).items():
                    if tracker is not JsonLines:
                        self._start(name, tracker, step, settings or {})
            except BaseException:
                self.close()
                raise

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One record for each of them.

        One of a service's or of somebody's own that fails is told of and left out from then on: the run has its own
        record.

        Raises:
            OSError: It cannot be written, or the workdir has gone.
        """
        self.check()
        with self._explained(step):
            self._record.write(kind, step, values)
            for name, tracker in list(self._open.items()):
                try:
                    tracker.write(kind, step, values)
                except Exception as error:
                    if _writes_here(tracker, error):
                        raise
                    del self._open[name]
                    self._leave_out(name, error)

    def check(self) -> None:
        """Raises OSError where the workdir was deleted, moved or replaced."""
        self._record.check()

    def close(self) -> None:
        """Closes all of them; what could not be written was told before."""
        for tracker in (self._record, *self._open.values()):
            with contextlib.suppress(Exception):
                tracker.close()

    def _start(self, name: str, tracker: Callable[..., Tracker], step: int, settings: Mapping[str, Any]) -> None:
        try:
            self._open[name] = tracker(self._folder, step, settings)
        except Exception as error:
            if _writes_here(tracker, error):
                raise
            if not step:
                raise ValueError(
                    f"the tracker {name} cannot be opened: {type(error).__name__}: {error}; mend it, or leave it "
                    "out of --config.log.trackers"
                ) from error
            self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        logging.warning(
            "the tracker %s fails with %s: %s; the run goes on without it, its numbers are in %s",
            name,
            type(error).__name__,
            error,
            self._record.path,
        )

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"the metrics of step {step:,} cannot be written to {self._folder} ({error.strerror or error}); what "
                "was saved before is whole: mend it, and start the same command again"
            ) from error


class NoTrackers:
    """In place of `Trackers` in all processes but the first."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""


def _writes_here(tracker: Any, error: Exception) -> bool:
    """Whether it is the workdir that cannot be written, and not a service or somebody's own class that fails: errors of
    a connection are OSErrors, too.
    """
    return isinstance(error, OSError) and TensorBoard in (tracker, type(tracker))


def named(names: str) -> dict[str, Callable[[pathlib.Path, int, Mapping[str, Any]], Tracker]]:
    """The trackers of "tensorboard, wandb" by name. Raises ValueError for an unknown one."""
    found = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        found[name] = _names.find("log.trackers", name, TRACKERS)
    return found


def check(config: ConfigDict) -> None:
    """Raises ValueError for trackers that there are not, before anything is written."""
    trackers = named(config.log.trackers)
    for name, tracker in trackers.items():
        try:
            inspect.signature(tracker).bind(pathlib.Path(), 0, {})
        except TypeError as error:
            raise ValueError(f"log.trackers: {name} is called with (folder, step, settings): {error}") from error
        lacking = [method for method in ("write", "close") if not hasattr(tracker, method)]
        if inspect.isclass(tracker) and lacking:
            raise ValueError(f"log.trackers: {name} has no method {lacking[0]}: expected write and close")
    if WandB in trackers.values() and importlib.util.find_spec("wandb") is None:
        raise ValueError('log.trackers: wandb is not installed; pip install "nfjax[wandb]"')
