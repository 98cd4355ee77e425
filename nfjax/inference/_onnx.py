"""A function of JAX in ONNX, by jax2onnx."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
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


def write(function: Callable[[jax.Array], jax.Array], images: jax.ShapeDtypeStruct, path: pathlib.Path) -> Any:
    """Writes a function of images, and reads it again as a session of onnxruntime.

    Args:
        function: Of one array, to one array.
        images: The array, whose first axis may have any size.
        path: Of the file.

    Raises:
        ImportError: A package is not installed.
        ValueError: jax2onnx cannot write one of the function's operations.
    """
    import jax2onnx
    import onnxruntime

    for name in ("jax2onnx", "onnx_ir"):  # they warn of libraries and types that have nothing to do with this
        logging.getLogger(name).setLevel(logging.ERROR)
    # Traced here: jax2onnx would put layers of its own in place of Flax's, and knows no choice between platforms.
    traced = jax.make_jaxpr(function)(images)

    def on_platform(images: jax.Array) -> jax.Array:
        return _run(traced.jaxpr, traced.consts, images)[0]

    try:
        model = jax2onnx.to_onnx(on_platform, [images], return_mode="proto")
    except Exception as error:  # it raises whatever it stumbles over
        raise ValueError(
            f"jax2onnx cannot write this network as ONNX ({type(error).__name__}: {str(error)[:200]}), such as one "
            "that pools at its beginning; the formats safetensors and stablehlo hold every network"
        ) from error
    path.write_bytes(model.SerializeToString())  # jax2onnx itself would put large weights into a second file
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _run(jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
    """What a traced function returns, its choices between platforms made."""
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
        else:
            results = equation.primitive.bind(*given, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        known |= zip(equation.outvars, results, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _index(platforms: Any) -> int:
    """Of the form for CPUs among those of `jax.lax.platform_dependent`, which needs no windows over [B, H, W, C]: for
    these, jax2onnx has only such as ONNX's, over [B, C, H, W]. Else of that for all platforms.
    """
    fitting = [i for i, names in enumerate(platforms) if names is None or "cpu" in names]
    return fitting[0]
