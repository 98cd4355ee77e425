"""How fast each parameter learns: factors of the learning rate by pattern and by depth, and what does not learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core
from ml_collections import ConfigDict

from nfjax.training import networks, patterns


def frozen(config: ConfigDict) -> tuple[str, ...]:
    """The patterns of the parameters that stay as they are."""
    found = patterns.parse("optim.freeze", config.optim.freeze)
    return tuple(_with_head(config, found)) if patterns.HEAD in found else found


def build(config: ConfigDict) -> Callable[[str], float] | None:
    """From the path of a parameter to the factor of its learning rate; None where it is 1 for all."""
    settings = config.optim
    factors = patterns.parse_factors("optim.rate_by_pattern", settings.rate_by_pattern)
    if patterns.HEAD in factors:
        factors = _with_head(config, factors)
    decay, depths = settings.layer_decay, {}
    if decay is not None and decay != 1:
        depths = depth_below_head(config)
    if not factors and not depths:
        return None

    def rate(path: str) -> float:
        by_pattern = [factor for pattern, factor in factors.items() if patterns.matches((pattern,), path)]
        return (by_pattern[-1] if by_pattern else 1.0) * (decay ** depths[path] if depths else 1.0)

    return rate


def check(config: ConfigDict, params: Mapping[str, Any]) -> None:
    """Raises ValueError for patterns that match nothing, or leave nothing to be trained. params: by path."""
    still, factors = frozen(config), patterns.parse_factors("optim.rate_by_pattern", config.optim.rate_by_pattern)
    patterns.check(f"optim.freeze={config.optim.freeze}", still, params)
    if patterns.HEAD in factors:
        factors = _with_head(config, factors)
    patterns.check(f"optim.rate_by_pattern={config.optim.rate_by_pattern}", factors, params)
    if all(patterns.matches(still, path) for path in params):
        raise ValueError(
            f"optim.freeze={config.optim.freeze} freezes every parameter: expected one at least that learns. There are "
            f"{patterns.outline(list(params))}"
        )


def describe(config: ConfigDict, params: Any) -> str | None:
    """Lines for a person: what is frozen, and how fast the parts of the network learn; None where all is as usual."""
    own, still, rate, lines = patterns.by_path(params), frozen(config), build(config), []
    if still:
        held = [leaf.size for path, leaf in own.items() if patterns.matches(still, path)]
        numbers = sum(leaf.size for leaf in own.values())
        lines.append(f"frozen  {len(held)} of {len(own)} arrays, {sum(held):,} of {numbers:,} parameters")
    if rate is not None:
        by_block: dict[str, list[float]] = {}
        for path in own:
            if not patterns.matches(still, path):
                by_block.setdefault(patterns.block_of(path), []).append(rate(path))
        shown = [
            f"{block} {min(found):.3g}" + (f" to {max(found):.3g}" if max(found) > min(found) else "")
            for block, found in by_block.items()
        ]
        lines.append(f"rates   the learning rate times {', '.join(shown)}")
    return "\n".join(lines) or None


def _with_head(config: ConfigDict, found: Any) -> dict[str, Any]:
    model = networks.shapes(config)
    _, params, _ = networks.as_functions(model)
    return patterns.with_head(found, sorted(networks.head(config)), patterns.by_path(params))


# ---------------------------------------------------------------- depth


def depth_below_head(config: ConfigDict) -> dict[str, int]:
    """How many layers lie between each parameter and the head, by its path: 0 for the head, 1 for the last block.

    A layer is a block, `patterns.block_of`, in the order in which an image passes them. What lies between the last
    numbered block and what tells classes apart, such as a last norm, belongs to the head.
    """
    network, params, batch_stats = networks.as_functions(networks.shapes(config))
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    used = first_uses(network.predict, params, batch_stats, images)
    layers: dict[str, list[str]] = {}
    for path in sorted(used, key=used.__getitem__):
        layers.setdefault(patterns.block_of(path), []).append(path)
    order, head = list(layers), networks.head(config)
    last = max((i for i, name in enumerate(order) if head & set(layers[name])), default=len(order) - 1)
    while last > 0 and not patterns.is_numbered(order[last - 1]) and any(map(patterns.is_numbered, order[:last])):
        last -= 1
    return {path: max(last - i, 0) for i, name in enumerate(order) for path in layers[name]}


def first_uses(function: Callable[..., Any], params: Any, *args: Any) -> dict[str, tuple[int, ...]]:
    """Where in a function each parameter is first used, by its path; places compare as they follow on each other.

    Args:
        function: `(params, *args)`; it is traced, and not run.
        params: Arrays or their shapes.
        *args: Likewise.
    """
    paths = list(patterns.by_path(params))
    jaxpr = jax.make_jaxpr(function)(params, *args).jaxpr
    found: dict[str, tuple[int, ...]] = {}
    _note_uses(jaxpr, dict(zip(jaxpr.invars, paths, strict=False)), (), found)
    return {path: found.get(path, (len(jaxpr.eqns),)) for path in paths}


def _note_uses(jaxpr: Any, names: dict[Any, str], place: tuple[int, ...], found: dict[str, tuple[int, ...]]) -> None:
    for number, eqn in enumerate(jaxpr.eqns):
        here = (*place, number)
        given = {i: names[x] for i, x in enumerate(eqn.invars) if not isinstance(x, jax_core.Literal) and x in names}
        if not given:
            continue
        # Of a function inside, a jit, a remat: where in it. Of a loop or a branch, whose arguments are others: there.
        inside = [value for value in eqn.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        inner = getattr(inside[0], "jaxpr", inside[0]) if len(inside) == 1 else None
        if inner is not None and len(inner.invars) == len(eqn.invars):
            _note_uses(inner, {inner.invars[i]: name for i, name in given.items()}, here, found)
        for name in given.values():
            found.setdefault(name, here)
