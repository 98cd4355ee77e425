"""Optimizers by name, with weight decay on what should decay and optional gradient clipping.

An optimizer is one function of optax, or like one, and one line in `OPTIMIZERS`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from nfjax import _names
from nfjax.training import keywords, patterns, ranges, rates, schedules
from nfjax.training.ranges import Range

CLASSIFIER = "classifier"
_CLIPPING = Range(lambda value: np.float32(value) > 0, "must be positive, or none for no clipping")

RANGES: dict[str, Range] = {
    "optim.momentum": ranges.UP_TO_ONE,
    "optim.weight_decay": Range(lambda value: value >= 0, "must be 0 (for none) or more"),
    "optim.clip_norm": _CLIPPING,
    "optim.adaptive_clip": _CLIPPING,
    "optim.scalar_rate": Range(lambda value: np.float32(value) > 0, "must be positive"),
    "optim.layer_decay": Range(
        lambda value: 0 < value <= 1, "must be more than 0, and at most 1, or none for one rate in all layers"
    ),
    "optim.label_smoothing": ranges.UP_TO_ONE,
    "optim.ema_decay": Range(lambda value: 0 < value < 1, "must be more than 0 and less than 1, or none for none"),
}


def kernels(params: Any) -> Any:
    """True for each kernel (rank 2 and more), False for biases, scalars and normalization scales."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def all_parameters(params: Any) -> Any:
    """True for every parameter."""
    return jax.tree.map(lambda leaf: True, params)


def scalars(params: Any) -> Any:
    """True for each parameter that is a single number, False for all others."""
    return jax.tree.map(lambda leaf: leaf.ndim == 0, params)


def not_classifier(params: Any) -> Any:
    """False for the parameters under the name "classifier", True for all others."""

    def outside(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        return all(getattr(entry, "key", None) != CLASSIFIER for entry in path)

    return jax.tree_util.tree_map_with_path(outside, params)


def lars(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    mask: Any = None,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """`optax.lars` (You et al. 2017), whose two masks are one: what does not decay is not scaled by trust either."""
    return optax.lars(
        learning_rate, weight_decay, mask, trust_coefficient, eps, trust_ratio_mask=mask, momentum=momentum,
        nesterov=nesterov,
    )  # fmt: skip


# Called with the learning rate, and with those of momentum=, weight_decay= and mask= that they name.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,  # heavy-ball momentum, as PyTorch's: v <- momentum v + g, w <- w - rate v
    "nesterov": functools.partial(optax.sgd, nesterov=True),
    "adamw": optax.adamw,
    "lars": lars,
    "lamb": optax.lamb,
}
# Which parameters decay.
MASKS: dict[str, Callable[[Any], Any]] = {"kernels": kernels, "all": all_parameters}


def make(
    name: str | Callable[..., optax.GradientTransformation],
    schedule: optax.Schedule,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    mask: str | Callable[[Any], Any] = "kernels",
    clip_norm: float | None = None,
    adaptive_clip: float | None = None,
    scalar_rate: float = 1.0,
    rate: Callable[[str], float] | None = None,
    frozen: Sequence[str] = (),
    settings: str = "",
) -> optax.GradientTransformation:
    """An optimizer, with what is done to the gradient before it.

    Args:
        name: In `OPTIMIZERS`, or "package.module:function" (such as "optax:lion"), or a function like those.
        schedule: Learning rate by step.
        momentum: Of optimizers that have one.
        weight_decay: Decoupled from the gradient where the optimizer itself has a weight decay (AdamW, LAMB; LARS puts
            it before the trust ratio); else weight_decay * w is added to the gradient, as in PyTorch's SGD.
        mask: Which parameters decay: a name in `MASKS`, "package.module:function", or a function from parameters to a
            pytree of booleans.
        clip_norm: Largest global norm of the gradient, applied first; None for no clipping.
        adaptive_clip: Adaptive gradient clipping (Brock et al. 2021): largest ratio of gradient norm to weight norm per
            output unit, with the classifier exempt, as in that paper; None for none.
        scalar_rate: By which the learning rate is multiplied for parameters that are single numbers, such as the scales
            and biases of Fixup, whose authors take 0.1.
        rate: From the path of a parameter, "blocks/0/alpha", to a further factor of its learning rate; None for 1.
        frozen: Patterns, see `patterns`, of parameters that stay as they are, bit for bit, and have no state.
        settings: Further keyword arguments of the optimizer, "b1=0.9, b2=0.95".

    Raises:
        ValueError: A name is unknown, or the optimizer does not take its arguments.
    """
    _check_numbers(momentum, weight_decay, clip_norm, adaptive_clip, scalar_rate)
    function = _names.find("optim.name", name, OPTIMIZERS)
    mask = _names.find("optim.weight_decay_mask", mask, MASKS)
    if "mask" in keywords.parse("optim.arguments", settings):
        raise ValueError(f"optim.arguments={settings!r} has 'mask', which is set by --config.optim.weight_decay_mask")
    parts = []
    if clip_norm is not None:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if adaptive_clip is not None:
        parts.append(optax.masked(optax.adaptive_grad_clip(adaptive_clip), not_classifier))
    named = inspect.signature(function).parameters
    given = {"momentum": momentum, "weight_decay": weight_decay, "mask": mask}
    if "weight_decay" not in named:
        given = {"momentum": momentum}
        if weight_decay:
            parts.append(optax.add_decayed_weights(weight_decay, mask=mask))
    elif weight_decay and "mask" not in named and mask is not all_parameters:
        raise ValueError(
            f"optim.name={name!r} takes a weight decay and no mask: it decays every parameter, which "
            "--config.optim.weight_decay_mask=all agrees to"
        )
    given = {key: value for key, value in given.items() if key in named}
    optimizer = keywords.call("optim.arguments", function, settings, schedule, **given)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"optim.name={name!r} gives {type(optimizer).__name__}: expected an optax.GradientTransformation"
        )
    behind = [] if scalar_rate == 1 else [optax.masked(optax.scale(scalar_rate), scalars)]
    if rate is not None:
        behind.append(optax.stateless(lambda updates, params: _times(updates, rate)))
    return _sparing(optax.chain(*parts, _promoting(optimizer), *behind), tuple(frozen))


def _times(updates: Any, rate: Callable[[str], float]) -> Any:
    return patterns.map_by_path(lambda path, leaf: leaf * np.asarray(rate(path), leaf.dtype), updates)


def _sparing(optimizer: optax.GradientTransformation, frozen: tuple[str, ...]) -> optax.GradientTransformation:
    """The optimizer for all parameters but those that are frozen, of which it knows nothing."""
    if not frozen:
        return optimizer
    # Negative zero: added to a number, it gives the same bits, those of negative zero, too.
    still = optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates))

    def labels(params: Any) -> Any:
        return patterns.map_by_path(
            lambda path, leaf: "frozen" if patterns.matches(frozen, path) else "trained", params
        )

    return optax.partition({"trained": optimizer, "frozen": still}, labels)


def _promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, also where JAX is told to promote no types: Adam raises a float to the power of an int."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def check(config: ConfigDict, params: Any) -> None:
    """Raises ValueError for an optimizer that cannot be. params: of the network, shapes in place of arrays."""
    settings, schedule = config.optim, schedules.build(config, epoch_ends=[1])
    mask = _names.find("optim.weight_decay_mask", settings.weight_decay_mask, MASKS)
    try:
        decays = mask(params)
        jax.tree.map(lambda decay, below: None, decays, params)
    except (TypeError, ValueError) as error:
        raise ValueError(_wrong_mask(settings.weight_decay_mask, error)) from error
    if wrong := [leaf for leaf in jax.tree.leaves(decays) if not isinstance(leaf, bool | np.bool_)]:
        raise ValueError(_wrong_mask(settings.weight_decay_mask, f"it gives {wrong[0]!r}"))
    rates.check(config, patterns.by_path(params))
    optimizer = build(config, schedule)
    try:
        jax.eval_shape(lambda params: optimizer.update(params, optimizer.init(params), params), params)
    except (TypeError, ValueError) as error:
        arguments = f", optim.arguments={settings.arguments!r}" if settings.arguments else ""
        raise ValueError(
            f"optim.name={settings.name}{arguments}: it fails where it is called as optimizer(learning rate by step), "
            f"update(gradients, state, parameters): {error}"
        ) from error


def _wrong_mask(name: str, reason: Any) -> str:
    first = str(reason).strip().partition("\n")[0]
    return f"optim.weight_decay_mask={name}: expected a pytree of booleans, like that of the parameters ({first})"


def build(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of a config."""
    settings = config.optim
    return make(
        settings.name,
        schedule,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        mask=settings.weight_decay_mask,
        clip_norm=settings.clip_norm,
        adaptive_clip=settings.adaptive_clip,
        scalar_rate=settings.scalar_rate,
        rate=rates.build(config),
        frozen=rates.frozen(config),
        settings=settings.arguments,
    )


def _check_numbers(
    momentum: float, weight_decay: float, clip_norm: float | None, adaptive_clip: float | None, scalar_rate: float
) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: expected at least 0 and less than 1")
    if not 0 <= weight_decay < np.inf:
        raise ValueError(f"weight_decay={weight_decay}: expected 0, for none, or a positive number")
    if not 0 < scalar_rate < np.inf:
        raise ValueError(f"scalar_rate={scalar_rate}: expected a positive number")
    for name, value in (("clip_norm", clip_norm), ("adaptive_clip", adaptive_clip)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name}={value}: expected a positive number, or None for no clipping")
