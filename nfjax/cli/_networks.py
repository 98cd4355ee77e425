"""Which network a command is about: one of the paper's, or a model of the user's own."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen, nnx

from nfjax import _names, initializers, residual, resnet, spp
from nfjax.cli._outcome import UsageError
from nfjax.cli._parser import Parser, names, optional, positive

PAPER = ("depth", "residual", "norm", "init", "stem", "width", "image_size")


def add_paper_arguments(parser: Parser) -> argparse._ArgumentGroup:
    """The arguments that `paper_network` reads."""
    group = parser.add_argument_group("one of the paper's networks")
    group.add_argument("--depth", type=int, choices=resnet.STAGES, metavar="N", help=names(resnet.STAGES))
    group.add_argument("--residual", choices=residual.RESIDUALS, metavar="NAME", help=names(residual.RESIDUALS))
    norms = [None, *resnet.NORMS]
    group.add_argument("--norm", type=optional(str), choices=norms, metavar="NAME", help=f"none, {names(resnet.NORMS)}")
    known = initializers.INITIALIZERS | initializers.OF_JAX
    group.add_argument("--init", choices=known, metavar="NAME", help=names(known))
    group.add_argument("--stem", choices=resnet.STEMS, metavar="NAME", help=names(resnet.STEMS))
    group.add_argument("--width", type=positive, metavar="N", help="channels of the first stage (64)")
    group.add_argument("--image-size", type=positive, metavar="N", help="pixels (32, or 224 with --stem=imagenet)")
    return group


def add_own_arguments(parser: Parser) -> argparse._ArgumentGroup:
    """The arguments that `OwnModel` reads."""
    group = parser.add_argument_group("a model of your own")
    group.add_argument(
        "--module", metavar="PACKAGE.MODULE:FUNCTION",
        help="a function that returns an nnx.Module, a Linen module, or (model, input); it may take `seed` or `rngs`",
    )  # fmt: skip
    group.add_argument(
        "--make", action="append", default=[], type=_argument, metavar="NAME=VALUE",
        help="an argument of that function, VALUE as Python writes it: width=64, name='\"small\"'; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--arg", action="append", default=[], type=_argument, metavar="NAME=VALUE",
        help="a keyword argument of the model's call, likewise: train=False; may be repeated",
    )  # fmt: skip
    group.add_argument("--input-shape", metavar="1,32,32,3", help="where the function gives no input")
    return group


def check(arguments: argparse.Namespace, paper: tuple[str, ...] = PAPER, own: tuple[str, ...] = ()) -> None:
    """Refuses what does not go together.

    Args:
        arguments: As parsed.
        paper: The arguments that describe one of the paper's networks.
        own: Those of the command itself that go with a model of the user's own.

    Raises:
        UsageError: Nothing is chosen, or things that do not go together.
    """
    if arguments.module:
        refuse(arguments, paper, "--module")
    if not arguments.module and arguments.depth is None:
        raise UsageError(
            "--depth is missing, such as --depth=50; or --module=PACKAGE.MODULE:FUNCTION for a model of your own"
        )
    needing = ("make", "arg", "input_shape", *own)
    if not arguments.module and any(getattr(arguments, name) for name in needing):
        *first, last = map(_flag, needing)
        raise UsageError(f"{', '.join(first)} and {last} go with --module")
    for option in ("make", "arg"):
        given = [name for name, _ in getattr(arguments, option)]
        if twice := [name for name in given if given.count(name) > 1]:
            raise UsageError(f"--{option}={twice[0]}=... is given more than once")


def refuse(arguments: argparse.Namespace, paper: tuple[str, ...], other: str) -> None:
    """UsageError where one of the paper's networks is described besides what `other` chooses."""
    if given := [name for name in paper if getattr(arguments, name) is not None]:
        raise UsageError(f"{_flag(given[0])} describes one of the paper's networks; it does not go with {other}")


def paper_network(
    arguments: argparse.Namespace, num_classes: int = 10
) -> tuple[str, Callable[[int], resnet.PreActResNet], int]:
    """A network of `nfjax.resnet`.

    Args:
        arguments: As parsed.
        num_classes: Of the logits.

    Returns:
        What it is called, the function that makes it from a seed, and the height and width of its images in pixels.
    """
    rule, init, norm = arguments.residual or "idshort", arguments.init or "he_fan_out", arguments.norm
    stem, width = arguments.stem or "cifar", arguments.width or 64
    size = arguments.image_size or resnet.STEMS[stem].image_size

    def make(seed: int) -> resnet.PreActResNet:
        return resnet.PreActResNet(
            arguments.depth, rule, norm, init, num_classes=num_classes, stem=stem, width=width, image_size=size,
            rngs=nnx.Rngs(seed),
        )  # fmt: skip

    return f"ResNet-{arguments.depth} {rule}{' with batch norm' if norm else ''}, {init}", make, size


class OwnModel:
    """What the user's function returns.

    Attributes:
        takes_seed: Whether every seed gives another model.
        model: That of the seed 0.
        inputs: What it is called with; noise of --input-shape where the function gives none.
    """

    def __init__(self, arguments: argparse.Namespace):
        """Calls the function.

        Args:
            arguments: As parsed.

        Raises:
            UsageError: There is no such function, or it cannot be called like that.
        """
        self._name = arguments.module
        try:
            self._make = _names.imported("--module", arguments.module)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self._arguments = dict(arguments.make)
        if "seed" in self._arguments:
            raise UsageError("--make=seed=...: seeds are counted from 0, --seeds says how many")
        self.takes_seed = bool({"seed", "rngs"} & set(inspect.signature(self._make).parameters))
        made = self._call(0)
        self.model, x = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(self.model, nnx.Module | linen.Module):
            raise UsageError(
                f"{self._name} returned {type(self.model).__name__}: expected an nnx.Module, a Linen module, or "
                "(model, input)"
            )
        if x is None:
            if not arguments.input_shape:
                raise UsageError(
                    f"{self._name} returns no input: return (model, input), or pass --input-shape=1,32,32,3"
                )
            x = spp.noise(_shape(arguments.input_shape))
        self.inputs = x if isinstance(x, tuple) else (x,)

    def make(self, seed: int) -> Any:
        """The model of a seed."""
        if seed == 0 or not self.takes_seed:
            return self.model
        made = self._call(seed)
        return made[0] if isinstance(made, tuple) else made

    def _call(self, seed: int) -> Any:
        parameters = inspect.signature(self._make).parameters
        seeded: Mapping[str, Any] = {"seed": seed, "rngs": nnx.Rngs(seed)}
        kwargs = self._arguments | {name: value for name, value in seeded.items() if name in parameters}
        named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if needed := [p.name for p in named if p.default is p.empty and p.name not in kwargs]:
            raise UsageError(
                f"--module={self._name}: the function needs {names(needed)}; give it with --make={needed[0]}=..., only "
                "`seed` comes by itself"
            )
        by_name = [p.name for p in named if p.kind is not p.POSITIONAL_ONLY]
        unknown = [key for key in kwargs if key not in by_name]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise UsageError(
                f"--make={unknown[0]}=...: the function {self._name} has no such parameter; it has "
                f"{names(by_name) or 'none'}"
            )
        return self._make(**kwargs)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _argument(text: str) -> tuple[str, Any]:
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


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise UsageError(f"--input-shape={text}: expected positive integers and commas, such as 1,32,32,3") from None
