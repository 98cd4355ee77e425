"""What a result comes from, for a person: how its settings differ from the paper's, on what it was measured, with which
versions; and the name of its files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nfjax.reproduce import _runs
from nfjax.reproduce._records import Record


def describe(dataset: str, settings: Mapping[str, Any]) -> str:
    """How settings differ from the paper's."""
    differing = _runs.deviations(dataset, settings)
    if not differing:
        return "the settings of the paper, and where it states none those of the configs"
    return "not as in the configs: " + ", ".join(f"{name} {_shown(value)}" for name, value in differing.items())


def stem(path: pathlib.Path, dataset: str, settings: Mapping[str, Any], data: str | None) -> pathlib.Path:
    """PATH_<data and settings>: results with other settings, or on other images, are files of other names."""
    differing = _runs.deviations(dataset, settings)
    parts = [f"{name.rpartition('.')[2]}{value}" for name, value in differing.items()]
    return path.with_name("_".join([path.name, *map(_runs.slug, [*([data] if data else []), *parts])]))


def devices(group: Sequence[Record]) -> str:
    """ "1 x cpu or 1 x H100", of all starts."""
    starts = [start["device"] for record in group for start in record.starts]
    return " or ".join(sorted({f"{device['count']} x {device['kind']}" for device in starts}))


def versions(group: Sequence[Record]) -> str:
    """The versions and commits of all starts."""
    starts = [start for record in group for start in record.starts]
    packages = {name for start in starts for name in start["packages"]} & {"nfjax", "jax", "flax", "optax"}
    used = {name: sorted({start["packages"][name] for start in starts}) for name in sorted(packages)}
    named = [f"{name} {' or '.join(found)}" for name, found in used.items()]
    commits = sorted({_short(start["commit"]) for start in starts if start["commit"]})
    return ", ".join(named) + (f", commit {' and '.join(commits)}" if commits else "")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _short(commit: str) -> str:
    number, dash, dirty = commit.partition("-")
    return number[:12] + dash + dirty
