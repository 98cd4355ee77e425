"""What a step of training does to the weights, group by group: how far they move, and which gradient moves them."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from nfjax import _names

Group = Callable[[str], str]  # from the path of a parameter, such as "blocks/3/branch/convolutions/1/kernel"


def _module(path: str) -> str:
    """ "blocks/3/branch/convolutions/1"; a parameter of the model itself stands for itself."""
    return path.rpartition("/")[0] or path


def _block(path: str) -> str:
    """ "blocks/3": up to the first number, that of a module in a list or of one that Linen has named; where there is
    none, what the model itself calls it.
    """
    parts = _module(path).split("/")
    numbered = next((i for i, part in enumerate(parts) if re.search(r"\d$", part)), 0)
    return "/".join(parts[: numbered + 1])


GROUPS: dict[str, Group] = {"block": _block, "module": _module, "parameter": lambda path: path}


class GradientNoise(NamedTuple):
    """How much the gradients of single examples differ, from one step (McCandlish et al. 2018, appendix A.1).

    All three are estimates from one step, float32 []: average `variance` and `square` over steps before you divide.

    Attributes:
        variance: The trace of the covariance of the gradients of single examples.
        square: The squared norm of the true gradient; the estimate has no bias, and may be negative.
        scale: Their ratio, in examples: the batch size from which on a larger one gains little. NaN where an estimate
            is not positive.
    """

    variance: jax.Array
    square: jax.Array
    scale: jax.Array


def update_ratios(before: Any, after: Any, groups: str | Group = "block") -> dict[str, jax.Array]:
    """How far a step moves the weights, relative to their size: RMS[after - before] / RMS[before] in each group.

    It may stand inside of `jax.jit`. Around 1e-3 is usual; 1 means that a step makes new weights.

    Args:
        before: Parameters before the step: an `nnx.Module` or what `nnx.state` gives of it, the variables of a Linen
            module or their "params", or any pytree of arrays.
        after: The same after it.
        groups: "block", such as "stem" and "blocks/3"; "module", each layer; "parameter"; or a function that gives the
            group of the path of a parameter.

    Returns:
        Group -> float32 [], in the order of the parameters: inf where weights that were all zero have moved, NaN where
        they have not.

    Raises:
        ValueError: Before and after are not the same parameters, there are none, or there are no such groups.
        TypeError: They are no arrays.
    """
    old, new = _parameters(before), _parameters(after)
    differ = [
        path for path in {**old, **new} if path not in old or path not in new or old[path].shape != new[path].shape
    ]
    if differ:
        raise ValueError(
            f"before and after are not the same parameters: {differ[0]} is {_shown(old.get(differ[0]))} before and "
            f"{_shown(new.get(differ[0]))} after"
        )
    ratios = {}
    for group, paths in _grouped(old, groups).items():
        moved = [new[path].astype(jnp.float32) - old[path].astype(jnp.float32) for path in paths]
        ratios[group] = _norm(moved) / _norm([old[path] for path in paths])
    return ratios


def gradient_norms(gradients: Any, groups: str | Group = "block") -> dict[str, jax.Array]:
    """The L2 norm of the gradient in each group.

    It may stand inside of `jax.jit`, and neither overflows nor vanishes where the gradient itself does not.

    Args:
        gradients: Of the parameters, as `jax.grad` or `nnx.grad` give them.
        groups: As for `update_ratios`.

    Returns:
        Group -> float32 [], in the order of the parameters.

    Raises:
        ValueError: There is no gradient, or there are no such groups.
        TypeError: They are no arrays.
    """
    found = _parameters(gradients)
    return {group: _norm([found[path] for path in paths]) for group, paths in _grouped(found, groups).items()}


def gradient_noise(part_square: Any, whole_square: Any, parts: int, batch_size: int) -> GradientNoise:
    """The simple noise scale, from the gradients of a batch and of its equal parts.

    Args:
        part_square: The squared norm of the mean gradient of a part, averaged over the parts; float [].
        whole_square: The squared norm of the mean gradient of the whole batch; float [].
        parts: How many there are.
        batch_size: Examples in the whole batch.

    Raises:
        ValueError: There are fewer than two parts, or they do not divide the batch.
    """
    if parts < 2 or batch_size % parts:
        raise ValueError(f"parts={parts}: expected two or more equal parts of a batch, whose size is {batch_size}")
    part, whole = jnp.asarray(part_square, jnp.float32), jnp.asarray(whole_square, jnp.float32)
    variance = (part - whole) * jnp.float32(batch_size / (parts - 1))
    square = (whole * jnp.float32(parts) - part) / jnp.float32(parts - 1)
    known = (variance > 0) & (square > 0)
    return GradientNoise(variance, square, jnp.where(known, variance / jnp.where(known, square, 1.0), jnp.nan))


# ---------------------------------------------------------------- parameters by path


def _parameters(tree: Any) -> dict[str, Any]:
    """The floating-point arrays of a model or a pytree, by path."""
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    elif isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        tree = tree["params"]
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(linen.meta.unbox(tree)):
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            raise TypeError(f"{name or 'it'} is of type {type(leaf).__name__}: expected a model's parameters, arrays")
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size:
            found[name] = leaf
    if not found:
        raise ValueError("there are no floating-point parameters in it")
    return found


def _grouped(parameters: Mapping[str, Any], groups: str | Group) -> dict[str, list[str]]:
    """Paths by group."""
    group_of, found = _names.lookup("groups", groups, GROUPS), collections.defaultdict(list)
    for path in parameters:
        found[group_of(path)].append(path)
    return dict(found)


def _norm(leaves: list[Any]) -> jax.Array:
    """The L2 norm, of what is divided by its largest magnitude."""
    leaves = [jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves]
    largest = jnp.stack([jnp.abs(leaf).max() for leaf in leaves]).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return jnp.sqrt(jnp.stack([jnp.square(leaf / scale).sum() for leaf in leaves]).sum()) * scale


def _shown(leaf: Any) -> str:
    return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
