"""The stream of batches: the same whatever the workers do, and never a hang."""

import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from streamed import Split

from nfjax.data.loading import order, pool, stream

SHAPE = (2, 2, 3)


def batches(split, orders, transform=None, failures=None, **settings):
    from streamed import pixels

    note = (lambda *failure: None) if failures is None else (lambda *failure: failures.append(failure))
    return list(stream.stream(split, transform or pixels, SHAPE, iter(list(orders)), note, **settings))


def test_batches_are_those_of_the_order_whatever_the_workers():
    orders = list(order.train_orders(0, 50, 20, 0, 6))
    for workers, ahead in ((1, 1), (2, 2), (3, 4)):
        made = batches(Split(50), orders, workers=workers, ahead=ahead)
        assert len(made) == 6
        for batch, wanted in zip(made, orders, strict=True):
            np.testing.assert_array_equal(batch["label"], wanted.indices % 7)
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], wanted.indices)
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 1], wanted.positions % 256)
            np.testing.assert_array_equal(batch["mask"], 1)


def test_images_are_searched_for_damage_until_they_were_once_found_good():
    from streamed import noted

    failures = []
    made = batches(Split(20), order.train_orders(0, 20, 10, 0, 12), noted, failures, workers=2, ahead=1)
    seen = set()
    for number, batch in enumerate(made):
        for byte, checked, mask in zip(*batch["image"][:, 0, 0, :2].T, batch["mask"], strict=True):
            if byte not in seen or not mask:
                assert not checked
            elif number >= 6:  # in the epochs behind the first tasks were planned before the last answers came
                assert checked
            seen.add(byte)
    assert [failure[1:] for failure in failures] == [("damaged", "damaged")] * 6


def test_a_worker_that_ends_before_it_is_ready_blames_no_image(monkeypatch):
    monkeypatch.setattr(pool.Pool, "_start", lambda pool: None)
    workers = pool.Pool(1, None, b"", print)
    workers.pending.append(pool.Task(None, 0, 0, [(index, index, False) for index in range(4)]))
    for ready, deaths in ((False, 0), (True, 1)):
        task = workers.pending.popleft()
        workers._replaced(types.SimpleNamespace(stop=lambda patience: -9, ready=ready, tasks=[task]), "ended")
        assert task.deaths == deaths


def test_from_the_middle_it_goes_on_as_it_would_have():
    whole = batches(Split(50), order.train_orders(3, 50, 16, 0, 8), workers=2)
    rest = batches(Split(50), order.train_orders(3, 50, 16, 5, 8), workers=1)
    for ours, theirs in zip(rest, whole[5:], strict=True):
        for name in ("image", "label", "mask"):
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_hosts_share_a_batch_without_overlap_or_loss():
    orders = list(order.train_orders(1, 40, 12, 0, 5))
    whole = batches(Split(40), orders, workers=1)
    for processes in (2, 3, 4):
        parts = np.arange(12).reshape(processes, -1)
        shares = [batches(Split(40), (o.take(rows) for o in orders), workers=1) for rows in parts]
        for number, batch in enumerate(whole):
            joined = np.concatenate([share[number]["image"] for share in shares])
            np.testing.assert_array_equal(joined, batch["image"])


def test_evaluation_pads_its_last_batch():
    made = batches(Split(7), order.eval_orders(7, 4), workers=2)
    assert [batch["mask"].tolist() for batch in made] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert made[1]["image"][3].max() == 0
    assert batches(Split(0), order.eval_orders(0, 4), workers=2) == []


def test_what_cannot_be_read_is_black_masked_and_reported():
    failures = []
    split = Split(20, missing={3}, bad={4, 11})
    (batch,) = batches(split, order.eval_orders(20, 20), failures=failures, workers=2)
    assert np.flatnonzero(batch["mask"] == 0).tolist() == [3, 4, 11]
    assert batch["image"][[3, 4, 11]].max() == 0
    np.testing.assert_array_equal(
        np.delete(batch["image"][:, 0, 0, 0], [3, 4, 11]), np.delete(np.arange(20), [3, 4, 11])
    )
    assert sorted((index, cause) for index, cause, _ in failures) == [
        (3, "missing"),
        (4, "bad record"),
        (11, "bad record"),
    ]


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost():
    orders = list(order.eval_orders(200, 50))
    expected = batches(Split(200), orders, workers=2)
    failures = []
    made = batches(Split(200, deadly_once={60}), orders, failures=failures, workers=2)
    assert failures == []
    for ours, theirs in zip(made, expected, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["mask"], 1)


def test_an_image_that_ends_every_decoder_is_skipped():
    failures = []
    (batch,) = batches(Split(40, deadly={17}), order.eval_orders(40, 40), failures=failures, workers=2)
    assert np.flatnonzero(batch["mask"] == 0).tolist() == [17]
    ((index, cause, detail),) = failures
    assert (index, cause) == (17, "ends its decoder")
    assert "twice; exit status" in detail


def test_a_worker_that_hangs_is_replaced(monkeypatch):
    monkeypatch.setattr(pool, "HUNG_AFTER", 1.5)
    failures = []
    (batch,) = batches(Split(4, hangs={2}), order.eval_orders(4, 4), failures=failures, workers=1)
    assert batch["mask"].tolist() == [1, 1, 0, 1]
    assert "gave no answer" in failures[0][2]


def test_workers_that_cannot_start_are_an_error(monkeypatch):
    monkeypatch.setattr(pool.sys, "executable", "/bin/false")
    with pytest.raises(pool.WorkersFailedError, match=r"ended before they decoded anything.*data\.workers=1"):
        batches(Split(4), order.eval_orders(4, 4), workers=2)


def test_closing_ends_the_workers():
    running = stream.stream(Split(50), *_plain(), iter(list(order.train_orders(0, 50, 10, 0, 100))), print, workers=2)
    next(running)
    children = _children(os.getpid())
    assert len(children) >= 2
    running.close()
    deadline = time.monotonic() + 10
    while set(_children(os.getpid())) & set(children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(_children(os.getpid())) & set(children)


def test_killing_the_trainer_leaves_no_orphans(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from streamed import Split, pixels\n"
        "from nfjax.data.loading import order, stream\n"
        "s = stream.stream(Split(50), pixels, (2, 2, 3), order.train_orders(0, 50, 10, 0, 10**6), print, workers=2)\n"
        "next(s); print('ready', flush=True)\n"
        "for _ in s: pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    children = _children(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(child) for child in children)


def test_workers_import_the_package_that_this_process_has(tmp_path):
    """And not another one of its name that lies in the current folder."""
    (tmp_path / "nfjax").mkdir()
    (tmp_path / "nfjax" / "__init__.py").write_text("raise ImportError('another nfjax')")
    code = (
        "import streamed\n"
        "from nfjax.data.loading import order, stream\n"
        "batches = stream.stream(streamed.Split(4), streamed.pixels, (2, 2, 3), order.eval_orders(4, 4), print, 1)\n"
        "print([int(batch['mask'].sum()) for batch in batches])\n"
    )
    tests = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, os.path.dirname(tests), *filter(None, sys.path)])}
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True)
    assert run.stdout == b"[4]\n", run.stderr


def test_memory_does_not_grow():
    import resource

    split, peaks = Split(64), []
    big = (64, 64, 3)
    from streamed import large

    running = stream.stream(split, large, big, order.train_orders(0, 64, 32, 0, 400), print, workers=1)
    for number, _ in enumerate(running):
        if number % 100 == 99:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[0] < 4 * 1024  # KiB


def test_workers_import_neither_jax_nor_the_trainer():
    code = (
        "import sys, nfjax.data.loading.worker\n"
        "print(sorted({'jax', 'flax', 'tensorflow', 'nfjax.training.loop'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("workers", "batch"), [(1, 100), (2, 100), (8, 256), (200, 100), (200, 1024), (200, 3)])
def test_every_worker_has_a_task_ready_behind_the_one_it_is_at(workers, batch, monkeypatch):
    monkeypatch.setattr(pool.Pool, "assign", lambda pool: None)
    monkeypatch.setattr(pool.Pool, "_start", lambda pool: None)
    monkeypatch.setattr(pool.Pool, "close", lambda pool: None)
    orders = order.train_orders(0, 10_000, batch, 0, 2000)
    ahead = stream.default_ahead(workers, batch)
    pump = stream._Pump(Split(10_000), b"", orders, batch, SHAPE, print, workers, ahead)
    pump._plan()
    assert len(pump.pool.pending) >= 2 * workers
    assert max(len(task.examples) for task in pump.pool.pending) <= stream.CHUNK
    assert len(pump.batches) == max(3, -(-8 * workers // batch))  # 200 workers: 1 600 images of 150 kB
    pump.close()


def test_at_least_one_worker():
    with pytest.raises(ValueError, match="workers=0, ahead=None: expected at least 1"):
        batches(Split(4), order.eval_orders(4, 4), workers=0)


def _plain():
    from streamed import pixels

    return pixels, SHAPE


def _children(pid):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and _parent(int(entry)) == pid:
            found.append(int(entry))
    return found


def _parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_reader_of_the_script_itself_is_refused():
    def read(index):
        return bytes([index]), 0

    read.__module__ = "__main__"
    split = Split(4)
    split.reader = read
    with pytest.raises(ValueError, match="worker processes cannot import it from there; move it to a module"):
        batches(split, order.eval_orders(4, 4))
