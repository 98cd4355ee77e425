"""The network of a config, and any Flax NNX model as pure functions of plain dicts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from nfjax import _names, initializers, models
from nfjax._names import lookup
from nfjax.training import keywords, patterns, ranges
from nfjax.training.ranges import Range

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Whose functions may be called by name without being asked for: they make parts of networks, and nothing else.
OURS = re.compile(r"nfjax\.(initializers|layers|residual|resnet)[.:]")
MOST_BLOCKS = 2048  # of a network, with which tracing still takes minutes only
# The fields of `config.model` that our networks take, and which of them are the shape of one of a given depth.
FIELDS = ("depth", "stage_sizes", "block", "residual", "norm", "init", "stem", "width", "remat")
SHAPE = ("depth", "stage_sizes", "block")
# What a network is also called with, and what decides it.
ELSEWHERE = {
    "num_classes": "the number of classes of the images",
    "image_size": "set by --config.data.image_size",
    "dtype": "set by --config.model.dtype",
    "rngs": "made from --config.seed",
}
STATE = nnx.All(nnx.Not(nnx.Param), nnx.Not(nnx.RngState))  # what is neither a parameter nor a random stream


def _check_stages(name: str, values: Any) -> None:
    for value in values:
        ranges.check_number(name, value, int)
    if not values or min(values) < 1 or sum(values) > MOST_BLOCKS or len(values) > 8:
        raise ValueError(
            f"{name}={tuple(values)}: expected the blocks of one to eight stages, {MOST_BLOCKS} in all at most, such "
            f"as --config.{name}='(2, 2, 2)'"
        )


RANGES: dict[str, Range] = {
    "model.width": ranges.whole(1, 2**16, "must be a positive integer, and at most 65536 channels"),
    "model.stage_sizes": Range(check=_check_stages),
}


def shapes(config: ConfigDict, num_classes: int = 2, **instead: Any) -> nnx.Module:
    """The network that a config describes, with shapes in place of arrays.

    Where an attribute is an array and no `nnx.Variable`, it is zeros: NNX would take a shape for a setting of the
    module, and `nnx.eval_shape` does that, and fails.

    Args:
        config: Of the run.
        num_classes: Logits of the network.
        **instead: As for `build`.

    Raises:
        ValueError: It cannot be: found here, at no cost, and not after the images are decoded.
    """
    made = architecture(config)
    try:
        return made.shapes(num_classes, config.data.image_size, **instead)
    except TypeError as error:
        arguments = f", model.arguments={config.model.arguments!r}" if config.model.arguments else ""
        raise ValueError(f"model.name={config.model.name}{arguments}: it cannot be built: {error}") from error


def head(config: ConfigDict, num_classes: int = 2) -> frozenset[str]:
    """The paths of the parameters whose shapes follow the number of classes: what tells classes apart."""
    own, other = (
        patterns.by_path(nnx.to_pure_dict(nnx.state(shapes(config, classes), nnx.Param)))
        for classes in (num_classes, num_classes + 1)
    )
    return frozenset(path for path, leaf in own.items() if path not in other or other[path].shape != leaf.shape)


def build(config: ConfigDict, num_classes: int, key: jax.Array, **instead: Any) -> nnx.Module:
    """The network that a config describes.

    Args:
        config: Of the run.
        num_classes: Logits of the network.
        key: From which its parameters are drawn.
        **instead: Arguments of the network in place of those of the config.
    """
    return architecture(config).build(num_classes, config.data.image_size, key, **instead)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a network is built from but for its classes and the size of its images: texts, numbers and tuples.

    Attributes:
        name: In `nfjax.models.MODELS`, or "package.module:function".
        arguments: Of the network. In those of ours, "package.module:function" stands for that function.
        dtype: Of activations and arithmetic, a name in `DTYPES`.
    """

    name: str
    arguments: dict[str, Any]
    dtype: str = "float32"

    def build(self, num_classes: int, image_size: int, key: jax.Array, **instead: Any) -> nnx.Module:
        """The network; arguments and errors as of the function `build`."""
        settings = self.arguments
        if self.is_ours():
            settings = {name: _found(name, value) for name, value in settings.items()}
        model = models.build(
            self.name,
            num_classes=num_classes,
            image_size=image_size,
            dtype=lookup("model.dtype", self.dtype, DTYPES, callables=False),
            rngs=nnx.Rngs(jax.random.fold_in(key, 1), params=key),
            **settings | instead,
        )
        nnx.pop(model, nnx.Intermediate)  # of a call while it was built
        return model

    def shapes(self, num_classes: int, image_size: int, **instead: Any) -> nnx.Module:
        """The network with shapes in place of arrays, as of the function `shapes`."""
        if self.is_ours():
            if "init" in self.arguments:  # its name; tracing its random numbers takes seconds
                initializers.get(_found("init", self.arguments["init"]))
            instead = {"init": jax.nn.initializers.zeros} | instead
        return _without_arrays(lambda: self.build(num_classes, image_size, jax.random.key(0), **instead))

    def is_ours(self) -> bool:
        """Whether the network is one of `nfjax.models.MODELS`."""
        return self.name in models.MODELS

    def check_dtype(self, dtype: str) -> None:
        """Raises ValueError where the network cannot compute in `dtype`: an unknown one, or it has no such argument."""
        lookup("dtype", dtype, DTYPES, callables=False)
        if dtype != self.dtype and not models.takes(self.name, "dtype"):
            raise ValueError(
                f"dtype={dtype}: the network {self.name} has no argument dtype, and computes as it always does; leave "
                "it out, or give the function that makes the network one"
            )

    def code(self) -> list[str]:
        """The "package.module:function"s by which other code than that of our networks is run where one is built."""
        named = [self.name, *(self.arguments.values() if self.is_ours() else ())]
        own = [name for name in named if isinstance(name, str) and ":" in name]
        return [name for name in own if not OURS.match(name)]


def architecture(config: ConfigDict) -> Architecture:
    """Of the network that a config describes: the fields of `config.model` for those of ours, and what the config adds.

    Raises ValueError where `model.arguments` cannot be read, or has what is set elsewhere.
    """
    arguments = keywords.parse("model.arguments", config.model.arguments)
    for name in arguments.keys() & ELSEWHERE.keys():
        raise ValueError(f"model.arguments={config.model.arguments!r} has {name!r}, which is {ELSEWHERE[name]}")
    if is_ours(config):
        settings = {name: getattr(config.model, name) for name in FIELDS}
        if config.model.name != "preact_resnet":
            settings = {name: value for name, value in settings.items() if name not in SHAPE}
        elif settings["stage_sizes"] is not None:
            settings["depth"] = None
        if settings["norm"] == "none":
            settings["norm"] = None
        arguments = settings | arguments
    return Architecture(config.model.name, arguments, config.model.dtype)


def _without_arrays(make: Callable[[], nnx.Module]) -> nnx.Module:
    """What `make` makes, with shapes in place of arrays."""
    graphs = []

    def state() -> nnx.State:
        model = make()
        for _, module in nnx.iter_graph(model):
            for name, value in list(vars(module).items()) if isinstance(module, nnx.Module) else ():
                if isinstance(value, jax.core.Tracer):  # which NNX, unlike an array, takes for a setting
                    setattr(module, name, nnx.data(value))
        graph, state = nnx.split(model)
        graphs.append(graph)
        return state

    flat = nnx.to_flat_state(jax.eval_shape(state))
    return nnx.merge(graphs[0], nnx.from_flat_state([(path, _zeros_or_variable(value)) for path, value in flat]))


def _zeros_or_variable(value: Any) -> Any:
    return jnp.zeros(value.shape, value.dtype) if isinstance(value, jax.ShapeDtypeStruct) else value


def _found(name: str, value: Any) -> Any:
    """What a setting of a network stands for: "package.module:function" for that function, all else for itself."""
    return _names.imported(f"model.{name}", value) if isinstance(value, str) and ":" in value else value


def is_ours(config: ConfigDict) -> bool:
    """Whether the network is one of `nfjax.models.MODELS`, which take the fields of `config.model`."""
    return config.model.name in models.MODELS


def title(config: ConfigDict) -> str:
    """The network in a few words: "ResNet-18 convshort"."""
    model = config.model
    if not is_ours(config):
        return model.name
    if model.name != "preact_resnet":
        return f"{model.name} {model.residual}"
    name = f"ResNet-{model.depth}" if model.stage_sizes is None else f"ResNet {'-'.join(map(str, model.stage_sizes))}"
    return f"{name} {model.residual}"


def describe(config: ConfigDict) -> str:
    """The network in a line: what it is, and what of it was set."""
    model = config.model
    more = f", {model.arguments}" if model.arguments else ""
    if not is_ours(config):
        return f"{title(config)}{more}"
    norm = _found("norm", architecture(config).arguments["norm"])
    norm = " without normalization" if norm is None else f" with {getattr(norm, '__name__', norm)} norm"
    return f"{title(config)}{norm}, {model.init}, width {model.width}{more}"


# ---------------------------------------------------------------- a model as functions


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A Flax NNX model as functions of plain dicts: NNX is at work only while they are traced, which keeps a dispatch
    short.

    Attributes:
        train_graph: Of the model in training mode.
        eval_graph: Of the model in evaluation mode.
        structures: Of the NNX states of parameters and batch statistics.
        random: The state of the model's own random streams, of dropout for example; empty where it has none.
        synchronized: Whether all that it keeps between steps is the same on every device, as batch norm's statistics
            over all of them are; what else there is has to be averaged.
        frozen: Patterns of what training leaves as it is, parameters and what is kept: no gradient reaches them, and
            batch norm below them takes its running statistics.
    """

    train_graph: nnx.GraphDef
    eval_graph: nnx.GraphDef
    structures: tuple[Any, Any]
    random: Any
    synchronized: bool
    frozen: tuple[str, ...] = ()

    def train(
        self,
        params: Any,
        batch_stats: Any,
        images: jax.Array,
        noise: jax.Array | None = None,
        axes: tuple[str, ...] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits and what the network keeps for the next step, in training mode.

        Args:
            params: Plain dict of parameters.
            batch_stats: Plain dict of the rest.
            images: [B, H, W, 3].
            noise: Key from which the model's own random streams start; as they were built if None.
            axes: Of the mesh, inside of `jax.shard_map`: batch norm then takes its statistics over the images of all
                of their devices.

        Returns:
            Logits [B, classes], float32 whatever the network computes in, and the updated batch statistics.
        """
        if self.frozen:
            params = patterns.map_by_path(
                lambda path, leaf: jax.lax.stop_gradient(leaf) if patterns.matches(self.frozen, path) else leaf, params
            )
        model = self._merge(self.train_graph, params, batch_stats, noise)
        model.set_attributes(nnx.BatchNorm, axis_name=axes, raise_if_not_found=False)
        logits = model(images).astype(jnp.float32)
        nnx.pop(model, nnx.Intermediate)  # such as it sows: for those who look on
        updated = nnx.to_pure_dict(nnx.state(model, STATE))
        if axes and not self.synchronized:
            updated = jax.tree.map(lambda x: _of_all_devices(x, axes), updated)
        return logits, patterns.held(self.frozen, batch_stats, updated)

    def predict(self, params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        """Logits [B, classes], float32, from running statistics where there is batch norm."""
        return self._merge(self.eval_graph, params, batch_stats)(images).astype(jnp.float32)

    def model(self, params: Any, batch_stats: Any, noise: jax.Array | None = None) -> nnx.Module:
        """The NNX model in training mode. noise: as for `train`."""
        return self._merge(self.train_graph, params, batch_stats, noise)

    def _merge(self, graph: nnx.GraphDef, params: Any, batch_stats: Any, noise: jax.Array | None = None) -> nnx.Module:
        # A plain dict has its leaves in the order of the nnx.State it was made from.
        states = [
            jax.tree.unflatten(structure, jax.tree.leaves(tree))
            for structure, tree in zip(self.structures, (params, batch_stats), strict=True)
        ]
        random = restarted(self.random, noise)
        return nnx.merge(graph, states[0], random, states[1])


def _of_all_devices(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The mean over the devices; the largest of whole numbers and truth values, such as a counter; keys as they are."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.lax.pmean(x, axes)
    if x.dtype == jnp.bool_:
        return jax.lax.pmax(x.astype(jnp.uint8), axes).astype(jnp.bool_)
    return jax.lax.pmax(x, axes) if jnp.issubdtype(x.dtype, jnp.integer) else x


def restarted(random: Any, key: jax.Array | None) -> Any:
    """The state of a model's random streams, its `nnx.RngState`, such that they begin with keys of `key`.

    As they were if it is None, but a copy: a model that draws from its streams changes them.
    """
    leaves, structure = jax.tree.flatten(random)
    if key is None:
        return jax.tree.unflatten(structure, leaves)

    def started(number: int, leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            started = jax.random.fold_in(key, number)
            return jax.random.split(started, leaf.shape) if leaf.shape else started  # of layers that are one array
        return jnp.zeros_like(leaf)  # how often it was drawn from

    return jax.tree.unflatten(structure, [started(number, leaf) for number, leaf in enumerate(leaves)])


def begin_streams(model: nnx.Module, key: jax.Array) -> None:
    """Gives the random streams of a model keys of `key`, where they have no keys yet, too."""
    nnx.update(model, restarted(nnx.state(model, nnx.RngState), key))


def as_functions(model: nnx.Module, frozen: Sequence[str] = ()) -> tuple[Network, Any, Any]:
    """(network, params, batch_stats) of a model; the last two are plain dicts.

    Args:
        model: Any NNX model.
        frozen: Patterns of what training leaves as it is.

    Raises:
        ValueError: Batch norm of a Linen model is among it, which does not tell how it is to be used.
    """
    model.train()
    _freeze_statistics(model, frozen)
    train_graph, params, random, batch_stats = nnx.split(model, nnx.Param, nnx.RngState, ...)
    model.eval()
    eval_graph, *_ = nnx.split(model, nnx.Param, nnx.RngState, ...)
    structures = (jax.tree.structure(params), jax.tree.structure(batch_stats))
    normalized = sum(
        len(jax.tree.leaves(nnx.state(module, nnx.BatchStat)))
        for _, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    )
    synchronized = normalized == len(jax.tree.leaves(batch_stats))
    network = Network(train_graph, eval_graph, structures, random, synchronized, tuple(frozen))
    return network, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def _freeze_statistics(model: nnx.Module, frozen: Sequence[str]) -> None:
    """Sets the norms that are frozen to their running statistics, those that have this switch, as Flax's do."""
    if not frozen:
        return
    for keys, module in nnx.iter_modules(model):
        path = "/".join(map(str, keys))
        kept = [f"{path}/{name}".lstrip("/") for name in patterns.by_path(nnx.to_pure_dict(nnx.state(module, STATE)))]
        held = [name for name in kept if patterns.matches(frozen, name)]
        if held and isinstance(module, models.LinenNetwork):
            raise ValueError(
                f"optim.freeze={','.join(frozen)} has {held[0]} of a Linen model, whose batch norm has one switch for "
                "all of it: freeze its parameters alone, such as --config.optim.freeze='**/kernel,**/scale,**/bias'; "
                "its running statistics then go on"
            )
        if held == kept and held and hasattr(module, "use_running_average"):
            module.use_running_average = True
