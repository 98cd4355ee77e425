"""A function of JAX in ONNX, by jax2onnx."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

# Calls that are written out, so that what they call is looked at, too, and where they keep it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
OPSET = 21  # the operations of ONNX 1.16 of 2024; onnxruntime up to 1.22 refuses those that jax2onnx writes by itself
_POOLS = ("reduce_window_max", "reduce_window_sum")


def write(function: Callable[[jax.Array], jax.Array], images: jax.ShapeDtypeStruct, path: pathlib.Path) -> Any:
    """Writes a function of images with the operations of `OPSET`, and reads it again as a session of onnxruntime.

    Args:
        function: Of one array, to one array.
        images: The array, whose first axis may have any size.
        path: Of the file.

    Raises:
        ImportError: A package is not installed.
        ValueError: jax2onnx cannot write one of the function's operations.
    """
    import onnxruntime

    with _put_back():
        model = _converted(function, images)
    path.write_bytes(model.SerializeToString())  # jax2onnx itself would put large weights into a second file
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _converted(function: Callable[[jax.Array], jax.Array], images: jax.ShapeDtypeStruct) -> Any:
    import jax2onnx

    for name in ("jax2onnx", "onnx_ir"):  # they warn of libraries and types that have nothing to do with this
        logging.getLogger(name).setLevel(logging.ERROR)
    # Traced here: jax2onnx would put layers of its own in place of Flax's, and knows no choice between platforms.
    traced = jax.make_jaxpr(function)(images)

    def on_platform(images: jax.Array) -> jax.Array:
        return _run(traced.jaxpr, traced.consts, images)[0]

    try:
        return jax2onnx.to_onnx(on_platform, [images], opset=OPSET, return_mode="proto")
    except Exception as error:  # it raises whatever it stumbles over
        raise ValueError(
            f"jax2onnx cannot write this network as ONNX ({type(error).__name__}: {_first_line(error)}); the formats "
            "safetensors and stablehlo hold every network"
        ) from error


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """Of what jax2onnx puts in place of functions of JAX and Flax, it leaves two behind: a cumsum that takes no second
    argument, and a call of Linen's attention that is for its own tracing.
    """
    from flax import linen

    replaced = ((jnp, "cumsum"), (linen.MultiHeadAttention, "__call__"))
    before = [vars(owner).get(name) for owner, name in replaced]
    try:
        yield
    finally:
        for (owner, name), value in zip(replaced, before, strict=True):
            if value is not None:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _run(jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
    """What a traced function returns, its choices between platforms made, in operations that jax2onnx can write."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        given, name = [value(atom) for atom in equation.invars], equation.primitive.name
        if name == "platform_index":
            results = [np.int32(_index(equation.params["platforms"]))]
        elif name == "cond" and not isinstance(given[0], jax.core.Tracer):
            branches = equation.params["branches"]
            branch = branches[min(max(int(given[0]), 0), len(branches) - 1)]
            results = _run(branch.jaxpr, branch.consts, *given[1:])
        elif name in _CALLS:
            called = equation.params[_CALLS[name]]
            results = _run(getattr(called, "jaxpr", called), getattr(called, "consts", ()), *given)
        elif name == "convert_element_type" and not isinstance(given[0], jax.core.Tracer):
            results = [np.asarray(given[0], equation.params["new_dtype"])]  # so that what is padded with is known
        elif name == "pad" and _is_plain(*given, **equation.params):
            # Over a batch of any size jax2onnx can write a call of jax.numpy.pad, and not this operation.
            widths = [(int(before), int(behind)) for before, behind, _ in equation.params["padding_config"]]
            results = [jnp.pad(given[0], widths, constant_values=given[1])]
        elif name in _POOLS and _is_of_images(**equation.params):
            results = [_pool(equation.primitive, *given, **equation.params)]
        else:
            results = equation.primitive.bind(*given, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        known |= zip(equation.outvars, results, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _index(platforms: Any) -> int:
    """Of the form for all platforms among those of `jax.lax.platform_dependent`: ONNX runs on many, and the others are
    such as XLA computes well on one. Where there is none, of that for CPUs.
    """
    return min(range(len(platforms)), key=lambda i: (platforms[i] is not None, "cpu" not in (platforms[i] or ())))


def _is_plain(x: Any, value: Any, padding_config: Any) -> bool:
    """Whether `jax.numpy.pad` can do it: outside only, with a number that is known."""
    outside_only = all(min(before, behind) >= 0 and inside == 0 for before, behind, inside in padding_config)
    return outside_only and not isinstance(value, jax.core.Tracer)


def _is_of_images(window_dimensions: Any, window_strides: Any, padding: Any, base_dilation: Any, **_: Any) -> bool:
    """Whether windows of [B, H, W, C] extend over H and W only."""
    axes = [*zip(window_dimensions, window_strides, map(tuple, padding), base_dilation, strict=True)]
    return len(axes) == 4 and axes[0] == axes[3] == (1, 1, (0, 0), 1)


def _pool(primitive: Any, x: jax.Array, **params: Any) -> jax.Array:
    """Pooling of [B, H, W, C] as that of [B C, H, W]: jax2onnx takes every dimension for one that windows extend over,
    of which runtimes of ONNX have three at most.
    """
    b, height, width, c = x.shape
    planes = jnp.transpose(x, (0, 3, 1, 2)).reshape(b * c, height, width)
    pooled = primitive.bind(planes, **{name: value[:3] for name, value in params.items()})
    return jnp.transpose(pooled.reshape(b, c, *pooled.shape[1:]), (0, 2, 3, 1))
