"""Networks by name, and any Flax model of your own in their place::

    common = {"num_classes": 10, "image_size": 32, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    model = models.build("resnet18", residual="convshort", **common)
    model = models.build("my_package.my_module:make", width=96, **common)

Whatever `build` returns is an `nnx.Module` that is called with images alone, `model(images) -> logits`, has `train()`
and `eval()`, and can be split into parameters (`nnx.Param`), batch statistics (`nnx.BatchStat`) and the state of its
random numbers (`nnx.RngState`).

A new network is one function and one line in `MODELS`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as linen_errors
from flax import linen, nnx

from nfjax import _names, resnet

Builder = Callable[..., Any]

MODELS: dict[str, Builder] = {
    "preact_resnet": resnet.PreActResNet,
    "resnet10": resnet.resnet10,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
}

# What the call of a Linen model, by custom, names the switch between its two modes, and its value in training.
TRAINING_FLAGS: Mapping[str, bool] = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def build(
    name: str | Builder, /, *, num_classes: int, image_size: int, dtype: Any, rngs: nnx.Rngs, **arguments: Any
) -> nnx.Module:
    """The network of that name, its parameters drawn.

    A function of your own is called with `num_classes=` and with those of `rngs=`, `image_size=` and `dtype=` that its
    signature names, besides `arguments`. It returns a module that

    - NNX: is called as `model(images)`, and does what differs in training by the attributes `deterministic` and
      `use_running_average`, as Flax's own layers do, which `model.train()` and `model.eval()` set;
    - Linen: is called as `model(images)` and a flag: all those of `TRAINING_FLAGS` that its `__call__` has are passed;
      or has none, where both modes are the same, or where it asks `is_mutable_collection("batch_stats")`. It comes back
      inside a `LinenNetwork`.

    Args:
        name: In `MODELS`, or "package.module:function", looked for in the current folder first, or that function.
        num_classes: Of the logits.
        image_size: Height and width of the images in pixels.
        dtype: Of activations and arithmetic.
        rngs: Of the parameters, and of dropout and the like.
        **arguments: Of the function.

    Returns:
        A module, images [B, image_size, image_size, 3] in float32 -> logits [B, num_classes].

    Raises:
        ValueError: There is no such name, module or function; it has no such argument, or needs one more; what the
            module returns has another shape; or it cannot do without writing its batch statistics in evaluation.
        TypeError: The function returned no Flax module.
    """
    shown = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    function, own = _find(name)
    given = {"num_classes": num_classes, "image_size": image_size, "dtype": dtype, "rngs": rngs}
    made = function(**_arguments(shown, function, arguments, given))
    if isinstance(made, type) or not isinstance(made, nnx.Module | linen.Module):
        given = f"the class {made.__name__}" if isinstance(made, type) else type(made).__name__
        raise TypeError(f"model {shown} returned {given}: expected an nnx.Module or a linen.Module instance")
    if isinstance(made, linen.Module):
        made = LinenNetwork(made, image_size, rngs=rngs)
    if own:
        _check(shown, made, num_classes, image_size)
    return made


def takes(name: str | Builder, argument: str) -> bool:
    """Whether the function of that name has such an argument. Raises ValueError where there is no such function."""
    parameters = inspect.signature(_initializer(_find(name)[0])).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class LinenNetwork(nnx.Module):
    """A Linen model as an NNX one: [B, H, W, 3] -> what the Linen model returns.

    Its parameters are `nnx.Param`s and its batch statistics `nnx.BatchStat`s below `network`; `train()` and `eval()`
    set what the model is called with. In training it may write its collections, batch statistics for one, in evaluation
    none.
    """

    def __init__(self, module: linen.Module, image_size: int, *, rngs: nnx.Rngs):
        """Draws its parameters in evaluation mode, on zeros [1, image_size, image_size, 3].

        Args:
            module: The Linen model.
            image_size: Height and width in pixels.
            rngs: Of the parameters; kept for dropout and the like.
        """
        parameters = inspect.signature(type(module).__call__).parameters
        self.flags = tuple(flag for flag in TRAINING_FLAGS if flag in parameters)
        self.deterministic = True
        zeros = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
        # Compiled as a whole, which takes a fraction of the time of one operation after the other.
        self.network = nnx.jit(lambda rngs, x: nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(x, **self._call_flags()))(
            rngs, zeros
        )
        kinds = {type(v) for _, v in nnx.to_flat_state(nnx.state(self.network)) if not isinstance(v, nnx.RngState)}
        self.collections = tuple(sorted({nnx.variable_name_from_type(kind) for kind in kinds} - {"params"}))

    def __call__(self, images: jax.Array) -> Any:
        mutable = False if self.deterministic or not self.collections else list(self.collections)
        return self.network(images, mutable=mutable, **self._call_flags())

    def _call_flags(self) -> dict[str, bool]:
        return {flag: TRAINING_FLAGS[flag] is not self.deterministic for flag in self.flags}


def _find(name: str | Builder) -> tuple[Builder, bool]:
    """The function, and whether it is somebody's own."""
    if isinstance(name, str) and ":" in name:
        return _names.imported("model", name), True
    try:
        return _names.lookup("model", name, MODELS), callable(name)
    except ValueError as error:
        raise ValueError(f"{error}; or package.module:function for one of your own") from None


def _arguments(shown: str, function: Builder, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the function is called with, of `given` what it names; ValueError where that does not fit its signature."""
    parameters = inspect.signature(_initializer(function)).parameters
    named = {p.name: p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    passed = {key: value for key, value in given.items() if key in named or key == "num_classes"}
    own = [key for key in named if key not in passed]
    for key in (*passed, *arguments):
        if key not in named and not anything:
            if key in passed:
                raise ValueError(f"model {shown} has no argument num_classes, the number of logits that it must return")
            _names.lookup(f"argument of the model {shown}:", key, dict.fromkeys(own), callables=False)
    needed = [key for key in own if named[key].default is inspect.Parameter.empty and key not in arguments]
    if needed:
        raise ValueError(f"model {shown} needs the argument {needed[0]}: give it a value or a default")
    return {**passed, **arguments}


def _initializer(function: Builder) -> Builder:
    """What has the signature of the function: of an NNX class, which has its metaclass's, its `__init__`."""
    partial = function if isinstance(function, functools.partial) else functools.partial(function)
    if isinstance(partial.func, type) and issubclass(partial.func, nnx.Module):
        return functools.partial(partial.func.__init__, None, *partial.args, **partial.keywords)
    return function


def _check(shown: str, model: nnx.Module, num_classes: int, image_size: int) -> None:
    """ValueError where a model of somebody's own does not turn images into logits, in both modes; from shapes alone."""
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    for mode in (model.train, model.eval):
        mode()
        graph, state = nnx.split(model)
        try:
            out = jax.eval_shape(lambda state, images, graph=graph: nnx.merge(graph, state)(images), state, images)
        except linen_errors.ModifyScopeVariableError as error:
            raise ValueError(
                f"model {shown} writes its batch statistics in evaluation, too: give its __call__ a flag for training, "
                f"one of {', '.join(TRAINING_FLAGS)}, and let it decide, as in BatchNorm(use_running_average=not train)"
            ) from error
        except Exception as error:
            error.add_note(
                f"(raised by the model {shown}, called as model(images) with images of shape [2, {image_size}, "
                f"{image_size}, 3] in {'training' if mode == model.train else 'evaluation'})"
            )
            raise
        if getattr(out, "shape", None) != (2, num_classes) or not jnp.issubdtype(out.dtype, jnp.floating):
            found = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
            raise ValueError(
                f"model {shown} returns {found} for 2 images of {image_size} pixels: expected floating-point logits "
                f"[2, {num_classes}], [batch, num_classes]"
            )
