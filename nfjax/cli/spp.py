"""nfjax spp --depth=101 --residual=idshort --init=brock --seeds=5 --out=plot.png
       nfjax spp --module=my_package.my_module:make_model --where=Encoder,Decoder --arg=train=False --out=plot.png

Signal propagation of one of the paper's networks, or of a model of your own: a table, a verdict, a picture.
"""

from __future__ import annotations

import argparse
import inspect
import pathlib

import numpy as np
from flax import errors as linen_errors
from flax import nnx

from nfjax import compilation, spp
from nfjax.cli import _networks as networks
from nfjax.cli._outcome import FailedError, UsageError
from nfjax.cli._parser import Parser, path, positive

PLOTS = (".png", ".svg", ".pdf")
# The model's own arguments of these names cannot be told from those of the measurement.
RESERVED = [
    p.name
    for p in inspect.signature(spp.propagate_seeds).parameters.values()
    if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
]


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
    parser.add_argument("--loss", choices=["cross_entropy"], help="start of the gradient (N(0, 1) at the last block)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="how many (1)")
    parser.add_argument("--tolerance", type=float, default=10.0, help="factor that counts as preserved (10)")
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
        title, profile, prediction = _own_model(arguments, where) if arguments.module else _paper_network(arguments)
        print(f"{title}\n\n{profile!r}\n\n{profile.diagnose(arguments.tolerance)}")
        for file in map(pathlib.Path, arguments.out):
            if file.suffix.lower() == ".csv":
                profile.to_csv(file)
            elif file.suffix.lower() == ".json":
                profile.to_json(file)
            elif file.suffix.lower() == ".html":
                spp.write_report(file, profile, prediction, title=title, tolerance=arguments.tolerance)
            else:
                figure = spp.plot(
                    {"measured": profile}, prediction, title=title, details=True, tolerance=arguments.tolerance
                )
                figure.savefig(file, dpi=150)
            print(f"\n{file}", end="")
        print()
    except (ValueError, TypeError, linen_errors.FlaxError) as error:  # of the model, too, which notes say
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()) if "nfjax" in note)
        raise FailedError(f"{error}{notes}") from error


def _check(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Refuses what does not go together; the classes of --where."""
    networks.check(arguments, paper=(*networks.PAPER, "input", "batch"), own=("where",))
    if not arguments.module and arguments.output is not None:
        raise UsageError("--output goes with --module")
    if not arguments.tolerance > 1:
        raise UsageError("--tolerance must be more than 1: it is a factor")
    for file in map(pathlib.Path, arguments.out):
        if file.suffix.lower() not in (*PLOTS, ".csv", ".json", ".html"):
            raise UsageError(
                f"--out={file}: unknown kind of file; expected {', '.join(PLOTS)}, .csv or .json, or .html for a report"
            )
    if arguments.where is None:
        return None
    where = tuple(name.strip() for given in arguments.where for name in given.split(","))
    if not all(where):
        raise UsageError("--where has an empty name: expected a class or several, such as --where=Encoder,Decoder")
    return where


def _paper_network(arguments: argparse.Namespace) -> tuple[str, spp.Profile, spp.Prediction | None]:
    """Title, profile and prediction."""
    title, make, size = networks.paper_network(arguments)
    batch = arguments.batch or 32
    shape = (batch, size, size, 3)
    noise = arguments.input in (None, "noise")
    x = spp.noise(shape) if noise else load_images(pathlib.Path(arguments.input), batch, size)
    profile = spp.propagate_seeds(make, x, seeds=arguments.seeds, branch=arguments.branch, loss=arguments.loss)
    return title, profile, spp.predict(make(0), shape)


def _own_model(arguments: argparse.Namespace, where: tuple[str, ...] | None) -> tuple[str, spp.Profile, None]:
    """Title and profile."""
    kwargs = dict(arguments.arg)
    if taken := [name for name in kwargs if name in RESERVED]:
        raise UsageError(
            f"--arg={taken[0]}=...: {taken[0]} is an argument of nfjax.spp.propagate_seeds and does not reach the "
            "model; let the function of --module return a model that sets it"
        )
    own = networks.OwnModel(arguments)
    if isinstance(own.model, nnx.Module) and arguments.seeds > 1 and not own.takes_seed:
        raise UsageError(
            f"{arguments.module} takes no `seed`, so that --seeds={arguments.seeds} would measure the same parameters "
            f"{arguments.seeds} times; give it a parameter named seed"
        )
    profile = spp.propagate_seeds(
        own.make, *own.inputs, seeds=arguments.seeds, where=where, branch=arguments.branch, loss=arguments.loss,
        output=arguments.output, **kwargs,
    )  # fmt: skip
    return type(own.model).__name__, profile, None


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
