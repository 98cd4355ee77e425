"""Saves and restores a pytree of arrays with orbax: atomically, asynchronously, keeping the newest few and the best."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from nfjax import distributed, storage
from nfjax.runs import checksums

FOLDER = "checkpoints"
CHECKSUMS = "checksums"  # the name under which they are saved beside the tree
UNTESTED = -1.0  # stands for the accuracy of a checkpoint that was saved between two evaluations


class DamagedError(ValueError):
    """What was read is not what was saved. The message names the checkpoint; reason: what is wrong with it; step: whose
    it is.
    """

    def __init__(self, directory: epath.Path, step: int, reason: str):
        super().__init__(f"checkpoint {step} in {directory} is damaged: {reason}")
        self.step, self.reason = step, reason


class _Metrics(msgspec.Struct, forbid_unknown_fields=True):
    """What stands in the file `metrics` of a checkpoint; those of the first versions have no checksum."""

    accuracy: float
    checksum: int | None = None


def _metrics(step: int, accuracy: float) -> dict[str, float]:
    return {"accuracy": accuracy, "checksum": zlib.crc32(f"step {step} accuracy {accuracy!r}".encode())}


class Checkpoints:
    """The numbered checkpoints of a run, under `workdir/checkpoints/<step>`.

    workdir: a local directory, or one in a bucket. keep: how many of the newest are kept, besides the one with the
    highest accuracy.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 1, read_only: bool = False):
        self.directory = epath.Path(workdir).absolute() / FOLDER
        policies = ocp.checkpoint_managers
        newest = policies.LatestN(keep)
        best = policies.BestN(get_metric_fn=_accuracy, n=1)
        with _without_remarks():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([newest, best]),
                best_fn=_accuracy,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            )
            self._check_metrics(read_only)
            self.manager = ocp.CheckpointManager(self.directory, options=options)
        self._options, self._keep = options, keep

    def _check_metrics(self, read_only: bool) -> None:
        """Sets aside checkpoints whose metrics are damaged: they decide which one is the best, and orbax would not open
        the whole folder where they cannot be parsed.
        """
        damaged = {}
        for path in sorted(self.directory.glob("*/metrics/metrics")):
            name = path.parent.parent.name
            if not name.isdigit():
                continue  # a save that was never finished: orbax clears it away
            try:
                _check_metrics(path, int(name))
            except storage.DamagedFileError as error:
                if read_only:
                    way_out = "start the training command again, which sets it aside, or move it away"
                    raise DamagedError(self.directory, int(name), f"{error}; {way_out}") from None
                damaged[name] = str(error)
        if not read_only:
            distributed.barrier("metrics of checkpoints are read")  # nothing is moved while another still looks
        for name, reason in damaged.items():
            self._set_aside(name, reason)

    def _set_aside(self, step: int | str, reason: str) -> None:
        if distributed.is_first():
            self._move(step, reason)
        distributed.barrier(f"set aside {step}")

    def _move(self, step: int | str, reason: str) -> None:
        folder = self.directory.parent / "damaged_checkpoints"
        folder.mkdir(exist_ok=True)
        number = sum(path.name.partition(".")[0] == str(step) for path in folder.iterdir())
        damaged = folder / (f"{step}.{number}" if number else str(step))
        (self.directory / str(step)).rename(damaged)
        logging.warning(
            "checkpoint %s is damaged (%s); moved to %s; falling back to the one before it", step, reason, damaged
        )

    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return sorted(self.manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest accuracy; the newest where none has one, None if there is no checkpoint."""
        best = self.manager.best_step()
        tested = best is not None and _accuracy(self.manager.metrics(best)) != UNTESTED
        return best if tested else self.manager.latest_step()

    def save(self, step: int, tree: Any, accuracy: float | None = None) -> None:
        """Starts to save; the arrays may be changed or donated as soon as this returns."""
        metrics = _metrics(step, UNTESTED if accuracy is None else float(accuracy))
        tree = {**tree, CHECKSUMS: checksums.seal(tree)}
        with self._explained():
            self.manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics, force=True)

    def restore(self, template: Any, step: int) -> Any:
        """The pytree saved at `step`, with the structure, dtypes and shardings of `template`.

        Raises DamagedError where it is not bit for bit what was saved, and whatever orbax does for what it cannot read.
        """
        stored = np.zeros(1, np.uint32)  # of any length
        restored = self.manager.restore(step, args=ocp.args.StandardRestore({**template, CHECKSUMS: stored}))
        stored = restored.pop(CHECKSUMS)
        if (reason := checksums.damage(restored, stored)) is not None:
            raise DamagedError(self.directory, step, reason)
        return restored

    def restore_newest(self, template: Any) -> tuple[int, Any] | None:
        """The newest checkpoint that can be read, as (step, pytree); None if none was ever saved.

        A damaged one is moved to `damaged_checkpoints`, with a warning, and the one before it is tried. What a kill has
        left of those that were being deleted is cleared away.
        Raises ValueError if there are checkpoints and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                restored = self.restore(template, step)
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                reason = _told(error)
                if self._is_of_another(template, step):
                    raise ValueError(
                        f"checkpoint {step} in {self.directory} is of another network: {reason}"
                    ) from error
                self._set_aside(step, reason)
                # A manager that failed once reads nothing any more: orbax has settled on another layout.
                self.manager.close()
                self.manager = ocp.CheckpointManager(self.directory, options=self._options)
            else:
                self._prune()
                return step, restored
        if steps or (self.directory.parent / "damaged_checkpoints").exists():
            raise ValueError(
                f"none of the checkpoints of {self.directory.parent} can be read (they are in damaged_checkpoints); "
                "start again with another --workdir"
            )
        return None

    def _prune(self) -> None:
        """Deletes what the next save would delete; a run that is complete saves no more."""
        steps = self.steps()
        for step in sorted(set(steps[: -self._keep]) - {self.manager.best_step()}):
            self.manager.delete(step)

    def restore_untyped(self, step: int) -> Any:
        """The pytree saved at `step` as nested dicts of NumPy arrays, whose keys are strings.

        Raises DamagedError where it cannot be read, or is not bit for bit what was saved.
        """
        reader = ocp.StandardCheckpointer()
        try:
            path = self.directory / str(step) / "default"
            with _without_remarks():
                stored = reader.metadata(path).item_metadata.tree
            tree = reader.restore(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored))
            reason = checksums.damage(tree, tree.pop(CHECKSUMS))
        except Exception as error:  # orbax and tensorstore raise many types for damaged files
            raise DamagedError(self.directory, step, _told(error)) from error
        finally:
            reader.close()
        if reason is not None:
            raise DamagedError(self.directory, step, reason)
        return tree

    def _is_of_another(self, template: Any, step: int) -> bool:
        """Whether it is whole, and of other arrays than `template`."""
        try:
            return checksums.described(self.restore_untyped(step)) != checksums.described(template)
        except DamagedError:
            return False

    def wait(self) -> None:
        """Returns when everything is on disk. Raises OSError where it does not get there."""
        with self._explained():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """An error of one of orbax's many kinds as OSError that says what is safe; it may be of the save before."""
        try:
            yield
        except Exception as error:
            reason, kept = str(error).partition("\n")[0][:300], "what was saved before is whole"
            if "No space left" in str(error):
                reason = "the disk is full"
            elif isinstance(error, FileNotFoundError) or "NOT_FOUND" in str(error):
                reason, kept = "it was deleted or moved meanwhile", "what is left of those saved before is whole"
            raise OSError(
                f"a checkpoint cannot be written to {self.directory} ({reason}); {kept}: mend it, and start the same "
                "command again"
            ) from error

    def close(self) -> None:
        """Whether everything got to the disk is told by `wait`, and not here, where another error may be on its way."""
        try:
            self.manager.close()
        except Exception as error:  # one of orbax's many kinds, of a save that was under way
            logging.info("checkpoints closed with %r", error)


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Orbax warns that a folder is only read, as it was told to, and of a file that a step inside of a manager never
    has. Its errors are shown.
    """

    def keep(record: Any) -> bool:
        return "orbax" not in record.pathname or record.levelno >= logging.converter.STANDARD_ERROR

    logger = logging.get_absl_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _told(error: Exception) -> str:
    if isinstance(error, DamagedError):
        return error.reason
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _check_metrics(path: epath.Path, step: int) -> None:
    """Raises storage.DamagedFileError unless the file holds the accuracy that was saved at this step."""
    found = storage.read_json(path, _Metrics, "it cannot be ranked")
    if found.checksum not in (None, _metrics(step, found.accuracy)["checksum"]):
        raise storage.DamagedFileError(f"{path} is damaged: its accuracy is not the one that was saved at step {step}")


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]


def template(tree: Any) -> Any:
    """What `restore` needs to know of a pytree: shapes, dtypes and shardings; NumPy arrays stand for themselves."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, tree
    )
