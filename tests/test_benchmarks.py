"""What the comparisons with PyTorch rest on: fair turns, honest tables; the libraries themselves are not needed."""

import argparse
import json
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import epoch
import speed
import speed_table
import startup
import turns

RESULTS = pathlib.Path(__file__).parent.parent / "results"


def worker(code):
    """A process that serves the functions that `code` makes."""
    folder = str(pathlib.Path(turns.__file__).parent)
    head = f"import os, subprocess, sys; sys.path.append({folder!r}); import turns\n"
    return turns.Worker([sys.executable, "-c", head + code])


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0)


def test_what_a_side_prints_is_no_answer():
    code = "def f(n): print('a'); os.write(1, b'b'); subprocess.run(['echo', 'c']); return n + 1\nturns.serve({'f': f})"
    with worker(code) as side:
        assert [side.ask("f", n=n) for n in (1, 2)] == [2, 3]


def test_a_side_that_fails_says_why_and_lives():
    with worker("turns.serve({'f': lambda n: 1 // n})") as side:
        with pytest.raises(turns.LostError, match="ZeroDivisionError"):
            side.ask("f", n=0)
        assert side.ask("f", n=1) == 1


def test_a_side_that_is_killed_is_lost_and_closed():
    side = worker("turns.serve({'f': lambda: os.kill(os.getpid(), 9)})")
    with pytest.raises(turns.LostError, match="ended with -9"):
        side.ask("f")
    with pytest.raises(turns.LostError, match="ended with -9"):
        side.ask("f")
    side.close()


def test_an_interpreter_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r"/nowhere/python cannot be started: No such file"):
        turns.Worker(["/nowhere/python"])


def test_only_sides_on_the_same_device_are_compared():
    turns.check_same_device({"nfjax": {"platform": "gpu"}, "eager": {"platform": "cuda"}})
    turns.check_same_device({"nfjax": {"platform": "cpu"}, "eager": {"platform": "cpu"}})
    with pytest.raises(SystemExit, match="nfjax sees no accelerator, while eager does"):
        turns.check_same_device({"nfjax": {"platform": "cpu"}, "eager": {"platform": "cuda"}})


def test_the_largest_batch_is_looked_for_from_the_batches_of_the_same_pixels():
    starts = {
        (case.image, case.batch) for case, doubling in speed.cases(speed.GRIDS["gpu"], ["IdShort"], 64) if doubling
    }
    assert starts == {(224, 128)}
    flags = dict.fromkeys(("depths", "dtypes", "sides", "turns", "steps")) | {"images": (32,), "batches": ["max"]}
    assert speed.chosen(speed.GRIDS["gpu"], argparse.Namespace(**flags)).shapes == ((32, "max"),)


class Stub(speed.Bench):
    """Sides that fit up to a batch, without processes."""

    def __init__(self, fits, sides, folder):
        grid = speed.Grid(((224, 64), (224, "max")), (50,), ("bfloat16",), sides, turns=1, steps=1, warm=1)
        super().__init__("python", grid, folder)
        self.fits, self.asked = fits, []

    def together(self, case, names):
        return self.alone(case, names)

    def alone(self, case, names):
        self.asked.append((case.batch, tuple(names)))

        def side(name):
            return {"seconds": [1.0]} if case.batch <= self.fits[name] else {"error": "RESOURCE_EXHAUSTED"}

        return {name: side(name) for name in names}


def run(bench, done):
    peaks = {"device": "GPU", "bfloat16": {"matmul": 1.0}, "versions": {"nfjax": "jax 1", "eager": "PyTorch 1"}}
    for record in bench.run(speed.cases(bench.grid, ["IdShort"], 64), peaks, done):
        done[speed_table.key(record)] = record


def test_each_side_goes_on_to_its_own_largest_batch(tmp_path):
    bench, done = Stub({"nfjax": 128, "eager": 256}, ("nfjax", "eager"), tmp_path), {}
    run(bench, done)
    both = ("nfjax", "eager")
    assert [ask for i, ask in enumerate(bench.asked) if ask not in bench.asked[:i]] == [
        (64, both), (128, both), (256, both), (512, ("eager",)),
    ]  # fmt: skip
    before = len(bench.asked)
    run(bench, done)
    assert len(bench.asked) == before  # all of it is there


def test_a_new_side_and_a_new_version_are_measured(tmp_path):
    done = {}
    run(Stub({"nfjax": 64}, ("nfjax",), tmp_path), done)
    more = Stub({"nfjax": 64, "eager": 64}, ("nfjax", "eager"), tmp_path)
    run(more, done)
    assert more.asked[0] == (64, ("nfjax", "eager"))
    for record in done.values():
        record["sides"]["nfjax"]["version"] = "jax 0"
    again = Stub({"nfjax": 64, "eager": 64}, ("nfjax", "eager"), tmp_path)
    run(again, done)
    assert again.asked[0] == (64, ("nfjax", "eager"))


@pytest.mark.parametrize("there", [True, False])
def test_timm_is_left_out_where_it_is_not_installed(tmp_path, there):
    class Known:
        def ask(self, do, **_):
            machine = {"device": "GPU", "platform": "gpu", "version": "1"}
            return {"machine": machine, "has_timm": there, "hardest": {"matmul": 2.0, "conv": 1.0}}[do]

        def close(self):
            pass

    bench = Stub({"nfjax": 64, "timm eager": 64}, ("nfjax", "timm eager"), tmp_path)
    bench._start = lambda name: Known()
    assert bench.peaks()["bfloat16"] == {"matmul": 2.0, "conv": 1.0}
    done = {}
    run(bench, done)
    assert {tuple(record["sides"]) for record in done.values()} == {("nfjax", "timm eager") if there else ("nfjax",)}


def test_losses_that_disagree_are_told():
    case = {"depth": 18, "network": "IdShort", "image": 32, "batch": 8, "dtype": "float32", "width": 64}
    ours, same, other = [2.30, 2.29, 2.28], [2.31, 2.29, 2.27], [2.30, 2.50, 2.20]
    record = {"case": case, "sides": {"nfjax": {"losses": ours}, "eager": {"losses": same}}}
    assert speed_table.agreement(record) == ""
    record["sides"]["eager"]["losses"] = other
    assert "PyTorch differs from nfjax" in speed_table.agreement(record)
    record["sides"]["eager"]["losses"] = [2.3, 2.3, float("nan")]
    assert "PyTorch does not fall" in speed_table.agreement(record)


@pytest.mark.parametrize(
    ("name", "table"), [("speed", speed_table.table), ("epoch", epoch.table), ("startup", startup.table)]
)
def test_the_committed_tables_are_those_of_the_committed_records(name, table):
    records = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    assert (RESULTS / f"{name}.md").read_text() == table(records)
