"""A run whose newest checkpoint was damaged sets it aside, and ends as if nothing had happened."""

import itertools
import time

from chaos.comparing import differences, leftover_files
from chaos.observing import finished, settings, started, uninterrupted

from nfjax.runs import checkpoint


def damage(folder, rng):
    """One file of a checkpoint loses a bit, its end or all of itself; returns what was done."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    content, way = bytearray(path.read_bytes()), rng.choice(["bit", "end", "all"])
    position = rng.randrange(len(content))
    if way == "bit":
        content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content if way == "bit" else content[:position] if way == "end" else b"")
    return way, str(path.relative_to(folder)), position


def test_damaged_checkpoints_change_nothing(tmp_path, rng, environment, request):
    setting = settings(tmp_path / "images", {"memory": 12})["memory"]
    whole = uninterrupted(setting, tmp_path / "whole", environment)
    workdir, done = tmp_path / "damaged", []
    for _ in range(request.config.getoption("kills")):
        with started(setting, workdir, environment) as start:
            before, target = set(finished(workdir, whole.parts)), time.monotonic() + rng.uniform(0, whole.total / 4)
            while not start.ended():
                kept = finished(workdir, whole.parts)
                if len(set(kept) - before) >= 1 and len(kept) >= 2 and time.monotonic() > target:
                    start.kill([0])
                    break
                time.sleep(0.02)
            else:
                break  # complete
        newest = max(finished(workdir, whole.parts))
        done.append((newest, *damage(workdir / checkpoint.FOLDER / str(newest), rng)))
    with started(setting, workdir, environment) as start:
        while not start.ended():
            time.sleep(0.05)
    assert done
    assert differences(workdir, whole.workdir) == [], done
    assert set(leftover_files(workdir, whole.workdir)) <= {"damaged_checkpoints"}
    # A bit of what no array is made of, such as a description, may be lost without any harm.
    set_aside = {int(path.name.partition(".")[0]) for path in (workdir / "damaged_checkpoints").glob("*")}
    assert set_aside <= {step for step, *_ in done}
    assert set_aside or all(way == "bit" for way in itertools.chain(way for _, way, *_ in done)), done
