"""A run that is killed at any moment goes on as if nothing had happened: the short version of benchmarks/kills.py."""

import json
import pathlib
import random
import shutil
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import comparing
import kills
import observing

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


def examine(folder, name, epochs, aims):
    """Kills are aimed at what is under way, not at times: a loaded machine changes nothing."""
    observing.make_images(folder / "images", 64, 16)
    setting = observing.settings(folder / "images", {name: epochs})[name]
    record = kills.examine(setting, folder, aims, random.Random(0), {})
    assert record["differences"] == []
    assert [kill["aim"] for kill in record["kills"]] == aims
    assert record["starts"] == len(aims) + record["runs"]
    assert (record["fell_back"], record["leftover_processes"], record["leftover_files"]) == (0, 0, [])
    assert record["repeated_steps"] >= 0
    return record


def test_in_memory(tmp_path):
    record = examine(tmp_path, "memory", 3, ["saving", "start-up", "evaluation"])
    assert record["steps"] == 135

    # What is compared would tell a difference.
    whole, other = tmp_path / "whole", tmp_path / "other"
    shutil.copytree(whole, other)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["test_loss"] *= 1 + 1e-15
    (other / "metrics.jsonl").write_text("\n".join([*lines[:-1], lines[0], json.dumps(last)]) + "\n")
    newest = other / "checkpoints" / "135"
    shutil.rmtree(newest)
    shutil.copytree(whole / "checkpoints" / "120", newest)
    twice, metrics, checkpoint = comparing.differences(other, whole)
    assert twice == "steps logged twice: ('train', 5)"
    assert metrics.startswith("metrics.jsonl: 31 and 30 records")
    assert checkpoint.startswith("checkpoint 135: ")
    assert "['state']" in checkpoint


def test_streamed(tmp_path):
    examine(tmp_path, "streamed", 3, ["evaluation", "saving"])


def test_in_two_processes(tmp_path):
    """One of them is killed, then both: the other ends by itself."""
    record = examine(tmp_path, "memory2", 2, ["saving", "evaluation"])
    alone = [kill for kill in record["kills"] if len(kill["killed"]) == 1]
    assert alone
    assert all(kill["other_code"] is not None for kill in alone)
