"""Saves and restores a pytree of arrays with orbax: atomically, asynchronously, keeping the newest few and the best."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from nfjax import distributed

FOLDER = "checkpoints"
CHECKSUMS = "checksums"  # the name under which they are saved beside the tree
UNTESTED = -1.0  # stands for the accuracy of a checkpoint that was saved between two evaluations


class DamagedError(ValueError):
    """What was read is not what was saved."""


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
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            best_fn=_accuracy,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._check_metrics(read_only)
        self._options, self._keep = options, keep
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def _check_metrics(self, read_only: bool) -> None:
        """Sets aside checkpoints whose metrics cannot be parsed: orbax would not open the whole folder."""
        for path in sorted(self.directory.glob("*/metrics/metrics")):
            if not path.parent.parent.name.isdigit():
                continue  # a save that was never finished: orbax clears it away
            try:
                float(json.loads(path.read_text())["accuracy"])
            except (ValueError, TypeError, KeyError):
                step = path.parent.parent.name
                if read_only:
                    raise ValueError(
                        f"checkpoint {step} in {self.directory} is damaged; move it away, or start the training "
                        "command again, which sets it aside and goes on from the one before it"
                    ) from None
                self._set_aside(step, "its metrics are cut short")

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
        metrics = {"accuracy": UNTESTED if accuracy is None else accuracy}
        tree = {**tree, CHECKSUMS: checksums(_arrays(tree))}
        with self._explained():
            self.manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics, force=True)

    def restore(self, template: Any, step: int) -> Any:
        """The pytree saved at `step`, with the structure, dtypes and shardings of `template`.

        Raises DamagedError where it is not bit for bit what was saved, and whatever orbax does for what it cannot read.
        """
        arrays = _arrays(template)
        stored = np.zeros(len(arrays), np.uint32)
        restored = self.manager.restore(step, args=ocp.args.StandardRestore({**template, CHECKSUMS: stored}))
        stored = restored.pop(CHECKSUMS)
        found = np.asarray(checksums(_arrays(restored)))
        if (found != stored).any():
            raise DamagedError(f"{(found != stored).sum()} of its {len(found)} arrays are not those that were saved")
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
                reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
                if not isinstance(error, DamagedError) and self._readable(step):
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
        """The pytree saved at `step` as nested dicts of NumPy arrays, whose keys are strings."""
        reader = ocp.StandardCheckpointer()
        try:
            path = self.directory / str(step) / "default"
            stored = reader.metadata(path).item_metadata.tree
            return reader.restore(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored))
        finally:
            reader.close()

    def _readable(self, step: int) -> bool:
        try:
            return "state" in self.restore_untyped(step)
        except Exception:
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
            reason = "the disk is full" if "No space left" in str(error) else str(error).partition("\n")[0][:300]
            raise OSError(
                f"a checkpoint cannot be written to {self.directory} ({reason}); what was saved before is whole: mend "
                "it, and start the same command again"
            ) from error

    def close(self) -> None:
        self.manager.close()


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)]


@jax.jit
def checksums(leaves: list[jax.Array]) -> jax.Array:
    """uint32, for each array a number that changes when a bit of it does; whatever devices hold it."""

    def of(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
        position, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
        for axis in reversed(range(leaf.ndim)):
            position += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            stride *= leaf.shape[axis]
        # Each number mixed with its place by the last stage of MurmurHash3 (Appleby), so that changes do not cancel.
        mixed = bits.astype(jnp.uint32) ^ (position * jnp.uint32(0x9E3779B9))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return mixed.sum(dtype=jnp.uint32)

    return jnp.stack([of(leaf) for leaf in leaves])


def template(tree: Any) -> Any:
    """What `restore` needs to know of a pytree: shapes, dtypes and shardings; NumPy arrays stand for themselves."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, tree
    )
