"""Parameters and multiply-accumulates of any Flax model, counted from its jaxpr: nothing is computed, nothing
allocated.

Counted are the multiply-accumulates of convolutions and matrix products, with the taps that fall on padding, as the
literature counts them (XLA's own `cost_analysis` leaves those out). Elementwise work, pooling and reductions are not
counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.extend.core import jaxprs_in_params

NORMS = (
    nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm,
    linen.BatchNorm, linen.LayerNorm, linen.RMSNorm, linen.GroupNorm, linen.InstanceNorm,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs: exact integers, and the same as the paper's tables print it.

    parameters: every trainable number (batch statistics are none). norm_parameters: those of them that belong to
    normalization layers. macs: multiply-accumulates of convolutions and matrix products for the input given, padding
    included.
    """

    parameters: int
    norm_parameters: int
    macs: int

    @property
    def flops(self) -> int:
        """Floating-point operations, two per multiply-accumulate."""
        return 2 * self.macs

    @property
    def paper_parameters(self) -> float:
        """In millions to two decimals, without the normalization layers' own, as tables 1 and 2 of the paper count."""
        return round((self.parameters - self.norm_parameters) / 1e6, 2)

    @property
    def paper_flops(self) -> float:
        """In units of 1e9: twice the multiply-accumulates after these were rounded to two decimals, as tables 1 and 2
        of the paper count.
        """
        return round(2 * round(self.macs / 1e9, 2), 2)


def count(model: Any, *inputs: Any, variables: Mapping[str, Any] | None = None, **kwargs: Any) -> Cost:
    """Counts a Flax model, NNX or Linen, called as `model(*inputs, **kwargs)`.

    inputs: a shape such as (1, 32, 32, 3), meaning float32, or anything with shape and dtype, or a pytree of these.
    variables: those of a Linen module; left out, `model.init` is traced for them. An NNX model may be abstract
    (`nnx.eval_shape`). Multiply-accumulates are those of the whole batch given: pass batch size 1 for the cost of one
    example.

    Raises TypeError for a model that is neither, and NotImplementedError for a loop whose length the jaxpr does not
    hold.
    """
    arguments = [_abstract(x) for x in inputs]
    if isinstance(model, nnx.Module):
        return _count_nnx(model, arguments, kwargs)
    if isinstance(model, linen.Module):
        return _count_linen(model, arguments, variables, kwargs)
    raise TypeError(f"{type(model).__name__} is no Flax model: expected an nnx.Module or a linen.Module instance")


def _count_nnx(model: nnx.Module, arguments: list[Any], kwargs: Mapping[str, Any]) -> Cost:
    graph, state = nnx.split(model)
    norms = [node for _, node in nnx.iter_graph(model) if isinstance(node, NORMS)]
    jaxpr = jax.make_jaxpr(lambda state, *args: nnx.merge(graph, state)(*args, **kwargs))(state, *arguments)
    return Cost(
        parameters=_size(nnx.state(model, nnx.Param)),
        norm_parameters=sum(_size(nnx.state(norm, nnx.Param)) for norm in norms),
        macs=_macs(jaxpr.jaxpr),
    )


def _count_linen(
    model: linen.Module, arguments: list[Any], variables: Mapping[str, Any] | None, kwargs: Mapping[str, Any]
) -> Cost:
    norm_paths: set[tuple[str, ...]] = set()

    def note_norms(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, NORMS):
            norm_paths.add(context.module.path)
        return call(*args, **kwargs)

    # Linen falls back on the "params" stream for any other (dropout and the like): only shapes matter here.
    rngs = {"params": jax.random.key(0)}
    if variables is None:
        variables = jax.eval_shape(lambda *args: model.init(rngs, *args, **kwargs), *arguments)

    def apply(variables: Any, *args: Any) -> Any:
        with linen.intercept_methods(note_norms):
            return model.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)

    jaxpr = jax.make_jaxpr(apply)(variables, *arguments)
    params = variables.get("params", {})
    return Cost(
        parameters=_size(params),
        norm_parameters=sum(_size(_at(params, path)) for path in norm_paths),
        macs=_macs(jaxpr.jaxpr),
    )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree.get(name, {})
    return tree


def _abstract(x: Any) -> Any:
    """Shapes (tuples of integers) become float32 abstract arrays; arrays lose their values; pytrees are walked."""

    def is_shape(node: Any) -> bool:
        return isinstance(node, tuple) and all(isinstance(n, int) for n in node)

    def leaf(node: Any) -> jax.ShapeDtypeStruct:
        return (
            jax.ShapeDtypeStruct(node, jnp.float32)
            if is_shape(node)
            else jax.ShapeDtypeStruct(jnp.shape(node), jnp.result_type(node))
        )

    return jax.tree.map(leaf, x, is_leaf=is_shape)


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


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
