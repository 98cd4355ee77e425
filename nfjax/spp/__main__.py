"""python -m nfjax.spp --depth=101 --residual=idshort --init=brock --seeds=5 --out=plot.png

python -m nfjax.spp --module=my_package.my_module:make_model --where=Encoder,Decoder --arg=train=False --out=plot.png

Signal propagation of one of the paper's networks, or of a model of your own: a table, a verdict, a picture.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nfjax import preemption

if __name__ == "__main__":
    preemption.begin()

import numpy as np
from flax import errors as linen_errors
from flax import linen, nnx

from nfjax import compilation, initializers, residual, resnet, spp
from nfjax.data.decoding import formats
from nfjax.data.decoding.crops import CentreCrop

PLOTS = (".png", ".svg", ".pdf")
NETWORK = ("depth", "residual", "norm", "init", "stem", "width", "image_size", "input", "batch")


# The model's own arguments of these names cannot be told from those of the measurement.
RESERVED = [
    p.name
    for p in inspect.signature(spp.propagate_seeds).parameters.values()
    if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
]


class UsageError(Exception):
    """What the command line asks for cannot be done."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nfjax.spp",
        description="Signal propagation of one of the paper's networks, or of a model of your own.",
    )
    network = parser.add_argument_group("one of the paper's networks")
    network.add_argument("--depth", type=int, choices=resnet.STAGES, metavar="N", help=_names(resnet.STAGES))
    network.add_argument("--residual", choices=residual.RESIDUALS, metavar="NAME", help=_names(residual.RESIDUALS))
    network.add_argument(
        "--norm", choices=["none", *resnet.NORMS], metavar="NAME", help=_names(["none", *resnet.NORMS])
    )
    network.add_argument(
        "--init", choices=initializers.INITIALIZERS, metavar="NAME", help=_names(initializers.INITIALIZERS)
    )
    network.add_argument("--stem", choices=resnet.STEMS, metavar="NAME", help=_names(resnet.STEMS))
    network.add_argument("--width", type=_positive, help="channels of the first stage (64)")
    network.add_argument("--image-size", type=_positive, help="pixels (32, or 224 with --stem=imagenet)")
    network.add_argument(
        "--input", type=os.path.expanduser, metavar="noise|DIR", help="N(0, 1) noise, or a folder of images (noise)"
    )
    network.add_argument("--batch", type=_positive, help="examples (32)")
    own = parser.add_argument_group("a model of your own")
    own.add_argument(
        "--module", metavar="PACKAGE.MODULE:FUNCTION",
        help="a function that returns an nnx.Module, a Linen module, or (model, input); it may take `seed`",
    )  # fmt: skip
    own.add_argument(
        "--make", action="append", default=[], type=_setting, metavar="NAME=VALUE",
        help="an argument of that function, VALUE as Python writes it: width=64, name='\"small\"'; may be repeated",
    )  # fmt: skip
    own.add_argument(
        "--arg", action="append", default=[], type=_setting, metavar="NAME=VALUE",
        help="a keyword argument of the model's call, likewise: train=False; may be repeated",
    )  # fmt: skip
    own.add_argument("--input-shape", metavar="1,32,32,3", help="of N(0, 1) noise, where the function gives no input")
    own.add_argument(
        "--where", action="append", metavar="CLASS[,CLASS]",
        help="the class of the blocks, or several; may be repeated (those that repeat and add to their input)",
    )  # fmt: skip
    own.add_argument(
        "--output", metavar="INDEX|PATH",
        help="of blocks that return several arrays, which one: 1, or 0/hidden (the one that is used)",
    )  # fmt: skip
    own.add_argument("--branch", metavar="NAME", default="branch", help="name or class of a block's residual branch")
    parser.add_argument("--loss", choices=["cross_entropy"], help="start of the gradient (N(0, 1) at the last block)")
    parser.add_argument("--seeds", type=_positive, default=1, help="how many (1)")
    parser.add_argument("--tolerance", type=float, default=10.0, help="factor that counts as preserved (10)")
    parser.add_argument(
        "--out",
        action="append",
        default=[],
        type=os.path.expanduser,
        metavar="FILE",
        help="PNG, SVG, PDF, CSV or JSON; may be repeated",
    )
    arguments = parser.parse_args(argv)
    if arguments.module and (given := [name for name in NETWORK if getattr(arguments, name) is not None]):
        parser.error(
            f"--{given[0].replace('_', '-')} describes one of the paper's networks; it does not go with --module"
        )
    if not arguments.module and arguments.depth is None:
        parser.error(
            "--depth is missing, such as --depth=50; or --module=PACKAGE.MODULE:FUNCTION for a model of your own"
        )
    if not arguments.module and (arguments.input_shape or arguments.where or arguments.make or arguments.arg):
        parser.error("--make, --arg, --input-shape and --where go with --module")
    if not arguments.module and arguments.output is not None:
        parser.error("--output goes with --module")
    if arguments.where is not None:
        arguments.where = tuple(name.strip() for given in arguments.where for name in given.split(","))
        if not all(arguments.where):
            parser.error("--where has an empty name: expected a class or several, such as --where=Encoder,Decoder")
    for option in ("make", "arg"):
        names = [name for name, _ in getattr(arguments, option)]
        if twice := [name for name in names if names.count(name) > 1]:
            parser.error(f"--{option}={twice[0]}=... is given more than once")
    if not arguments.tolerance > 1:
        parser.error("--tolerance must be more than 1: it is a factor")
    for path in map(pathlib.Path, arguments.out):
        if path.suffix.lower() not in (*PLOTS, ".csv", ".json"):
            parser.error(f"--out={path}: unknown kind of file; expected {', '.join(PLOTS)}, .csv or .json")
    return arguments


def _names(names: Any) -> str:
    return ", ".join(map(str, names))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE with a Python literal."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE, such as train=False")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: {value!r} is no Python literal; expected a number, True, False, None, a tuple or the like, or "
            f"a string in quotes of its own, which the shell leaves on: '{name}=\"{value}\"'"
        ) from None


def paper_network(arguments: argparse.Namespace) -> tuple[str, spp.Profile, spp.Prediction | None]:
    """Title, profile and prediction of a network of `nfjax.resnet`."""
    rule, init = arguments.residual or "idshort", arguments.init or "he_fan_out"
    norm = None if arguments.norm in (None, "none") else arguments.norm
    stem, width = arguments.stem or "cifar", arguments.width or 64
    size, batch = arguments.image_size or resnet.STEMS[stem].image_size, arguments.batch or 32
    shape = (batch, size, size, 3)
    noise = arguments.input in (None, "noise")

    def make(seed: int) -> nnx.Module:
        return resnet.PreActResNet(
            arguments.depth, rule, norm, init, stem=stem, width=width, image_size=size, rngs=nnx.Rngs(seed)
        )

    x = spp.noise(shape) if noise else load_images(pathlib.Path(arguments.input), batch, size)
    profile = spp.propagate_seeds(make, x, seeds=arguments.seeds, branch=arguments.branch, loss=arguments.loss)
    title = f"ResNet-{arguments.depth} {rule}{' with batch norm' if norm else ''}, {init}"
    return title, profile, spp.predict(make(0), shape)


def own_model(arguments: argparse.Namespace) -> tuple[str, spp.Profile, None]:
    """Title and profile of what the user's function returns."""
    make = load_function(arguments.module)
    settings, kwargs = dict(arguments.make), dict(arguments.arg)
    if "seed" in settings:
        raise UsageError("--make=seed=...: seeds are counted from 0, --seeds says how many")
    if taken := [name for name in kwargs if name in RESERVED]:
        raise UsageError(
            f"--arg={taken[0]}=...: {taken[0]} is an argument of nfjax.spp.propagate_seeds and does not reach the "
            "model; let the function of --module return a model that sets it"
        )
    takes_seed = "seed" in inspect.signature(make).parameters
    first = _call(make, arguments.module, settings | ({"seed": 0} if takes_seed else {}))
    model, x = first if isinstance(first, tuple) and len(first) == 2 else (first, None)
    if not isinstance(model, nnx.Module | linen.Module):
        raise UsageError(
            f"{arguments.module} returned {type(model).__name__}: expected an nnx.Module, a Linen module, or "
            "(model, input)"
        )
    if isinstance(model, nnx.Module) and arguments.seeds > 1 and not takes_seed:
        raise UsageError(
            f"{arguments.module} takes no `seed`, so that --seeds={arguments.seeds} would measure the same parameters "
            f"{arguments.seeds} times; give it a parameter named seed"
        )
    if x is None:
        if not arguments.input_shape:
            raise UsageError(
                f"{arguments.module} returns no input: return (model, input), or pass --input-shape=1,32,32,3"
            )
        x = spp.noise(_shape(arguments.input_shape))

    def again(seed: int) -> Any:
        made = first if seed == 0 or not takes_seed else _call(make, arguments.module, settings | {"seed": seed})
        return made[0] if isinstance(made, tuple) else made

    inputs = x if isinstance(x, tuple) else (x,)
    profile = spp.propagate_seeds(
        again, *inputs, seeds=arguments.seeds, where=arguments.where, branch=arguments.branch, loss=arguments.loss,
        output=arguments.output, **kwargs,
    )  # fmt: skip
    return type(model).__name__, profile, None


def load_function(name: str) -> Callable[..., Any]:
    """The function that PACKAGE.MODULE:FUNCTION names; the current folder is looked in first."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"--module={name}: expected PACKAGE.MODULE:FUNCTION, such as my_package.my_module:make_model")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(
                f"--module={name}: there is no module {error.name!r} here or among those installed"
            ) from None
        raise
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UsageError(
            f"--module={name}: {module_name} has no function {attribute!r}; it has {_names(known) or 'none'}"
        )
    return function


def _call(function: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Any:
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed := [p.name for p in named if p.default is p.empty and p.name not in kwargs]:
        raise UsageError(
            f"--module={name}: the function needs {_names(needed)}; give it with --make={needed[0]}=..., only `seed` "
            "comes by itself"
        )
    by_name = [p.name for p in named if p.kind is not p.POSITIONAL_ONLY]
    unknown = [key for key in kwargs if key not in by_name]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise UsageError(
            f"--make={unknown[0]}=...: the function {name} has no such parameter; it has {_names(by_name) or 'none'}"
        )
    return function(**kwargs)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise UsageError(f"--input-shape={text}: expected positive integers and commas, such as 1,32,32,3") from None


def load_images(folder: pathlib.Path, count: int, size: int) -> np.ndarray:
    """`count` images from all over a folder, the middle square resized, as float32 [count, size, size, 3] with mean 0
    and variance 1 in each colour.
    """
    if not folder.is_dir():
        raise UsageError(f"--input={folder}: there is no such folder; expected a folder of images, or noise")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and formats.is_image(path))
    if not paths:
        raise UsageError(f"--input={folder}: no images in it or below")
    if len(paths) < count:
        raise UsageError(
            f"--input={folder}: {len(paths)} images, fewer than the batch of {count}; pass --batch={len(paths)}"
        )
    images, middle = np.empty((count, size, size, 3), np.float32), CentreCrop(size, size)
    for image, i in zip(images, np.linspace(0, len(paths) - 1, count).astype(int), strict=True):
        try:
            image[:] = middle(paths[i].read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"--input={folder}: {paths[i]} cannot be read as an image ({error})") from None
    images -= images.mean(axis=(0, 1, 2))
    return images / np.maximum(images.std(axis=(0, 1, 2)), 1e-6)


def main() -> None:
    arguments = parse()
    compilation.keep()
    try:
        for path in map(pathlib.Path, arguments.out):  # a folder that cannot be made is known before the work is done
            path.parent.mkdir(parents=True, exist_ok=True)
        title, profile, prediction = own_model(arguments) if arguments.module else paper_network(arguments)
        print(f"{title}\n\n{profile!r}\n\n{profile.diagnose(arguments.tolerance)}")
        for path in map(pathlib.Path, arguments.out):
            if path.suffix.lower() == ".csv":
                profile.to_csv(path)
            elif path.suffix.lower() == ".json":
                profile.to_json(path)
            else:
                spp.plot({"measured": profile}, prediction, title=title).savefig(path, dpi=150)
            print(f"\n{path}", end="")
        print()
    except (UsageError, ValueError, TypeError, OSError, linen_errors.FlaxError) as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()) if "nfjax" in note)
        sys.exit(f"nfjax: {error}{notes}")


if __name__ == "__main__":
    main()
