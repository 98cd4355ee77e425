"""How training fails, in words: what happened, what is safe, and what helps."""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from nfjax import preemption
from nfjax.runs.checkpoint import Checkpoints
from nfjax.training import footprint
from nfjax.training.step import Sums


class TrainingDivergedError(RuntimeError):
    """The loss, its gradient or the update stopped being finite."""


def diverged(
    step: int, sums: Sums, bad: int, checkpoints: Checkpoints, config: ConfigDict, where: str = ""
) -> TrainingDivergedError:
    """When the run stopped being finite. bad: which of the steps in `sums` it was; where: by `divergence.explain`."""
    loss, grad_norm = sums["loss"][bad] / sums["count"][bad], sums["grad_norm"][bad]
    return not_finite(
        f"at step {step:,} the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}, the learning rate at most "
        f"{config.optim.learning_rate:g}{where}; nothing was trained on it",
        checkpoints,
    )


def not_finite(what: str, checkpoints: Checkpoints) -> TrainingDivergedError:
    """What happened, what is safe, and what helps."""
    checkpoints.wait()
    saved = checkpoints.steps()
    good = (
        f"the last good checkpoint is at step {saved[-1]:,} in {checkpoints.directory}"
        if saved
        else "no checkpoint was saved yet"
    )
    return TrainingDivergedError(
        f"{what}; {good}. Try, with a new --workdir, a smaller --config.optim.learning_rate, "
        "--config.optim.clip_norm=1.0, or an initialization that keeps the gradient variance "
        "(--config.model.init=he_fan_out with residual idshort, learnscalar or convshort)"
    )


def of_runtime(error: jax.errors.JaxRuntimeError, workdir: str) -> Exception:
    """What a failure of the runtime means for the person who reads it."""
    what = str(error).strip().partition("\n")[0][:300]
    if "RESOURCE_EXHAUSTED" in what:
        return ValueError(f"the memory of the device does not suffice ({what}); what helps: {footprint.HINT}")
    if jax.process_count() > 1:
        # Nothing more can be done together with the others, closing the checkpoints included.
        return preemption.PeerLostError(
            f"process {jax.process_index()} has lost another one ({what}); its own message says why it ended. What was "
            f"saved in {workdir} is whole: the same command, for all processes, goes on from there"
        )
    return error
