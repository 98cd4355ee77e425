"""What the comparisons rest on: fair turns, honest tables; the libraries that are compared with are not needed."""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import re
import sys
import time
import types

import pytest

from benchmarks import runner, tables, turns
from benchmarks.cases import speed
from tests import photographs

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "results"


def worker(code):
    """A process that serves the functions that `code` makes."""
    head = "import os, subprocess; from benchmarks import turns\n"
    return turns.Worker([sys.executable, "-c", head + code])


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0)
    monkeypatch.setattr(runner, "SAMPLE", 0.01)


# ---------------------------------------------------------------- turns


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


def test_what_a_side_has_started_ends_with_it():
    with worker("turns.serve({'f': lambda: subprocess.Popen(['sleep', '60']).pid})") as side:
        child = side.ask("f")
        assert is_alive(child)
    end = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(child)


def test_an_interpreter_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match=r"/nowhere/python cannot be started: No such file"):
        turns.Worker(["/nowhere/python"])


def test_only_sides_on_the_same_device_are_compared():
    turns.check_same_device({"nfjax": {"platform": "gpu"}, "eager": {"platform": "cuda"}})
    turns.check_same_device({"nfjax": {"platform": "cpu"}, "eager": {"platform": "cpu"}})
    with pytest.raises(SystemExit, match="nfjax sees no accelerator, while eager does"):
        turns.check_same_device({"nfjax": {"platform": "cpu"}, "eager": {"platform": "cuda"}})


# ---------------------------------------------------------------- the runner


def fake_case(values, seconds=0):
    """A case whose records are these values; `case.began` are those that were measured."""
    case = types.SimpleNamespace(began=[], SIDES={"ours": runner.Side("ours", "nfjax")}, ROUNDS=1)

    def measure(bench):
        for value in values:
            case.began.append(value)
            now[0] += seconds
            yield {"value": value, "sides": {"ours": {"error": "too large"}}}

    now = [0.0]
    case.measure, case.key = measure, lambda record: [record["value"] % 10]
    case.table = lambda records: tables.markdown(["value"], [[str(record["value"])] for record in records])
    return case, types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None)


def run_case(case, out, minutes=None):
    runner.run("fake", case, argparse.Namespace(out=out, minutes=minutes), 0.0)


def test_records_are_written_as_they_come_and_replace_what_measured_the_same(tmp_path, capsys):
    case, _ = fake_case([1, 2])
    run_case(case, tmp_path)
    run_case(fake_case([12, 3])[0], tmp_path)
    records = runner.read(tmp_path / "fake.jsonl")
    assert [record["value"] for record in records] == [1, 12, 3]
    assert (tmp_path / "fake.md").read_text() == "| value |\n| --- |\n| 1 |\n| 12 |\n| 3 |"
    assert "measured 2; ours failed: too large" in capsys.readouterr().out
    for record in records:
        assert record["machine"].keys() >= {"processor", "cores", "python", "jax", "flax", "nfjax"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
        assert all(load is None or load >= 0 for load in record["load"])

    def broken(bench):
        yield {"value": 4}
        raise turns.LostError("gone")

    case.measure = broken
    with pytest.raises(turns.LostError):
        run_case(case, tmp_path)
    assert [record["value"] for record in runner.read(tmp_path / "fake.jsonl")] == [1, 12, 3, 4]


def test_nothing_is_started_that_would_not_end_in_time(tmp_path, monkeypatch, capsys):
    case, clock = fake_case([1, 2, 3, 4], seconds=100)
    monkeypatch.setattr(runner, "time", clock)
    run_case(case, tmp_path, minutes=6)  # the fourth would end after 400 of 360 seconds
    assert case.began == [1, 2, 3]
    assert "the time is over" in capsys.readouterr().out


def test_what_does_not_end_in_time_is_given_up(tmp_path, capsys):
    case, sides = fake_case([])[0], []

    def measure(bench):
        yield {"value": 1}
        code = "import time; from benchmarks import turns; turns.serve({'f': lambda s: time.sleep(s)})"
        with turns.Worker([sys.executable, "-c", code], deadline=bench.deadline) as side:
            sides.append(side)
            yield {"value": side.ask("f", s=60)}

    case.measure = measure
    start = time.monotonic()
    runner.run("fake", case, argparse.Namespace(out=tmp_path, minutes=1 / 60), start)
    assert 0.9 < time.monotonic() - start < 10
    assert not is_alive(sides[0]._process.pid)
    assert [record["value"] for record in runner.read(tmp_path / "fake.jsonl")] == [1]
    assert "is given up" in capsys.readouterr().out


def test_what_is_there_from_this_machine_and_these_versions_is_not_missing():
    record = {"machine": runner.machine(), "sides": {"ours": {}, "theirs": {}}}

    def has(key=1, missing=True, sides=("ours",), **machine):
        done = {"[1]": record | {"machine": record["machine"] | machine}}
        return runner.Bench(argparse.Namespace(missing=missing, sides=sides), done).has([key])

    assert has()
    assert not has(key=2)
    assert not has(missing=False)
    assert not has(sides=("ours", "another"))
    assert not has(jax="0")


def test_many_cases_in_one_command():
    words = ["--torch-python=P", "speed", "--depths=18", "startup", "tables"]
    assert runner.split(words) == (["--torch-python=P"], [("speed", ["--depths=18"]), ("startup", []), ("tables", [])])
    with pytest.raises(SystemExit, match="which case"):
        runner.main([])


def test_sides_that_are_not_known_or_lack_their_interpreter_are_told(capsys):
    def message(*words):
        with pytest.raises(SystemExit):
            runner.parse("speed", speed, words)
        return capsys.readouterr().err

    assert "--sides=tf: expected some of nfjax, eager" in message("--sides=tf")
    assert "PyTorch needs --torch-python; without it: --sides=nfjax" in message()
    assert "--depths: 17: expected some of" in message("--depths=18,17")
    arguments = runner.parse("speed", speed, ["--sides=nfjax", "--rounds=3"])
    assert (arguments.sides, arguments.rounds) == (["nfjax"], 3)


# ---------------------------------------------------------------- speed


def test_the_largest_batch_is_looked_for_from_the_batches_of_the_same_pixels():
    starts = {
        (case.image, case.batch) for case, doubling in speed.cases(speed.GRIDS["gpu"], ["IdShort"], 64) if doubling
    }
    assert starts == {(224, 256), (32, 1024)}
    flags = dict.fromkeys(("depths", "dtypes", "rounds", "steps")) | {"images": (32,), "batches": ["max"]}
    arguments = argparse.Namespace(**flags, sides=list(speed.SIDES))
    chosen = speed.chosen(speed.GRIDS["gpu"], arguments)
    assert chosen.shapes == ((32, "max"),)
    assert chosen.sides == speed.GRIDS["gpu"].sides
    assert speed.chosen(speed.GRIDS["cpu"], arguments).sides == ("nfjax", "eager", "compile")


class Stub(speed.Comparison):
    """Sides that fit up to a batch, without processes."""

    def __init__(self, fits, sides, folder, done):
        super().__init__(runner.Bench(argparse.Namespace(), done), folder)
        self.grid = speed.Grid(((224, 64), (224, "max")), (50,), ("bfloat16",), sides, turns=1, steps=1, warm=1)
        self.versions = {"nfjax": "jax 1", "eager": "PyTorch 1"}
        self.fits, self.asked = fits, []

    def limits(self, dtype):
        return {"matmul": 1.0}

    def together(self, case, names):
        return self.alone(case, names)

    def alone(self, case, names):
        self.asked.append((case.batch, tuple(names)))

        def side(name):
            return {"seconds": [1.0]} if case.batch <= self.fits[name] else {"error": "RESOURCE_EXHAUSTED"}

        return {name: side(name) for name in names}


def run(comparison, device="GPU"):
    for record in comparison.run(speed.cases(comparison.grid, ["IdShort"], 64), device):
        comparison.bench.done[json.dumps(speed.key(record))] = record


def test_each_side_goes_on_to_its_own_largest_batch(tmp_path):
    comparison = Stub({"nfjax": 128, "eager": 256}, ("nfjax", "eager"), tmp_path, {})
    run(comparison)
    both = ("nfjax", "eager")
    assert [ask for i, ask in enumerate(comparison.asked) if ask not in comparison.asked[:i]] == [
        (64, both), (128, both), (256, both), (512, ("eager",)),
    ]  # fmt: skip
    before = len(comparison.asked)
    run(comparison)
    assert len(comparison.asked) == before  # all of it is there


def test_a_new_side_and_a_new_version_are_measured(tmp_path):
    done = {}
    run(Stub({"nfjax": 64}, ("nfjax",), tmp_path, done))
    more = Stub({"nfjax": 64, "eager": 64}, ("nfjax", "eager"), tmp_path, done)
    run(more)
    assert more.asked[0] == (64, ("nfjax", "eager"))
    for record in done.values():
        record["sides"]["nfjax"]["version"] = "jax 0"
    again = Stub({"nfjax": 64, "eager": 64}, ("nfjax", "eager"), tmp_path, done)
    run(again)
    assert again.asked[0] == (64, ("nfjax", "eager"))


@pytest.mark.parametrize("there", [True, False])
def test_timm_is_left_out_where_it_is_not_installed(tmp_path, there):
    class Known:
        def ask(self, do, **_):
            machine = {"device": "GPU", "platform": "gpu", "version": "1"}
            return {"machine": machine, "has_timm": there, "limits": {"matmul": 2.0, "conv": 1.0}}[do]

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    comparison = Stub({"nfjax": 64, "timm eager": 64}, ("nfjax", "timm eager"), tmp_path, {})
    comparison._start = lambda name: Known()
    assert comparison.device(comparison.grid.sides) == "GPU"
    assert speed.Comparison.limits(comparison, "bfloat16") == {"matmul": 2.0, "conv": 1.0}
    run(comparison)
    measured = {tuple(record["sides"]) for record in comparison.bench.done.values()}
    assert measured == {("nfjax", "timm eager") if there else ("nfjax",)}


def test_losses_that_disagree_are_told():
    case = {"depth": 18, "network": "IdShort", "image": 32, "batch": 8, "dtype": "float32", "width": 64}
    ours, same, other = [2.30, 2.29, 2.28], [2.31, 2.29, 2.27], [2.30, 2.50, 2.20]
    record = {"case": case, "sides": {"nfjax": {"losses": ours}, "eager": {"losses": same}}}
    assert speed.agreement(record) == ""
    record["sides"]["eager"]["losses"] = other
    assert "PyTorch differs from nfjax" in speed.agreement(record)
    record["sides"]["eager"]["losses"] = [2.3, 2.3, float("nan")]
    assert "PyTorch does not fall" in speed.agreement(record)


# ---------------------------------------------------------------- every case in small, and its table


@pytest.mark.parametrize("name", runner.CASES)
def test_the_committed_tables_are_those_of_the_committed_records(name):
    case = importlib.import_module(f"benchmarks.cases.{name}")
    assert (RESULTS / f"{name}.md").read_text() == case.table(runner.read(RESULTS / f"{name}.jsonl"))


@pytest.mark.parametrize("name", runner.CASES)
def test_the_pages_show_the_tables(name):
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert re.search(rf"^```{{include}} (\.\./)+results/{name}\.md$", pages, re.M)


def test_pages_are_updated_between_their_marks(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.md").write_text("| new |\n")
    (tmp_path / "results" / "b.txt").write_text("printed\n")
    page = tmp_path / "page.md"
    page.write_text("x\n<!-- results/a.md -->\nold\n<!-- end -->\ny\n<!-- results/b.txt -->\n<!-- end -->\n")
    tables.update(page, tmp_path)
    assert page.read_text() == (
        "x\n<!-- results/a.md -->\n| new |\n<!-- end -->\ny\n<!-- results/b.txt -->\n```\nprinted\n```\n<!-- end -->\n"
    )


TINY = {
    "speed": "--depths=10 --networks=BatchNorm --batches=4 --width=4 --rounds=2 --sides=nfjax",
    "epoch": "--depth=10 --width=4 --batch=8 --examples=16 --rounds=1 --operations=0 --sides=nfjax",
    "startup": "--depths=10 --sides=first-run,next-run",
    "building": "--depths=10 --rounds=1 --sides=nfjax",
    "checkpoints": "--depths=10 --width=4 --batch=4 --rounds=1 --length=1",
    "signal_propagation": "--depths=10 --curves=1 --rounds=1 --shape=2,8,8,3 --sides=nfjax",
}


@pytest.mark.parametrize("name", TINY)
def test_cases_run_in_small(name, tmp_path, capsys):
    runner.main([f"--out={tmp_path}", name, *TINY[name].split()])
    records, case = runner.read(tmp_path / f"{name}.jsonl"), importlib.import_module(f"benchmarks.cases.{name}")
    assert (tmp_path / f"{name}.md").read_text() == case.table(records)
    assert "failed" not in capsys.readouterr().out
    if name == "speed":
        (record,) = records
        assert len(record["sides"]["nfjax"]["seconds"]) == 2
        assert len(record["sides"]["nfjax"]["losses"]) == 4
        assert speed.agreement(record) == ""
        assert 0 < speed.flops(record) < 1e12
    if name == "startup":
        first, following = records
        assert first["kept_mib"] > 0
        assert following["first_step"] < first["first_step"]
    if name == "checkpoints":
        assert records[0]["all"]["written"][0] >= records[0]["all"]["call"][0]


def test_predictions_in_small(tmp_path):
    """Both roles by nfjax itself, with weights that timm has made: what is compared is the same."""
    from test_torch_weights import kept

    from benchmarks.cases import predict
    from nfjax.inference import _safetensors

    photographs.write(tmp_path / "set", per_class=3)
    (tmp_path / "small_basic.safetensors").write_bytes(_safetensors.encode(kept("small_basic")[0]))
    flags = [f"--images={tmp_path / 'set'}", f"--weights={tmp_path / 'small_basic.safetensors'}", "--sides=first-run"]
    runner.main([f"--out={tmp_path}", "predict", *flags, "--rounds=1", "--image-size=33", "--batch=4"])
    (record,) = runner.read(tmp_path / "predict.jsonl")
    assert (record["network"], record["images"]) == ("small_basic", 12)
    assert record["sides"]["first-run"] | {"seconds": 0} == {"seconds": 0, "same": 1.0, "difference": 0.0}
    assert record["sides"]["first-run"]["seconds"][0] > 0.5
    with pytest.raises(SystemExit, match="timm's sides need --timm-script; without it: --sides=first-run,next-run"):
        runner.main([f"--out={tmp_path}", "predict", f"--images={tmp_path}", "--torch-python=python"])
    with pytest.raises(turns.LostError, match="2 images against 1"):
        predict.agreement({"a": (0, 1.0), "b": (0, 1.0)}, {"a": (0, 1.0)})
    assert predict.agreement({"a": (0, 0.5), "b": (1, 1.0)}, {"a": (0, 0.75), "b": (0, 1.0)}) == {
        "same": 0.5,
        "difference": 0.25,
    }


def test_formats_in_small(tmp_path):
    pytest.importorskip("jax2onnx", reason='jax2onnx is not installed: pip install "nfjax[onnx]"')
    runner.main([f"--out={tmp_path}", "formats", "--sides=onnx", "--rounds=1", "--batch=2"])
    (record,) = runner.read(tmp_path / "formats.jsonl")
    assert record["way"] == "ONNX, by onnxruntime"
    assert 700_000 < record["bytes"] < 2**20
    assert record["difference"] < 1e-4
    assert record["first"] > 0
    assert record["images_per_second"] > 1


def test_crops_in_small(tmp_path):
    """The sides of the input pipeline that need nothing else."""
    from chaos.observing import make_images

    make_images(tmp_path / "images", 160, 40)
    out, data = tmp_path / "out", str(tmp_path / "images")
    runner.main([f"--out={out}", "input_pipeline", f"--data={data}", "--rounds=1", "--sides=nfjax,pool"])
    (record,) = runner.read(out / "input_pipeline.jsonl")
    assert list(record["rounds"])[:2] == ["pool", "nfjax, 1 worker"]
    assert len(record["rounds"]) == 5
    assert all(rate > 0 for rate in record["images_per_second"].values())
    assert record["pixel_difference"][0] <= record["pixel_difference"][1] < 3
    assert record["memory_mib"]["highest"] >= record["memory_mib"]["epoch_20"] > 0


def test_augmentation_in_small(tmp_path, monkeypatch):
    """Both roles by nfjax itself: torchvision is not needed to see that what is compared is compared."""
    from benchmarks.cases import augmentation

    with runner.Bench(argparse.Namespace()).start(augmentation.SIDES["nfjax"], "augmentation") as side:
        images = augmentation.resized(augmentation.load_images(None, 2), 8, 8)
        augmentation.load({"nfjax": side}, tmp_path, images)
        output = str(tmp_path / "out.npy")
        side.ask("operation", output=output, name="identity", interpolation="nearest", fill=(0, 0, 0))
        same = augmentation.np.load(output)
        assert same.shape == (31 * 2 * 2, 8, 8, 3)
        assert augmentation.compare(same[:2], images) == {"values": 384, "different": 0, "max_difference": 0}
        drawn = side.ask("policy", output=output, seed=0, magnitude=9, interpolation="nearest", fill=(0, 0, 0))
        assert len(drawn["operations"]) == len(drawn["signs"]) == 2
        assert augmentation.compare(augmentation.np.load(output), images)["different"] > 0
        names = side.ask("names")
        assert names[: augmentation.GEOMETRIC] == ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"]
