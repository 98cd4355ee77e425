"""Parameters and multiply-accumulates of any Flax model, counted from its jaxpr: nothing is computed, nothing
allocated.

Counted are the multiply-accumulates of convolutions and matrix products, with the taps that fall on padding, as the
literature counts them (XLA's own `cost_analysis` leaves those out). Elementwise work, pooling and reductions are not
counted.

Which parameters belong to normalization layers is known of Flax's own layers, and of modules that keep batch
statistics; of others it is read from the name of their class. Where neither says it, `Cost.unsure` does.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from nfjax import layers
from nfjax._calls import class_name, join, within
from nfjax._flax import ABSENT, Runnable, attempt, explained, runnable

NORMS = (
    nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm,
    linen.BatchNorm, linen.LayerNorm, linen.RMSNorm, linen.GroupNorm, linen.InstanceNorm,
    layers.DynamicTanh,
)  # fmt: skip
# FilterResponseNorm, LayerNorm2d, GroupNormAct, BN; neither NormFreeBlock nor NormalInit.
_NORM = re.compile(r"norm(?!al(?!i[sz]))(?!.*free)|^(?:BN|LN|GN|FRN|GRN)\d*[dD]?$", re.IGNORECASE)
# These normalize a kernel, not what passes through.
_KERNEL_NORM = re.compile(r"(?:weight|spectral|kernel)_?norm", re.IGNORECASE)
# What a norm calls the factors by which it multiplies channels.
_FACTOR = re.compile(r"scale|gamma|gain|^weight$|^g$|^w$", re.IGNORECASE)

Norms = type | str | Sequence[type | str]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs, in exact integers.

    Attributes:
        parameters: Every trainable number; batch statistics are none.
        norm_parameters: Those of them that belong to normalization layers.
        macs: Multiply-accumulates of convolutions and matrix products for the input given, padding included.
        unsure: By class, the numbers of parameters in vectors of modules that scale channels by factors of their own,
            and of which it cannot be known whether they normalize (a LayerScale does not, a norm written into a block
            does). `norm_parameters` leaves them out unless the class is one of `count`'s `norms`.
    """

    parameters: int
    norm_parameters: int
    macs: int
    unsure: tuple[tuple[str, int], ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations, two per multiply-accumulate."""
        return 2 * self.macs


def count(
    model: Any,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    norms: Norms = (),
    rngs: Any = ABSENT,
    mutable: Any = None,
    **kwargs: Any,
) -> Cost:
    """Counts a Flax model, NNX or Linen, called as `model(*inputs, **kwargs)`.

    The model, variables and inputs may be abstract (`nnx.eval_shape`, `jax.eval_shape`), and the call may stand inside
    `jax.jit`. Multiply-accumulates are those of the whole batch given: pass batch size 1 for the cost of one example.

    Args:
        model: An `nnx.Module` or a Linen module.
        *inputs: A shape such as (1, 32, 32, 3), meaning float32, or anything with shape and dtype, or a pytree of
            these; flags, numbers and names go to the model as they are.
        variables: Those of a Linen module; left out, `model.init` is traced for them.
        norms: Classes, or names of classes, that are normalization layers with all that is in them, besides those that
            are known: Flax's own, modules that keep batch statistics, and those whose class has a norm's name
            (`FilterResponseNorm`, `LayerNorm2d`; not `WeightNorm`), as far as the parameters are the module's own.
        rngs: As for `spp.propagate`.
        mutable: Likewise.
        **kwargs: Of the model's call, arrays, `jax.ShapeDtypeStruct`, or whatever else, as it is: a tuple of numbers is
            no shape there. An argument of the model that has the name of one of these cannot be passed by keyword.

    Returns:
        The cost.

    Raises:
        TypeError: It is no Flax model.
        ValueError: An input has an unknown size, or the model has none of the class of one of `norms`.
        NotImplementedError: There is a loop whose length the jaxpr does not hold. An error from inside the model passes
            through.
    """
    norms = (norms,) if isinstance(norms, type | str) else tuple(norms)
    if wrong := [norm for norm in norms if not isinstance(norm, type | str)]:
        raise TypeError(f"norms={wrong[0]!r}: expected a class, its name, or several of them")
    key = jax.eval_shape(lambda: jax.random.key(0))
    called = runnable(model, [_shapes(x) for x in inputs], kwargs, variables, rngs, mutable, key, abstract=True)
    ran: dict[Path, Any] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is not None:
            # Unbound: the scope of a bound module holds traced values, which must not outlive their trace.
            ran[_key(within(context.module.path))] = context.module.clone(parent=None)
        return call(*args, **kwargs)

    def trace(called: Runnable) -> Any:
        def outputs(arrays: Any) -> Any:
            return [leaf for leaf in jax.tree.leaves(called.function(arrays)) if isinstance(leaf, jax.Array)]

        with explained(called.name, "nfjax.cost"), linen.intercept_methods(note):
            return jax.make_jaxpr(outputs)(called.arrays)

    jaxpr, _ = attempt(called, trace)
    if isinstance(model, nnx.Module):
        modules = {_key(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)} | ran
        params, stats = (dict(nnx.to_flat_state(nnx.state(model, kind))) for kind in (nnx.Param, nnx.BatchStat))
    else:
        modules = ran
        params, stats = (flatten_dict(called.arrays[0].get(kind, {})) for kind in ("params", "batch_stats"))
    sizes = {_key(path): _Sizes.of(value) for path, value in params.items()}
    of_norms, unsure = _norm_parameters(modules, sizes, {_key(path) for path in stats}, norms)
    return Cost(
        parameters=sum(size.total for size in sizes.values()),
        norm_parameters=of_norms,
        macs=_macs(jaxpr.jaxpr),
        unsure=unsure,
    )


def _shapes(x: Any) -> Any:
    """Shapes (tuples of integers), anywhere in an input, become float32 abstract arrays."""

    def is_shape(node: Any) -> bool:
        return type(node) is tuple and all(_is_size(n) or n is None for n in node)

    def leaf(node: Any) -> Any:
        if not is_shape(node):
            return node
        if any(n is None or n < 0 for n in node):
            raise ValueError(
                f"input {node}: expected a shape of known sizes, all of them 0 or more, such as (1, 32, 32, 3)"
            )
        return jax.ShapeDtypeStruct(node, jnp.float32)

    return jax.tree.map(leaf, x, is_leaf=is_shape)


def _is_size(n: Any) -> bool:
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


# ---------------------------------------------------------------- parameters


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of one parameter, which may be several arrays in a box. vector: one number for each channel, or none."""

    total: int
    vector: bool

    @classmethod
    def of(cls, value: Any) -> _Sizes:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(value)]
        return cls(
            total=sum(map(math.prod, shapes)),
            vector=all(math.prod(shape) == max(shape, default=0) > 1 for shape in shapes),
        )


def _norm_parameters(
    modules: Mapping[Path, Any], sizes: Mapping[Path, _Sizes], stats: set[Path], norms: Sequence[type | str]
) -> tuple[int, tuple[tuple[str, int], ...]]:
    """`Cost.norm_parameters` and `Cost.unsure`, from a model's modules, parameters and batch statistics by path."""
    given = {path for path, module in modules.items() if any(_is(module, norm) for norm in norms)}
    for norm in norms:
        if not any(_is(modules[path], norm) for path in given):
            shown = norm if isinstance(norm, str) else norm.__name__
            classes = ", ".join(sorted({class_name(module) for module in modules.values()}))
            raise ValueError(f"norms={shown} is no module of this model, which has {classes}")

    def owner(path: Path) -> Path:
        held = (path[:n] for n in range(len(path) - 1, -1, -1))
        return next((p for p in held if p in modules and not isinstance(modules[p], nnx.List | nnx.Dict)), ())

    own: dict[Path, dict[Path, _Sizes]] = collections.defaultdict(dict)
    for path, size in sizes.items():
        own[owner(path)][path] = size
    counting = {owner(path) for path in stats}
    total, unsure = 0, collections.Counter[str]()
    for path, held in own.items():
        module = modules.get(path)
        vectors = sum(size.total for size in held.values() if size.vector)
        bridged = isinstance(module, nnx.bridge.ToLinen)
        cls = module.nnx_class if bridged and isinstance(module.nnx_class, type) else type(module)
        if any(path[:n] in given for n in range(len(path) + 1)) or _is_norm(cls):
            total += sum(size.total for size in held.values())
        elif _named(cls, _KERNEL_NORM) or (cls.__module__.startswith("flax.") and cls is not nnx.bridge.ToLinen):
            continue
        elif path in counting:
            total += vectors
        elif any(size.vector and _FACTOR.search(join(place[len(path) :])) for place, size in held.items()):
            unsure[cls.__name__] += vectors
    return total, tuple(unsure.items())


def _key(path: Sequence[Any] | str) -> Path:
    """A path part by part, whether it comes from Linen, from NNX, or from one inside the other."""
    return tuple(part for part in (path if isinstance(path, str) else join(path)).split("/") if part)


def _is(module: Any, norm: type | str) -> bool:
    if isinstance(norm, type):
        return isinstance(module, norm)
    return any(cls.__name__ == norm for cls in type(module).__mro__)


def _is_norm(cls: type) -> bool:
    return issubclass(cls, NORMS) or (_named(cls, _NORM) and not _named(cls, _KERNEL_NORM))


def _named(cls: type, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(base.__name__) for base in cls.__mro__)


# ---------------------------------------------------------------- multiply-accumulates


def _macs(jaxpr: Any) -> int:
    """The sum over a jaxpr's equations, inner jaxprs included: a scan counts its length, a branch its dearest arm."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            c_out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            taps = math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // c_out
            total += taps // math.prod(eqn.params["lhs_dilation"])  # a transposed convolution's zeros between inputs
        elif name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
        elif name == "cond":
            total += max(_macs(branch.jaxpr) for branch in eqn.params["branches"])
        elif name == "while":
            if any(_macs(eqn.params[part].jaxpr) for part in ("cond_jaxpr", "body_jaxpr")):
                raise NotImplementedError(
                    "the model multiplies matrices inside a while loop, whose number of rounds is known only when it "
                    "runs; use jax.lax.scan or a Python loop"
                )
        else:
            rounds = eqn.params["length"] if name == "scan" else 1
            total += rounds * sum(_macs(inner) for inner in jaxprs_in_params(eqn.params))
    return total
