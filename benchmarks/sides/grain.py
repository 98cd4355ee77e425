"""grain's worker processes around nfjax's own crop, so that the machinery is compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from benchmarks.sides import _crops
from nfjax.data.decoding import crops


def machine() -> dict[str, str]:
    return {"device": "cpu", "platform": "cpu", "version": f"grain {grain.__version__}"}


class Crop:
    def __init__(self) -> None:
        self.crop = crops.RandomResizedCrop(_crops.SIZE)

    def __call__(self, path: str) -> Any:
        with open(path, "rb") as file:
            return self.crop(file.read(), hash(path) % 2**31)


class Crops(_crops.Crops):
    def batches(self, paths: list[str], workers: int) -> Iterator[Any]:
        flags.FLAGS.mark_as_parsed()
        chosen = grain.MapDataset.source(paths).shuffle(seed=0).repeat().map(Crop()).batch(_crops.BATCH)
        yield from chosen.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


MEASURES = {"crops": Crops}
