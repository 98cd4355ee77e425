"""Whether a config can work at all, before anything is written, loaded or decoded."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from nfjax.runs import trackers
from nfjax.training import (
    balance,
    callbacks,
    footprint,
    loader,
    networks,
    optimizers,
    preprocessing,
    pretrained,
    propagation,
    ranges,
    rates,
    rescaling,
    schedules,
    sharding,
)

# What reads settings, and says what they may be.
READERS = (loader, sharding, networks, preprocessing, schedules, optimizers, callbacks)
RANGES = {name: span for module in READERS for name, span in module.RANGES.items()}


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that cannot work: one message, which names the field and the way out."""
    ranges.check(config, RANGES)
    sharding.check(config)
    _check_batch(config)
    for module in (loader, balance, preprocessing, schedules, callbacks, trackers):
        module.check(config)
    model = networks.shapes(config)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _check_state(config, params)
    optimizers.check(config, params)
    propagation.check(config, model)
    rescaling.check(config, model)
    pretrained.check(config)
    networks.as_functions(model, rates.frozen(config))  # last, for it changes the mode of the model


def _check_batch(config: ConfigDict) -> None:
    """ValueError for a batch that is beyond any doubt too large for a device."""
    there = footprint.available(jax.local_devices()[0])
    if there is None:
        return
    images = config.batch_size // jax.device_count() * config.data.image_size**2 * 3 * 4  # in float32
    _check_fits("a device's part of a batch, in float32", images, there, config, ("batch_size", "data.image_size"))
    encoded = (config.data.ahead or 1) * config.batch_size // jax.process_count() * config.data.image_size**2 * 3
    _check_fits("the batches decoded ahead", encoded, there * jax.local_device_count(), config, ("data.ahead",))


def _check_state(config: ConfigDict, params: Any) -> None:
    """ValueError for parameters that are beyond any doubt too many for a device, from shapes alone."""
    there = footprint.available(jax.local_devices()[0])
    if there is None:
        return
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = 4 * numbers + 8 * numbers // config.train.state_shards  # the gradient; parameters and momentum
    _check_fits(f"{numbers:,} parameters with their gradient", state, there, config, ("model.width", "model.depth"))


def _check_fits(what: str, needed: int, there: int, config: ConfigDict, names: Sequence[str]) -> None:
    if needed > there:
        values = ", ".join(f"{name}={functools.reduce(getattr, name.split('.'), config)}" for name in names)
        raise ValueError(
            f"{values}: {what} would take {needed / 2**30:,.0f} GiB, of {there / 2**30:,.1f} GiB that there are: "
            "choose less"
        )
