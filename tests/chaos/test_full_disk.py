"""A run whose disk is full says so and ends; with more room, the same command ends it as if nothing had happened.

The disk is a small tmpfs, which only root can mount and enlarge.
"""

import os
import subprocess
import time

import pytest
from chaos.comparing import differences, leftover_files
from chaos.observing import settings, started, uninterrupted

GROWTH = 1.3  # of the disk, after each start that it has ended
SAID = ("No space left on device", "the disk is full")


@pytest.fixture
def disk(tmp_path):
    """A workdir, and a function that gives it so many bytes. What is printed goes elsewhere."""
    folder = tmp_path / "run"
    folder.mkdir()

    def resize(size):
        way = "remount,size" if os.path.ismount(folder) else "size"
        command = ["mount", "-t", "tmpfs", "-o", f"{way}={size // 1024}k", "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        resize(2**20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a small disk")
    yield folder, resize
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["memory"])
def test_a_run_goes_on_when_there_is_room_again(name, tmp_path, disk, rng, environment):
    setting = settings(tmp_path / "images", {name: 8})[name]
    whole = uninterrupted(setting, tmp_path / "whole", environment)
    taken = sum(path.stat().st_blocks * 512 for path in whole.workdir.rglob("*"))
    workdir, resize = disk
    size, ends = int(taken * rng.uniform(0.02, 0.6)), 0
    while True:
        resize(size)
        with started(setting, workdir, environment) as start:
            while None in (codes := [process.poll() for process in start.processes]):
                time.sleep(0.05)
            said = start.outputs[0].read_text()
        if codes == [0]:
            break
        ends += 1
        assert codes[0] > 0, said[-3000:]  # not of a signal
        assert any(text in said for text in SAID), said[-3000:]
        size = int(size * GROWTH)
    assert ends > 0
    assert differences(workdir, whole.workdir) == []
    assert leftover_files(workdir, whole.workdir) == []
