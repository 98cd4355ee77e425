"""A learning rate to begin with, from a short training in which it rises from far too small to far too large (Smith
2017): the loss falls fastest at rates that are worth a try.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nfjax import _cpu
from nfjax import _figures as figures
from nfjax.runs.progress import say
from nfjax.training import checks, footprint, loader, networks, pretrained, setup, sharding, step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST, MOST = 1e-6, 10.0  # the rates, evenly on a logarithmic scale
STEPS, FEWEST = 500, 50
WIDTH = 0.1  # decades, the standard deviation of the bell by which losses are smoothed
KEEP = 0.8  # of the running mean by which divergence is told while the steps are taken
DIVERGED = 4  # times the lowest running mean
LEAST_FALL = 0.02  # of the first loss, by which the smoothed loss has to fall for a suggestion
TURNED = 0.5  # of that fall, by which it has to rise again: what comes behind is luck


@dataclasses.dataclass(frozen=True)
class Search:
    """What the steps came to.

    Attributes:
        rates: The learning rate of each step that was taken, [n].
        losses: Mean loss of its batch before it, in nats, [n].
        smoothed: The same without the noise of single batches, [n].
        steepest: The rate at which it falls fastest.
        lowest: That at which it is lowest before it rises again.
        diverged: That at which it left everything behind; None where it did not.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    steepest: float
    lowest: float
    diverged: float | None


def find(config: ConfigDict, steps: int = STEPS) -> Search:
    """Trains with a rising rate, with all else as the config has it, and leaves nothing behind.

    Args:
        config: Of a run; its learning rate, schedule and warm-up are left out.
        steps: How many to take; fewer show the loss of a rate before it has had time to fall.

    Raises:
        ValueError: The settings or the images cannot be used, or no rate makes the loss fall.
    """
    if steps < FEWEST:
        raise ValueError(f"steps={steps}: expected {FEWEST} or more, to find anything in the noise")
    config = pretrained.resolve(config)
    checks.check(config)
    config = config.copy_and_resolve_references()
    config.optim.ema_decay = config.log.signal_every_steps = None  # they change no step
    dataset, mesh = loader.open_data(config, config.data.dir), sharding.make(config.train.state_shards)
    setup.check_size(config, dataset)
    say(
        f"find    {networks.describe(config)}: {steps} steps of {config.batch_size} images, rates {LEAST:g} to {MOST:g}"
    )
    rising = functools.partial(ramp, steps=steps)
    start = setup.beginning(config, dataset, mesh, rising)
    options = _cpu.compiler_options(_cpu.platform_of(mesh), config.train.onednn)
    take = footprint.Compiled(step.train_step, say, options, task=start.task)
    train_loader, state, losses = loader.build(config, dataset, "train", mesh, None), start.state, []
    try:
        for batch in train_loader.train(0, steps):
            state, sums = take(state, batch, start.key)
            losses.append(float(sums["loss"]) / max(float(sums["count"]), 1))
            if has_diverged(losses):
                break
    finally:
        train_loader.close()
    return judge(np.array([float(rising(number)) for number in range(len(losses))]), np.array(losses))


def ramp(number: Any, steps: int = STEPS) -> jax.Array:
    """The learning rate of a step, of so many."""
    share = jnp.asarray(number, jnp.float32) / (steps - 1)
    return jnp.float32(LEAST) * jnp.float32(MOST / LEAST) ** share


def has_diverged(losses: list[float]) -> bool:
    """Whether the last loss is not finite, or the running mean is several times what it was at its lowest."""
    if not np.isfinite(losses[-1]):
        return True
    mean, lowest = losses[0], losses[0]
    for loss in losses[1:]:
        mean = KEEP * mean + (1 - KEEP) * loss
        lowest = min(lowest, mean)
    return mean > DIVERGED * lowest


def judge(rates: np.ndarray, losses: np.ndarray) -> Search:
    """What losses say about rates.

    Args:
        rates: Rising, [n].
        losses: Of the steps with these rates, [n]; all finite but perhaps the last.

    Raises:
        ValueError: They do not fall.
    """
    diverged = float(rates[-1]) if has_diverged(losses.tolist()) else None
    finite = np.isfinite(losses)
    rates, losses = rates[finite], losses[finite]
    smoothed = smooth(np.log10(rates), losses)
    end = turning_point(smoothed) if len(losses) else 0
    if end < 2 or smoothed[: end + 1].max() - smoothed[end] < LEAST_FALL * abs(smoothed[0]):
        last = float(rates[-1]) if len(rates) else LEAST
        some = ", ".join(f"{loss:.3g}" for loss in losses[:: max(1, len(losses) // 5)])
        raise ValueError(
            f"no learning rate from {LEAST:g} to {last:.2g} makes the loss fall ({some}): take more --steps, so that a "
            "rate has more time to tell, or look at images and labels with `nfjax data show`"
        )
    slope = np.gradient(smoothed, np.log(rates))
    steepest = int(slope[: end + 1].argmin())
    return Search(rates, losses, smoothed, float(rates[steepest]), float(rates[end]), diverged)


def smooth(places: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Each loss averaged with those around it, weighted by a bell; at the ends with those that there are."""
    weights = np.exp(-0.5 * (np.subtract.outer(places, places) / WIDTH) ** 2)
    return (weights @ losses) / weights.sum(1)


def turning_point(smoothed: np.ndarray) -> int:
    """Where it is lowest before it rises again by a good part of its fall, or at all where it does not."""
    lowest = np.minimum.accumulate(smoothed)
    fall = smoothed[0] - lowest
    rises = (fall > LEAST_FALL * abs(smoothed[0])) & (smoothed - lowest > TURNED * fall)
    end = int(rises.argmax()) if rises.any() else len(smoothed) - 1
    return int(smoothed[: end + 1].argmin())


def suggestion(search: Search, config: ConfigDict) -> float:
    """The setting `optim.learning_rate` with which a run has the steepest rate, to two digits."""
    scale = config.batch_size / (config.optim.reference_batch_size or config.batch_size)
    return float(f"{search.steepest / scale:.2g}")


def explain(search: Search, config: ConfigDict) -> str:
    """The suggestion with its reason, for a person."""
    low, first = search.smoothed[search.rates == search.lowest][0], search.smoothed[0]
    ended = "it did not diverge" if search.diverged is None else f"it diverges at {search.diverged:.2g}"
    value = suggestion(search, config)
    scaled = (
        ""
        if config.optim.reference_batch_size in (None, config.batch_size)
        else f" (for optim.reference_batch_size={config.optim.reference_batch_size})"
    )
    return (
        f"rate    the smoothed loss falls fastest at {search.steepest:.2g}, from {first:.3g} to {low:.3g} at "
        f"{search.lowest:.2g}, where it turns; {ended}\n"
        f"try     --config.optim.learning_rate={value:g}{scaled}"
    )


def plot(search: Search, title: str) -> Figure:
    """The loss by rate, with the rate at which it falls fastest."""
    figure = figures.new(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(search.rates, search.losses, color="#999999", linewidth=0.8, label="loss of each batch")
    axes.plot(search.rates, search.smoothed, color="#0072B2", label="smoothed")
    axes.axvline(search.steepest, color="#E69F00", linestyle="--", label=f"falls fastest: {search.steepest:.2g}")
    low, high = search.smoothed.min(), search.smoothed[search.rates <= search.lowest].max()
    axes.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy", title=title)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
