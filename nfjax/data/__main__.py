"""python -m nfjax.data pack --source=folder --dir=IMAGES --out=RECORDS [--short-side=256 --quality=90]

Packs a data set into shards for fast reading: `--config.data.source=records --config.data.dir=RECORDS` trains from it.

    python -m nfjax.data show --config=configs/cifar10_convshort.py --config.data.dir=DIR --out=samples.png

Draws a batch of a config before and after augmentation.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from nfjax import preemption

if __name__ == "__main__":
    preemption.begin(signal.SIGTERM)  # Ctrl-C is told apart below: a pack tidies up, and says that it goes on

from nfjax import data
from nfjax.data.packing import pack
from nfjax.data.splits import left_aside


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nfjax.data", description="Work on data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, _, text) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text))
    args, rest = parser.parse_known_args(argv)
    args.settings = [setting for setting in rest if args.command == "show" and setting.startswith("--config.")]
    if unknown := [setting for setting in rest if setting not in args.settings]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        COMMANDS[args.command][1](args)
    except (OSError, ValueError, ImportError) as error:
        print(f"nfjax.data {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if args.command == "pack" else ""
        print(f"\nnfjax.data {args.command}: interrupted{goes_on}", file=sys.stderr)
        return preemption.INTERRUPTED
    return 0


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="NAME", help="folder, tfds:NAME, cifar10, cifar100, …")
    parser.add_argument(
        "--dir", default="", type=os.path.expanduser, metavar="DIR", help="where the source keeps its files"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help="an empty directory, or gs://bucket/directory",
    )
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="reduce larger images (as they are)")
    parser.add_argument("--quality", type=int, default=90, metavar="1-100", help="of the JPEGs of reduced images (90)")
    parser.add_argument("--per-shard", type=int, default=pack.PER_SHARD, metavar="N", help=f"images ({pack.PER_SHARD})")
    parser.add_argument(
        "--max-skipped", type=float, default=pack.MAX_SKIPPED, metavar="SHARE",
        help=f"of the images of a split that may be damaged ({pack.MAX_SKIPPED})",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="(one for every core)")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="read all of it again at the end, and compare (yes)",
    )  # fmt: skip


def _pack(args: argparse.Namespace) -> None:
    # The size is of the images that digits and synthetic make up; what is packed otherwise keeps its own.
    dataset = data.loader(args.source)(args.dir, 32)
    manifest = pack.pack(
        dataset,
        args.out,
        source=args.source,
        short_side=args.short_side,
        quality=args.quality,
        per_shard=args.per_shard,
        max_skipped=args.max_skipped,
        threads=args.threads,
        verify_after=args.verify,
    )
    for split, shards in manifest.shards.items():
        images, size = sum(shard.count for shard in shards), sum(shard.bytes for shard in shards)
        left_out = f", {len(manifest.skipped[split])} left out" if manifest.skipped[split] else ""
        print(f"{split:<6} {images:,} images in {len(shards)} shards, {size / 1e6:,.1f} MB{left_out}")
    if dataset.left_aside:
        print(f"of {args.dir}, {left_aside(dataset.left_aside)}")
    print(f"train from them with --config.data.source=records --config.data.dir={args.out}")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="of configs/; --config.FIELD=VALUE changes it, and nfjax/config.py lists the fields",
    )
    parser.add_argument(
        "--out", default="samples.png", type=os.path.expanduser, metavar="FILE", help="a PNG, SVG or PDF (samples.png)"
    )
    parser.add_argument("--count", type=int, default=16, metavar="N", help="images (16)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="the training step whose batch it is (0)")


def _show(args: argparse.Namespace) -> None:
    from absl import flags

    from nfjax.cli import settings, show
    from nfjax.training import checks

    values, argv = flags.FlagValues(), ["show", f"--config={args.config}", *args.settings]
    settings.define(values, argv)
    settings.parse(values, argv)
    if args.count < 1 or args.step < 0:
        raise ValueError(f"--count={args.count} --step={args.step}: expected at least one image, of step 0 or later")
    checks.check(values.config)
    show.contact_sheet(values.config, args.count, args.step).savefig(args.out, dpi=130)
    print(args.out)


# name: (adds the arguments, does the work, one line of help)
Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str]
COMMANDS: dict[str, Command] = {
    "pack": (_pack_arguments, _pack, "pack a data set into shards for fast reading"),
    "show": (_show_arguments, _show, "draw a batch of a config before and after augmentation"),
}


if __name__ == "__main__":
    sys.exit(main())
