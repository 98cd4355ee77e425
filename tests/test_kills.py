"""A run that is killed at any moment goes on as if nothing had happened: the short version of tests/chaos."""

import dataclasses
import json
import pathlib
import random
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from chaos import comparing, killing, observing, table

from nfjax.runs import checkpoint

RESULTS = pathlib.Path(__file__).parent.parent / "results"
pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/environ").exists(), reason="processes are looked for in /proc, which Linux has"
)


def examine(folder, name, epochs, aims, seed=0):
    """Kills are aimed at what is under way, not at times: a loaded machine changes nothing."""
    observing.make_images(folder / "images", 64, 16)
    setting = observing.settings(folder / "images", {name: epochs})[name]
    small = ("--config.model.stage_sizes=(1,)", "--config.model.block=basic")  # less to compile in every start
    setting = dataclasses.replace(setting, flags=(*setting.flags, *small))
    record = killing.examine(setting, folder, aims, random.Random(seed), {})
    assert record["differences"] == []
    assert [kill["aim"] for kill in record["kills"]] == aims
    assert record["starts"] == len(aims) + record["runs"]
    assert (record["fell_back"], record["leftover_processes"], record["leftover_files"]) == (0, 0, [])
    assert record["repeated_steps"] >= 0
    return record


def test_streamed_in_one_process(tmp_path):
    record = examine(tmp_path, "streamed", 2, ["evaluation", "saving"])
    assert record["steps"] == 4

    # What is compared would tell a difference.
    whole, other = tmp_path / "whole", tmp_path / "other"
    shutil.copytree(whole, other)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["test_loss"] *= 1 + 1e-15
    (other / "metrics.jsonl").write_text("\n".join([*lines[:-1], lines[0], json.dumps(last)]) + "\n")
    first, newest = sorted((other / "checkpoints").iterdir())[:2]
    shutil.rmtree(newest)
    checkpoints = checkpoint.Checkpoints(other, keep=9)
    tree = checkpoints.restore_untyped(int(first.name))
    checkpoints.save(int(newest.name), {**tree, "state": jax.tree.map(jnp.asarray, tree["state"])})
    checkpoints.wait()
    checkpoints.close()
    twice, metrics, arrays = comparing.differences(other, whole)
    assert twice.startswith("steps logged twice: ('train', ")
    assert metrics.startswith(f"metrics.jsonl: {len(lines) + 1} and {len(lines)} records")
    assert re.match(rf"checkpoint {newest.name}: \d+ of \d+ arrays, such as ", arrays)

    shutil.rmtree(newest)
    shutil.copytree(whole / "checkpoints" / first.name, newest)
    damaged = comparing.differences(other, whole)[-1]
    assert damaged.startswith(f"checkpoint {newest.name}: ")
    assert "not the one that was saved at step" in damaged


def test_the_committed_table_is_that_of_the_committed_records():
    records = [json.loads(line) for line in (RESULTS / "kills.jsonl").read_text().splitlines()]
    assert (RESULTS / "kills.md").read_text() == table.table(records)
