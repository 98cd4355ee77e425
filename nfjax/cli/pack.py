"""nfjax data pack --source=folder --dir=IMAGES --out=RECORDS [--short-side=256 --quality=90]

Packs a data set into shards for fast reading: --config.data.source=records --config.data.dir=RECORDS trains from it.
"""

from __future__ import annotations

import argparse
import signal

from nfjax import data
from nfjax.cli._parser import Parser, path
from nfjax.data.packing import pack
from nfjax.data.splits import left_aside

SIZE = 32  # pixels of the images that digits and synthetic make up; what is packed otherwise keeps its own


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--source", required=True, metavar="NAME", help="folder, tfds:NAME, cifar10, cifar100, …")
    parser.add_argument("--dir", default="", type=path, metavar="DIR", help="where the source keeps its files")
    parser.add_argument(
        "--out",
        required=True,
        type=path,
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


def run(arguments: argparse.Namespace) -> None:
    # Not at once, as the other commands: it tidies up, and says that it goes on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dataset = data.loader(arguments.source)(arguments.dir, SIZE)
    try:
        manifest = pack.pack(
            dataset,
            arguments.out,
            source=arguments.source,
            short_side=arguments.short_side,
            quality=arguments.quality,
            per_shard=arguments.per_shard,
            max_skipped=arguments.max_skipped,
            threads=arguments.threads,
            verify_after=arguments.verify,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    for split, shards in manifest.shards.items():
        images, size = sum(shard.count for shard in shards), sum(shard.bytes for shard in shards)
        left_out = f", {len(manifest.skipped[split])} left out" if manifest.skipped[split] else ""
        print(f"{split:<6} {images:,} images in {len(shards)} shards, {size / 1e6:,.1f} MB{left_out}")
    if dataset.left_aside:
        print(f"of {arguments.dir}, {left_aside(dataset.left_aside)}")
    print(f"train from them with --config.data.source=records --config.data.dir={arguments.out}")
