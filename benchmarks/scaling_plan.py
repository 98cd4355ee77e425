"""ImageNet on many chips: arithmetic on rates, bytes and bandwidths."""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

IMAGES, EPOCHS = 1_281_167, 90  # of ImageNet
CHIPS = (1, 8, 64, 512)
Records = list[dict[str, Any]]


def ring_bytes(parameters: int, devices: int) -> float:
    """What each device has to send at least for all to have the sum of their float32 gradients."""
    return 4 * parameters * 2 * (devices - 1) / devices


def plan(
    chips: int,
    images_per_second_per_chip: float,
    parameters: int,
    link_bytes_per_second: float,
    host_images_per_second_per_core: float,
    batch_per_chip: int,
) -> dict[str, float]:
    """ImageNet on `chips`: seconds of computing and of a ring all-reduce in a step; then for sending "behind" computing
    and for sending "beside" it, seconds per step, images/s, hours of 90 epochs, and host cores in all.
    """
    computing = batch_per_chip / images_per_second_per_chip
    sending = ring_bytes(parameters, chips) / link_bytes_per_second
    found = {"computing": computing, "sending": sending}
    for way, step in (("behind", computing + sending), ("beside", max(computing, sending))):
        rate = chips * batch_per_chip / step
        found |= {
            f"step_{way}": step,
            f"images_per_second_{way}": rate,
            f"hours_{way}": EPOCHS * IMAGES / rate / 3600,
            f"host_cores_{way}": rate / host_images_per_second_per_core,
        }
    return found


def plan_records(arguments: argparse.Namespace, known: Records) -> Iterator[dict[str, Any]]:
    parameters = arguments.parameters
    if parameters is None:
        counted = {(r["network"], r["data"]): r["parameters"] for r in known if r["kind"] == "network"}
        if ("ResNet-50 ConvShort", "ImageNet") not in counted:
            raise SystemExit("--parameters is missing, and no record tells them: measure the part bytes first")
        parameters = counted["ResNet-50 ConvShort", "ImageNet"]
    for chips, (source, rate) in itertools.product(CHIPS, host_rates(arguments).items()):
        link = arguments.link_within if chips <= arguments.chips_within else arguments.link_between
        inputs = {
            "images_per_second_per_chip": arguments.images_per_second_per_chip,
            "parameters": parameters,
            "link_bytes_per_second": link,
            "host_images_per_second_per_core": rate,
            "batch_per_chip": arguments.batch_per_chip,
        }
        found = plan(chips, **inputs)
        yield {"kind": "plan", "chips": chips, "input": source, **inputs, **found, "source": arguments.source}


def host_rates(arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second and core, by where they come from."""
    if arguments.host_images_per_second_per_core is not None:
        return {"as given": arguments.host_images_per_second_per_core}
    measured = json.loads(pathlib.Path(arguments.input_pipeline).read_text().splitlines()[-1])
    names = {"original files": "nfjax, 2 workers", "packed records": "nfjax, packed records of 256 pixels"}
    return {name: measured["images_per_second"][key] / measured["cores"] for name, key in names.items()}
