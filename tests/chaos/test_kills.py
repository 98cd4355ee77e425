"""Runs that are killed at random moments end as those that were not.

    pytest tests/chaos --kills=20 --results=results

Each run is `python -m nfjax.main` as a user starts it: with its data in memory and streamed from the disk, in one
process and in two. Linux only: leftover processes are found in /proc.
"""

import dataclasses
import importlib.metadata
import json
import os
import random

import pytest
from chaos import table
from chaos.comparing import differences, distance
from chaos.killing import aims, examine
from chaos.observing import make_images, settings, uninterrupted

from nfjax import distributed

EPOCHS = {"memory": 32, "streamed": 20, "memory2": 10, "streamed2": 10}


@pytest.mark.parametrize("name", EPOCHS)
def test_killed_runs_end_as_if_they_had_not_been(name, tmp_path, rng, environment, request, capsys):
    make_images(tmp_path / "images")
    setting = settings(tmp_path / "images", {name: EPOCHS[name]})[name]
    # Fills the compile cache, so that starts are quick; and shows whether equal runs are equal at all.
    first = uninterrupted(setting, tmp_path / "first", environment).workdir
    kills = request.config.getoption("kills")

    def tell(text):
        with capsys.disabled():
            print(f"\n{text}", end="", flush=True)

    record = examine(setting, tmp_path, aims(kills, rng), rng, environment, tell)
    record["control_differences"] = differences(first, tmp_path / "whole")
    if setting.processes > 1:
        compare_with_one_process(setting, tmp_path, environment, record)
    record |= {"seed": request.config.getoption("seed"), "cores": os.cpu_count()}
    record["versions"] = {x: importlib.metadata.version(x) for x in ("jax", "flax", "orbax-checkpoint")}
    if (out := request.config.getoption("results")) is not None:
        keep(out, record)
    assert record["differences"] == record["control_differences"] == []
    assert (len(record["kills"]), record["fell_back"]) == (kills, 0)
    assert (record["leftover_processes"], record["leftover_files"]) == (0, [])


def test_when_one_of_two_processes_is_killed_the_other_ends_by_itself(tmp_path, environment):
    """And both go on."""
    make_images(tmp_path / "images", 64, 16)
    setting = settings(tmp_path / "images", {"memory2": 1})["memory2"]
    record = examine(setting, tmp_path, ["saving"], random.Random(4), environment)
    assert record["differences"] == []
    assert record["starts"] == 1 + record["runs"]
    assert (record["fell_back"], record["leftover_processes"], record["leftover_files"]) == (0, 0, [])
    (kill,) = record["kills"]
    assert kill["aim"] == "saving"
    assert len(kill["killed"]) == 1
    assert kill["other_code"] == 75
    assert kill["other_seconds"] < distributed.HEARTBEAT / 2  # before JAX itself notices


def compare_with_one_process(setting, folder, environment, record):
    """Adds how far the run in several processes is from one in one, with one device and with as many."""
    alone = dataclasses.replace(setting, processes=1)
    one = uninterrupted(alone, folder / "one process", environment).workdir
    record["distance_to_one_process"] = distance(folder / "whole", one)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={setting.processes}"
    many = uninterrupted(alone, folder / "many devices", environment | {"XLA_FLAGS": flags}).workdir
    record["differences_to_one_process_with_as_many_devices"] = differences(folder / "whole", many)
    assert record["differences_to_one_process_with_as_many_devices"] == []


def keep(out, record):
    """Adds the record to the table; other settings keep theirs."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "kills.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    known = {old["setting"]: old for old in map(json.loads, lines)} | {record["setting"]: record}
    path.write_text("".join(json.dumps(one) + "\n" for one in known.values()))
    path.with_suffix(".md").write_text(table.table([*known.values()]))
