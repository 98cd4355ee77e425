"""nfjax spp --depth=101 --residual=idshort --init=brock --seeds=5 --out=plot.png
       nfjax spp --module=my_package.my_module:make_model --where=Encoder,Decoder --arg=train=False --out=plot.png
       nfjax spp --module=my_package.my_module:make_model --sweep=width:64,128,256 --steps=3 --out=sweep.png

Signal propagation of one of the paper's networks, or of a model of your own: a table, a verdict, a picture. With
--sweep=NAME:VALUES, how activations and their changes after the first steps depend on a width or depth.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import errors as linen_errors
from flax import linen, nnx

from nfjax import _names, compilation, resnet, spp
from nfjax.cli import _networks as networks
from nfjax.cli._outcome import FailedError, UsageError
from nfjax.cli._parser import Parser, names, path, positive
from nfjax.spp._monitor import INPUT, stream

PLOTS, REPORT = (".png", ".svg", ".pdf"), ".html"
SWEPT = ("depth", "width")  # of the paper's networks
OF_SWEEPS = ("steps", "optimizer", "learning_rate")


def add_arguments(parser: Parser) -> None:
    paper = networks.add_paper_arguments(parser)
    paper.add_argument("--input", type=path, metavar="noise|DIR", help="N(0, 1) noise, or a folder of images (noise)")
    paper.add_argument("--batch", type=positive, metavar="N", help="examples (32)")
    own = networks.add_own_arguments(parser)
    own.add_argument(
        "--where", action="append", metavar="CLASS[,CLASS]",
        help="the class of the blocks, or several; may be repeated (those that repeat and add to their input)",
    )  # fmt: skip
    own.add_argument(
        "--output", metavar="INDEX|PATH",
        help="of blocks that return several arrays, which one: 1, or 0/hidden (the one that is used)",
    )  # fmt: skip
    own.add_argument("--branch", metavar="NAME", default="branch", help="name or class of a block's residual branch")
    swept = parser.add_argument_group("a sweep")
    swept.add_argument(
        "--sweep", type=_sweep, metavar="NAME:V,V,V",
        help="compare networks: width:16,32,64 or depth:18,34,50 of the paper's, or with --module any argument of the "
        "function",
    )  # fmt: skip
    swept.add_argument("--steps", type=_steps, metavar="N", help="of the optimizer, on one batch (3)")
    swept.add_argument("--optimizer", choices=["sgd", "adam"], help="that takes them (sgd)")
    swept.add_argument("--learning-rate", type=float, metavar="RATE", help="of the steps (sgd 0.1, adam 0.001)")
    parser.add_argument(
        "--level", choices=["block", "layer"], help="what is measured: blocks, or every layer with parameters (block)"
    )
    parser.add_argument(
        "--jacobians", action="store_true", help="the singular values of each block's Jacobian, too, of the first seed"
    )
    parser.add_argument("--loss", choices=["cross_entropy"], help="start of the gradient (N(0, 1) at the last block)")
    parser.add_argument("--seeds", type=positive, metavar="N", help="how many (1; of a sweep 5)")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="factor that counts as preserved (10); of a sweep, exponent that counts as 0 (0.1)",
    )
    parser.add_argument(
        "--out", action="append", default=[], type=path, metavar="FILE",
        help="PNG, SVG, PDF, CSV, JSON or HTML, a report of it all; may be repeated",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    where = _check(arguments)
    compilation.keep()
    try:
        for file in map(pathlib.Path, arguments.out):  # a folder that cannot be made is known before the work is done
            file.parent.mkdir(parents=True, exist_ok=True)
        answer = _sweep_networks(arguments, where) if arguments.sweep else _measure(arguments, where)
        print(answer.text)
        for file in map(pathlib.Path, arguments.out):
            if file.suffix.lower() == ".csv":
                answer.result.to_csv(file)
            elif file.suffix.lower() == ".json":
                answer.result.to_json(file)
            elif file.suffix.lower() == REPORT:
                answer.write_report(file)
            else:
                answer.plot().savefig(file, dpi=150)
            print(f"\n{file}", end="")
        print()
    except (ValueError, TypeError, linen_errors.FlaxError) as error:  # of the model, too, which notes say
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()) if "nfjax" in note)
        raise FailedError(f"{error}{notes}") from error


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the command shows. result: a `spp.Profile` or `spp.Sweep`. plot: draws it. write_report: of a profile."""

    text: str
    result: Any
    plot: Callable[[], Any]
    write_report: Callable[[pathlib.Path], None] | None = None


def _measure(arguments: argparse.Namespace, where: tuple[str, ...] | None) -> Answer:
    measured = _own_model(arguments, where) if arguments.module else _paper_network(arguments)
    title, profile, prediction, jacobians = measured
    tolerance = 10.0 if arguments.tolerance is None else arguments.tolerance
    shown = [title, repr(profile), *([repr(jacobians)] if jacobians else []), str(profile.diagnose(tolerance))]
    shared = {"jacobians": jacobians, "title": title, "tolerance": tolerance}
    return Answer(
        "\n\n".join(shown),
        profile,
        lambda: spp.plot({"measured": profile}, prediction, details=True, **shared),
        lambda file: spp.write_report(file, profile, prediction, **shared),
    )


def _check(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Refuses what does not go together; the classes of --where."""
    if arguments.sweep:
        _check_sweep(arguments)
    elif given := [name for name in OF_SWEEPS if getattr(arguments, name) is not None]:
        raise UsageError(
            f"--{given[0].replace('_', '-')} goes with --sweep=NAME:VALUES, such as --sweep=depth:18,34,50"
        )
    networks.check(arguments, paper=(*networks.PAPER, "input", "batch"), own=("where",))
    if not arguments.module and arguments.output is not None:
        raise UsageError("--output goes with --module")
    if arguments.tolerance is not None and not arguments.sweep and not arguments.tolerance > 1:
        raise UsageError("--tolerance must be more than 1: it is a factor")
    for file in map(pathlib.Path, arguments.out):
        kind = file.suffix.lower()
        if kind not in (*PLOTS, ".csv", ".json", REPORT):
            raise UsageError(
                f"--out={file}: unknown kind of file; expected {', '.join(PLOTS)}, .csv or .json, or .html for a report"
            )
        if arguments.sweep and kind == REPORT:
            raise UsageError(f"--out={file}: a report is of one network, not of a sweep; expected {', '.join(PLOTS)}")
    if arguments.where is None:
        return None
    where = tuple(name.strip() for given in arguments.where for name in given.split(","))
    if not all(where):
        raise UsageError("--where has an empty name: expected a class or several, such as --where=Encoder,Decoder")
    return where


Measured = tuple[str, spp.Profile, spp.Prediction | None, spp.Jacobians | None]  # the first is a title


def _paper_network(arguments: argparse.Namespace) -> Measured:
    title, make, size = networks.paper_network(arguments)
    batch = arguments.batch or 32
    shape = (batch, size, size, 3)
    noise = arguments.input in (None, "noise")
    x = spp.noise(shape) if noise else load_images(pathlib.Path(arguments.input), batch, size)
    blocks = arguments.level != "layer"
    profile = spp.propagate_seeds(
        make, x, seeds=arguments.seeds or 1, branch=arguments.branch, loss=arguments.loss,
        level=arguments.level or "block",
    )  # fmt: skip
    jacobians = spp.jacobians(make(0), *_drawn([x])) if arguments.jacobians else None
    return title, profile, spp.predict(make(0), shape) if blocks else None, jacobians


def _kwargs(arguments: argparse.Namespace, measure: Callable[..., Any]) -> dict[str, Any]:
    """Of the model's call; UsageError for one that cannot be told from those of the measurement."""
    named = [
        p for p in inspect.signature(measure).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    for name, _ in arguments.arg:
        if name in [parameter.name for parameter in named]:
            raise UsageError(
                f"--arg={name}=...: {name} is an argument of nfjax.spp.{measure.__name__} and does not reach the "
                "model; let the function of --module return a model that sets it"
            )
    return dict(arguments.arg)


def _drawn(inputs: Sequence[Any]) -> list[Any]:
    """The inputs of `spp.propagate_seeds` for its first seed."""
    keys = jax.random.split(stream(0, INPUT), len(inputs) + 1)
    return [x(key) if callable(x) else x for x, key in zip(inputs, keys, strict=False)]


def _own_model(arguments: argparse.Namespace, where: tuple[str, ...] | None) -> Measured:
    kwargs = _kwargs(arguments, spp.propagate_seeds)
    own = networks.OwnModel(arguments)
    if isinstance(own.model, nnx.Module) and (arguments.seeds or 1) > 1 and not own.takes_seed:
        raise UsageError(
            f"{arguments.module} takes no `seed`, so that --seeds={arguments.seeds} would measure the same parameters "
            f"{arguments.seeds} times; give it a parameter named seed"
        )
    profile = spp.propagate_seeds(
        own.make, *own.inputs, seeds=arguments.seeds or 1, where=where, branch=arguments.branch, loss=arguments.loss,
        output=arguments.output, level=arguments.level or "block", **kwargs,
    )  # fmt: skip
    jacobians = None
    if arguments.jacobians:
        jacobians = spp.jacobians(own.model, *_drawn(own.inputs), where=where, output=arguments.output, **kwargs)
    return type(own.model).__name__, profile, None, jacobians


# ---------------------------------------------------------------- a sweep


def _sweep(text: str) -> tuple[str, tuple[float, ...]]:
    """NAME:V,V,V."""
    name, colon, values = text.partition(":")
    try:
        numbers = tuple(float(value) if {".", "e"} & set(value.lower()) else int(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if not (colon and name.isidentifier() and numbers and all(map(math.isfinite, numbers))):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME:V,V,V with numbers, such as width:16,32,64")
    return name, numbers


def _steps(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _check_sweep(arguments: argparse.Namespace) -> None:
    name, values = arguments.sweep
    if arguments.branch != "branch":
        raise UsageError("--branch does not go with --sweep, which measures what blocks return")
    if arguments.level is not None or arguments.jacobians:
        raise UsageError(f"--{'level' if arguments.level else 'jacobians'} does not go with --sweep")
    if arguments.tolerance is not None and not arguments.tolerance > 0:
        raise UsageError("--tolerance must be more than 0: of a sweep, it is an exponent")
    if arguments.learning_rate is not None and not 0 <= arguments.learning_rate < math.inf:
        raise UsageError(f"--learning-rate={arguments.learning_rate}: expected a finite number, 0 or more")
    if arguments.module:
        if name in [given for given, _ in arguments.make]:
            raise UsageError(f"--make={name}=... and --sweep={name}:... give the same argument")
        return
    if name not in SWEPT:
        raise UsageError(
            f"--sweep={name}:...: of the paper's networks {' and '.join(SWEPT)} can be swept; with --module, any "
            "argument of the function"
        )
    if getattr(arguments, name) is not None:
        raise UsageError(f"--{name} and --sweep={name}:... both say what the {name} is")
    for value in values:
        if name == "depth" and value not in resnet.STAGES:
            raise UsageError(f"--sweep=depth:...: {value} is no depth; there are {names(resnet.STAGES)}")
        if value != int(value) or value < 1:
            raise UsageError(f"--sweep={name}:...: {value} is no {name}; expected positive integers")
    setattr(arguments, name, int(values[0]))  # so that a network is described


def _sweep_networks(arguments: argparse.Namespace, where: tuple[str, ...] | None) -> Answer:
    name, values = arguments.sweep
    if arguments.module:
        title, make, inputs, takes_seed = _own_sweep(arguments)
    else:
        size = networks.paper_network(arguments)[2]
        shape, noise = (arguments.batch or 32, size, size, 3), arguments.input in (None, "noise")
        inputs = (spp.noise(shape) if noise else load_images(pathlib.Path(arguments.input), shape[0], size),)
        title, takes_seed = networks.paper_network(arguments)[0], True

        def make(value: float, seed: int) -> Any:
            return networks.paper_network(argparse.Namespace(**{**vars(arguments), name: int(value)}))[1](seed)

        title = title.replace(f"ResNet-{values[0]} ", "ResNet ") if name == "depth" else title
    if not takes_seed and (arguments.seeds or 1) > 1:
        raise UsageError(
            f"{arguments.module} takes no `seed`, so that --seeds={arguments.seeds} would measure the same parameters "
            f"{arguments.seeds} times; give it a parameter named seed"
        )
    kwargs = _kwargs(arguments, spp.sweep)
    options = {option: getattr(arguments, option) for option in OF_SWEEPS if getattr(arguments, option) is not None}
    options |= {"seeds": arguments.seeds if takes_seed else 1, "where": where, "output": arguments.output}
    sweep = spp.sweep(make, *inputs, values={name: values}, **options, **kwargs)
    given = {} if arguments.tolerance is None else {"tolerance": arguments.tolerance}
    text = f"{title}\n\n{sweep!r}\n\n{sweep.diagnose(**given)}"
    return Answer(text, sweep, lambda: spp.plot_sweep(sweep, title=f"{title}: {sweep.setting}", **given))


def _own_sweep(arguments: argparse.Namespace) -> tuple[str, Callable[..., Any], tuple[Any, ...], bool]:
    """Title, `make(value, seed)`, inputs, and whether the seed reaches the model."""
    name, values = arguments.sweep

    try:
        parameters = inspect.signature(_names.imported("--module", arguments.module)).parameters.values()
    except ValueError as error:
        raise UsageError(str(error)) from error
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if name in ("seed", "rngs") or (name not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters)):
        numbers = names(one for one in known if one not in ("seed", "rngs")) or "none"
        raise UsageError(f"--sweep={name}:...: {arguments.module} has no such parameter to sweep; it has {numbers}")

    def at(value: float) -> networks.OwnModel:
        return networks.OwnModel(argparse.Namespace(**{**vars(arguments), "make": [*arguments.make, (name, value)]}))

    own = {value: at(value) for value in values}
    first = own[values[0]]
    shapes = {value: [np.shape(x) for x in jax.tree.leaves(model.inputs)] for value, model in own.items()}
    if other := [value for value in values if shapes[value] != shapes[values[0]]]:
        raise UsageError(
            f"{arguments.module} returns an input of shape {shapes[values[0]]} for {name}={values[0]} and "
            f"{shapes[other[0]]} for {name}={other[0]}: a sweep compares networks on one batch"
        )
    seeded = first.takes_seed or isinstance(first.model, linen.Module)
    return type(first.model).__name__, lambda value, seed: own[value].make(seed), first.inputs, seeded


def load_images(folder: pathlib.Path, count: int, size: int) -> np.ndarray:
    """Images from all over a folder, the middle square resized.

    Args:
        folder: Of images, at any depth.
        count: How many.
        size: Height and width in pixels.

    Returns:
        float32 [count, size, size, 3], with mean 0 and variance 1 in each colour.

    Raises:
        UsageError: There are not as many, or one of them cannot be read.
    """
    from nfjax.data.decoding import formats  # here: noise needs nothing of training
    from nfjax.data.decoding.crops import CentreCrop

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
