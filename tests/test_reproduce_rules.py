"""Every rule side by side: what is trained next follows from what the runs came to, and the table says it."""

import csv
import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import sys

import pytest
from flax import nnx

from nfjax import cli, cost, layers, preemption, reproduce, residual, resnet, spp
from nfjax.reproduce import _beginnings, _comparison, _lines, _rates, _records, _runs
from nfjax.reproduce._beginnings import Beginning
from nfjax.reproduce._curves import NETWORKS
from nfjax.reproduce._grids import ANY, MENDED, RULES, VERY_DEEP, Cell, Grid
from nfjax.runs import workdirs
from nfjax.training import loop as train
from tests.conftest import TINY, TINY_FLAGS

START = {
    "started": "2026-01-01T00:00:00+00:00",
    "packages": {"jax": "0.10.2"},
    "device": {"kind": "cpu", "platform": "cpu", "count": 1},
    "commit": None,
}
FIXUP, IDSHORT, NF = "Fixup, He fan-out", "IdShort, He fan-out", "NF-ResNet, LeCun"


def small(*curves, depths=(18,)):
    """A grid of these networks, each under the label that the command gives it."""
    cells = [Cell(depth, curve, f"ResNet-{depth} {curve}") for depth in depths for curve in curves]
    return Grid("Tiny", ANY, tuple(cells), by_depth=True)


def made(curve, accuracy, exponent=0, seed=0, depth=18, diverged=None, **about):
    """The record of a run of one epoch on 1,000 test images, at 0.01 times a power of two."""
    request = _runs.Request(out=None, changes={"epochs": 1})
    cell = Cell(depth, curve, "", {"optim.learning_rate": 0.01 * 2.0**exponent})
    config = _runs.make_config(ANY, cell, seed, request)
    epochs = {name: [] if accuracy is None else [accuracy] for name in _records.PER_EPOCH}
    about = {"data": "images", "fingerprint": "f00d", "images": (5_000, 1_000), "classes": 10} | about
    settings = _runs.workdirs.essence(config)
    return _records.Record(ANY, **about, curve=curve, settings=settings, epochs=epochs, diverged=diverged,
                          seconds=60.0, starts=[START])  # fmt: skip


def asked(out=None, seeds=1, **more):
    return _runs.Request(out=out, seeds=seeds, changes={"epochs": 1}, **more)


# ---------------------------------------------------------------- what is compared


def test_every_rule_and_every_norm_is_compared_at_every_depth():
    of = {(cell.depth, cell.curve): NETWORKS[cell.curve] for cell in RULES.cells}
    assert {depth for depth, _ in of} == {18, 50, 101}
    for depth in (18, 50, 101):
        there = [network for (at, _), network in of.items() if at == depth]
        assert {rule for rule, _, _ in there} == set(residual.RESIDUALS)
        assert {norm for _, norm, _ in there} == {None, *layers.NORMS}
        # Each with He's fan-out, and where its authors draw otherwise, with that, too.
        pairs = {(rule, norm) for rule, norm, _ in there}
        assert pairs == {(rule, norm) for rule, norm, init in there if init == "he_fan_out"}
    for grid in reproduce.COMPARISONS.values():
        assert grid.dataset in _runs.BASES
        assert len({cell.label for cell in grid.cells}) == len(grid.cells)


def test_fixups_numbers_have_the_learning_rate_of_its_authors():
    configs = {cell.curve: _runs.make_config(ANY, cell, 0, asked()) for cell in RULES.cells}
    rates = {curve: config.optim.scalar_rate for curve, config in configs.items()}
    assert {curve for curve, rate in rates.items() if rate != 1} == {FIXUP}
    assert rates[FIXUP] == 0.1


def test_networks_that_are_mended_differ_from_those_that_are_not_in_that_alone():
    settings = {cell.curve: _runs.make_run(MENDED, cell, 0, asked()).settings for cell in MENDED.cells}
    methods = {curve: one.pop("model.rescale") for curve, one in settings.items()}
    assert {curve: method for curve, method in methods.items() if method} == {
        "classical, He fan-out, balance": "balance",
        "classical, He fan-out, balance backward": "balance_backward",
        "classical, LSUV": "lsuv",
        "IdShort, He fan-out, balance": "balance",
    }
    assert (
        settings["classical, He fan-out, balance"] == settings["classical, LSUV"] == settings["classical, He fan-out"]
    )
    assert settings["IdShort, He fan-out, balance"] == settings["IdShort, He fan-out"]


def test_a_record_from_before_a_network_could_be_mended_is_of_the_plain_one():
    plain, mended = (_runs.make_run(MENDED, cell, 0, asked()) for cell in MENDED.cells[:2])
    old = {name: value for name, value in plain.settings.items() if name != "model.rescale"}
    assert plain.is_done(old)
    assert not mended.is_done(old)
    assert mended.is_done(mended.settings)


def test_a_mended_network_is_measured_as_mended():
    cell = Cell(TINY, "classical, He fan-out, balance", "mended", {"model.rescale": "balance"})
    grid = Grid("Two", ANY, (cell, dataclasses.replace(cell, label="plain", changes={})))
    request = dataclasses.replace(asked(), changes={"model.width": 4, "data.image_size": 16})
    mended, plain = (_beginnings.measure(_runs.make_run(grid, one, 0, request), 10) for one in grid.cells)
    # Its transitions lose the gradient; what batches differ by is left.
    lost = [abs(math.log(statistics.median(one.backward))) for one in (mended, plain)]
    assert lost[0] < lost[1] / 3
    assert mended.parameters == plain.parameters


@pytest.mark.parametrize("cell", VERY_DEEP.cells[:: len(VERY_DEEP.cells) // 2], ids=lambda cell: cell.label)
def test_a_very_deep_network_has_as_many_layers_as_its_name_says(cell):
    config = _runs.make_config(ANY, cell, 0, asked())
    sizes = config.model.stage_sizes
    assert (config.model.block, 2 + 2 * sum(sizes)) == ("basic", cell.depth)
    assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- the largest learning rate


@pytest.mark.parametrize("largest", range(_rates.LOWEST - 1, _rates.HIGHEST + 1))
def test_the_largest_rate_is_found_by_bisection(largest):
    trained = {}
    while (exponent := _rates.next_exponent(trained)) is not None:
        assert exponent not in trained
        assert _rates.LOWEST <= exponent <= _rates.HIGHEST
        trained[exponent] = exponent <= largest
    assert _rates.bracket(trained) == (largest, largest + 1)
    assert next(iter(trained)) == 0  # the rate of the config comes first
    assert len(trained) <= (5 if largest >= 0 else 7)


def test_a_rate_may_be_too_small_to_train_in_the_budget():
    trained = {}
    while (exponent := _rates.next_exponent(trained)) is not None:
        trained[exponent] = 1 <= exponent <= 3
    assert trained == {0: False, 2: True, 5: False, 3: True, 4: False}
    assert _rates.largest(trained) == 3


def test_above_a_rate_that_diverges_nothing_is_tried():
    assert _rates.next_exponent({0: False}, None, {0}) == -5
    assert _rates.next_exponent({0: False}, 3, {0}) == -1
    assert _rates.next_exponent({0: False, 2: False}, None, {2}) == -5
    assert _rates.next_exponent({0: False}, None) == 2


@pytest.mark.parametrize("likely", range(_rates.LOWEST, _rates.HIGHEST + 1))
def test_the_largest_rate_is_found_from_one_that_is_likely(likely):
    for largest in range(_rates.LOWEST - 1, _rates.HIGHEST + 1):
        trained = {}
        while (exponent := _rates.next_exponent(trained, likely)) is not None:
            assert exponent not in trained
            trained[exponent] = exponent <= largest
        assert _rates.largest(trained) == largest
        if largest == likely:
            assert len(trained) <= 3  # the config's, this one, and the next that does not


@pytest.mark.parametrize(
    ("accuracy", "diverged", "whether"),
    [(0.128, None, False), (0.129, None, True), (0.5, "at step 9", False), (None, "at step 0", False)],
)
def test_a_network_trains_where_it_ends_above_guessing_by_more_than_chance(accuracy, diverged, whether):
    # Of 1,000 images of 10 classes, guessing gets 10 % right, with a standard error of sqrt(0.09 / 1000).
    assert _rates.trains(made(IDSHORT, accuracy, diverged=diverged)) is whether


@pytest.mark.parametrize(
    ("trained", "shown"),
    [
        ({}, ""),
        ({0: True, 1: False}, "0.01"),
        ({0: True, 4: False}, "0.01 to 0.16"),
        ({0: True, 4: True, 6: False}, "0.16 to 0.64"),
        ({8: True, 0: True}, "at least 2.56"),
        ({0: False}, "none yet, less than 0.01"),
        ({0: False, -8: False}, "none"),
        ({0: False, -5: True, -4: False}, "0.000313"),
    ],
)
def test_the_largest_rate_for_a_person(trained, shown):
    runs = {exponent: {0: made(IDSHORT, 0.5 if good else 0.1, exponent)} for exponent, good in trained.items()}
    assert _rates.Outcome(0.01, runs).largest_rate() == shown


def test_what_comes_next_follows_from_what_there_is():
    grid = small(IDSHORT, NF, depths=(18, 50))
    plan = _rates.plan_rates(grid, asked(seeds=2))

    def told(known):
        done = [record.settings for record in known]
        runs = [run for run in plan(known) if not any(_records.agree(run.settings, one) for one in done)]
        return [(run.cell.depth, run.cell.curve, run.config.optim.learning_rate, run.seed) for run in runs]

    first = [(depth, curve, 0.01, 0) for depth in (18, 50) for curve in (IDSHORT, NF)]
    second = [(depth, curve, 0.01, 1) for depth in (18, 50) for curve in (IDSHORT, NF)]
    assert told([]) == [*first, *second]
    known = [made(IDSHORT, 0.5), made(NF, 0.1)]
    assert told(known) == [*first[2:], (18, IDSHORT, 0.16, 0), (18, NF, 0.04, 0), *second]
    # A run of other settings says nothing about these.
    other = made(IDSHORT, 0.5, 4)
    other = dataclasses.replace(other, settings={**other.settings, "model.width": 8})
    assert told([*known, other]) == told(known)
    known += [made(IDSHORT, 0.1, 4), made(IDSHORT, 0.4, 2), made(IDSHORT, 0.1, 3)]
    assert told(known) == [*first[2:], (18, NF, 0.04, 0), *second]
    # Deeper networks begin where the same one with fewer layers ended, at 0.04.
    known += [made(IDSHORT, 0.3, depth=50), made(NF, 0.3, depth=50)]
    assert (50, IDSHORT, 0.04, 0) in told(known)
    assert (50, NF, 0.16, 0) in told(known)  # whose largest rate at 18 layers is not known yet
    assert str(plan(known)[4]) == f"ResNet-18 {IDSHORT}, learning rate 0.04, seed 0"


def test_only_the_networks_that_are_asked_for_are_trained():
    grid = small(IDSHORT, NF, depths=(18, 50))
    plan = _rates.plan_rates(grid, asked(networks=("ResNet-50 NF",)))
    assert [run.cell.label for run in plan([])] == [f"ResNet-50 {NF}"]
    with pytest.raises(ValueError, match=r"--network=Nf: expected the beginning of one of\n  ResNet-18 IdShort"):
        _rates.plan_rates(grid, asked(networks=("Nf",)))


# ---------------------------------------------------------------- the table


def closed_forms(model):
    predicted = spp.predict(model, (_beginnings.BATCH, 8, 8, 3))
    return predicted.forward_var, predicted.backward_var


def compared(tmp_path, grid, *records, seeds=3):
    for record in records:
        _records.append(tmp_path, record)
    (comparison,) = _comparison.comparisons(grid, asked(tmp_path, seeds))
    return comparison


def of_rows(comparison, columns):
    table = comparison.table()
    return {row[0]: [row[table.columns.index(column)] for column in columns] for row in table.rows}


def test_the_table_says_what_the_runs_came_to(tmp_path):
    comparison = compared(
        tmp_path,
        small(IDSHORT, NF, FIXUP, "SkipInit, LeCun"),
        *(made(IDSHORT, value, seed=seed) for seed, value in enumerate([0.4, 0.42, 0.41])),
        *(made(NF, value, seed=seed) for seed, value in enumerate([0.3, 0.1, 0.2])),
        made(IDSHORT, 0.6, 1),
        made(IDSHORT, 0.1, 2),
        made(FIXUP, None, diverged="at step 3 the loss is nan"),
        made(FIXUP, 0.2, seed=1),
        made(FIXUP, 0.2, seed=2),
        made(IDSHORT, 0.9, depth=50),  # of another grid
    )
    columns = ["trains at 0.01", "test accuracy at 0.01", "largest rate", "best test accuracy, at rate"]
    assert of_rows(comparison, columns) == {
        f"ResNet-18 {IDSHORT}": ["yes", "41.00 ± 1.00 % (3)", "0.02", "60.0 % at 0.02"],
        f"ResNet-18 {NF}": ["2 of 3", "20.00 ± 10.00 % (3)", "at least 0.01", "30.0 % at 0.01"],
        f"ResNet-18 {FIXUP}": ["2 of 3", "20.00 ± 0.00 % (2), 1 of 3 diverged", "none yet, less than 0.01", "none"],
    }
    assert of_rows(comparison, ["parameters", "forward, first / last block"])[f"ResNet-18 {NF}"] == [
        "not measured yet",
        "",
    ]
    note = comparison.table().note
    assert "images, fingerprint f00d: 5,000 training and 1,000 test images; not as in the configs: epochs 1." in note
    assert "above guessing (10.0 %) by more than 3 standard errors" in note


def test_who_is_surely_above_whom_and_whether_the_order_holds(tmp_path):
    values = {IDSHORT: [0.50, 0.51, 0.52], NF: [0.40, 0.41, 0.42], FIXUP: [0.41, 0.43, 0.40], "SkipInit, LeCun": [0.2]}
    records = [made(curve, value, seed=seed) for curve, ends in values.items() for seed, value in enumerate(ends)]
    comparison = compared(tmp_path, small(*values), *records)
    assert [row[0] for row in of_rows(comparison, ["surely above, below"]).values()] == ["2, 0", "0, 1", "0, 1", ""]
    # With seeds 0 and 1 the order is the same, with seed 2 two of three have changed places, which is 1/2.
    assert "between two seeds, on average: 0.67 at 18 layers (of at least 3 networks)." in comparison.table().note


def test_of_runs_that_diverged_nothing_is_sure(tmp_path):
    diverged = [made(curve, None, seed=seed, diverged="at step 0") for curve in (FIXUP, NF) for seed in (0, 1)]
    others = [made(IDSHORT, 0.5, seed=seed) for seed in (0, 1)]
    comparison = compared(tmp_path, small(IDSHORT, NF, FIXUP), *others, *diverged)
    assert [row[0] for row in of_rows(comparison, ["surely above, below"]).values()] == ["0, 0", "", ""]
    assert "No two seeds have three networks of one depth in common" in comparison.table().note


def test_seeds_without_a_network_in_common_have_no_order(tmp_path):
    records = [made(IDSHORT, None, diverged="x"), made(IDSHORT, 0.5, seed=1), made(NF, 0.4)]
    comparison = compared(tmp_path, small(IDSHORT, NF), *records)
    assert "No two seeds have three networks of one depth in common" in comparison.table().note


def test_a_network_that_always_says_the_largest_class_does_not_train():
    assert _rates.trains(made(IDSHORT, 0.9, guessing=0.5))
    assert not _rates.trains(made(IDSHORT, 0.9, guessing=0.9))  # nine tenths of the test images are of one class


def test_what_a_network_has_of_its_own_is_told(tmp_path):
    cells = tuple(cell for cell in RULES.cells if cell.depth == 18 and cell.curve in (IDSHORT, FIXUP))
    comparison = compared(tmp_path, dataclasses.replace(RULES, cells=cells), made(IDSHORT, 0.5))
    assert f"epochs 1; optim.scalar_rate 0.1 of {FIXUP}." in comparison.table().note


def test_records_of_rates_beside_the_grid_say_nothing(tmp_path):
    records = [made(IDSHORT, 0.5, exponent) for exponent in (9, 0.5)]
    record = made(IDSHORT, 0.5)
    for rate in (0, -1, float("inf"), "fast", None):
        records.append(dataclasses.replace(record, settings={**record.settings, "optim.learning_rate": rate}))
    assert _rates.make_reader(small(IDSHORT), asked())(records)[f"ResNet-18 {IDSHORT}"].runs == {}
    only = [made(IDSHORT, 0.5, 2)]  # not at the config's rate
    comparison = compared(tmp_path, small(IDSHORT), *only)
    columns = ["trains at 0.01", "largest rate", "best test accuracy, at rate"]
    assert of_rows(comparison, columns)[f"ResNet-18 {IDSHORT}"] == [
        "not measured yet",
        "at least 0.04",
        "50.0 % at 0.04",
    ]


def test_what_is_known_before_training_stands_beside(tmp_path):
    grid = small(IDSHORT, NF)
    keys = [_beginnings._key(_runs.make_run(grid, cell, 0, asked()), 10) for cell in grid.cells]
    for key, closed in zip(keys, ((2.0, 0.25), None), strict=True):
        known = Beginning(key, 1_000, 2_000, [1.0, 2.0, 4.0], [0.125, 0.25, 0.5], closed)
        _lines.append(tmp_path / _beginnings.FILE, known)
    comparison = compared(tmp_path, grid)
    table = comparison.table()
    assert list(table.columns) == list(_comparison.BEFORE)
    assert table.rows[0][1:] == [1_000, 2_000, "2 [1, 4]", "2", "0.25 [0.125, 0.5]", "0.25"]
    assert (table.rows[1][4], table.rows[1][6]) == ("none", "none")
    assert table.note.startswith("Cost: of networks for 10 classes and one image of 32 pixels, width 64. ")
    assert table.note.endswith(_comparison.NOTHING)
    # The number of classes is of the images: these networks are others.
    assert compared(tmp_path, grid, made(IDSHORT, 0.5, classes=7)).beginnings == {}


def test_what_is_known_of_a_network_stays_known_when_there_are_more_fields(monkeypatch):
    def key():
        return _beginnings._key(_runs.make_run(small(IDSHORT), small(IDSHORT).cells[0], 0, asked()), 10)

    before, essence = key(), workdirs.essence
    monkeypatch.setattr(workdirs, "essence", lambda config: {**essence(config), "model.later": None})
    assert key() == before
    monkeypatch.setattr(workdirs, "essence", lambda config: {**essence(config), "model.later": id(config)})
    assert key() != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"[]\n", "line 1 is not what is known of a network"),
        (b'{"network": "a"}\n', "line 1 is not what is known of a network"),
        (
            b'{"network": "a", "parameters": 1, "macs": 1, "forward": [2, 1], "backward": [1, 2], "closed": null}\n',
            "expected ratios from the smallest to the largest",
        ),
    ],
)
def test_damage_to_what_is_known_before_training_is_named(tmp_path, damage, message):
    (tmp_path / _beginnings.FILE).write_bytes(damage)
    with pytest.raises(ValueError, match=message):
        _beginnings.read(small(IDSHORT), asked(tmp_path), 10)


def test_several_processes_may_measure_at_once(tmp_path):
    path = tmp_path / _beginnings.FILE
    code = (
        "import pathlib, sys\n"
        "from nfjax.reproduce import _beginnings, _lines\n"
        "for i in range(40):\n"
        "    name = f'{sys.argv[1]}-{i}'\n"
        "    known = _beginnings.Beginning(name, 1, 1, [1.0], [1.0], None)\n"
        f"    _lines.append(pathlib.Path({str(path)!r}), known)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    found = _lines.read(path, Beginning, "what is known of a network", "")
    assert {one.network for one in found} == {f"{number}-{i}" for number in range(2) for i in range(40)}


def test_every_run_is_a_row_and_the_picture_has_a_field_for_every_network(tmp_path):
    grid = small(IDSHORT, NF, FIXUP, depths=(18, 50))
    ends = [
        made(IDSHORT, 0.4),
        made(IDSHORT, 0.5, 1),
        made(NF, 0.1),
        made(FIXUP, None, diverged="at step 3, too large"),
    ]
    comparison = compared(tmp_path, grid, *ends)
    written = comparison.write(tmp_path / "rules")
    assert [path.name for path in written] == [f"rules_images_epochs1.{kind}" for kind in ("md", "png", "csv")]
    rows = list(csv.DictReader(written[2].read_text().splitlines()))
    assert [(row["network"], row["learning rate"], row["trains"]) for row in rows] == [
        (f"ResNet-18 {IDSHORT}", "0.01", "True"),
        (f"ResNet-18 {IDSHORT}", "0.02", "True"),
        (f"ResNet-18 {NF}", "0.01", "False"),
        (f"ResNet-18 {FIXUP}", "0.01", "False"),
    ]
    assert rows[3]["diverged"] == "at step 3, too large"
    figure = comparison.plot()
    panels = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    # By rows: a network that trains, one that does not, one that diverged; nothing of 50 layers was measured.
    assert panels == [
        ["40", "·", "✗", "·", "÷", "·"],
        ["≥ 0.02", "·", "< 0.01", "·", "< 0.01", "·"],
        ["50", "·", "·", "·", "·", "·"],
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [IDSHORT, NF, FIXUP]


# ---------------------------------------------------------------- the command


@pytest.fixture
def tiny(monkeypatch):
    """Two of the rules in the smallest network."""
    monkeypatch.setitem(reproduce.COMPARISONS, "rules", small(IDSHORT, NF, depths=(TINY,)))


def run(*arguments):
    return cli.run(["reproduce", *map(str, arguments)])


def pretending(started, limits):
    """In place of a training: one that ends at 90 % up to the largest rate of its rule, and as by guessing above."""

    def trained(config, workdir, more):
        rate, rule = config.optim.learning_rate, config.model.residual
        started.append((rule, rate, config.seed))
        end = 0.9 if rate <= limits[rule] else 0.1
        line = {"kind": "epoch", "step": 4, "epoch": 1, **dict.fromkeys(_records.PER_EPOCH, end)}
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "versions.json").write_text(json.dumps([START]))

    return trained


@pytest.mark.usefixtures("tiny")
def test_the_command_finds_the_largest_rate_of_each_rule_and_goes_on_where_it_was_stopped(
    monkeypatch, tmp_path, capsys
):
    flags = ["rules", f"--out={tmp_path}", f"--runs={tmp_path / 'runs'}", *TINY_FLAGS, "--seeds=2"]
    started = []
    trained = pretending(started, {"idshort": 0.05, "nf": 0.005})

    def stopping(config, workdir, more):
        if len(started) == 3:
            raise preemption.TrainingInterruptedError("interrupted: saved")
        trained(config, workdir, more)

    monkeypatch.setattr(train, "train", stopping)
    assert run(*flags) == 130
    assert "ResNet-10 IdShort, He fan-out" in capsys.readouterr().out  # what is there was shown
    monkeypatch.setattr(train, "train", trained)
    assert run(*flags) == 0
    by_rule = {rule: [rate for name, rate, seed in started if (name, seed) == (rule, 0)] for rule in ("idshort", "nf")}
    assert by_rule["idshort"] == pytest.approx([0.01, 0.16, 0.04, 0.08])
    assert by_rule["nf"] == pytest.approx([0.01, 0.04, 0.16, 0.01 / 32, 0.01 / 8, 0.01 / 4, 0.01 / 2])
    assert [run for run in started if run[2]] == [("idshort", 0.01, 1), ("nf", 0.01, 1)]
    shown = capsys.readouterr().out
    (idshort,) = (line for line in shown.splitlines() if line.startswith("ResNet-10 IdShort") and "%" in line)
    assert idshort.endswith("0.04               90.0 % at 0.04")
    monkeypatch.setattr(train, "train", None)  # nothing is left to train, or to measure
    monkeypatch.setattr(_beginnings, "measure", None)
    before = (tmp_path / "rules" / _records.FILE).read_text()
    assert run(*flags) == 0
    assert (tmp_path / "rules" / _records.FILE).read_text() == before
    (table,) = (tmp_path / "rules").glob("rules_*.md")
    assert "| 0.04 | 90.0 % at 0.04 |" in table.read_text()
    assert not (tmp_path / _records.FILE).exists()  # the claims of the paper are about its own runs


@pytest.mark.usefixtures("tiny")
def test_without_images_the_command_shows_what_is_known_before_training(tmp_path, capsys):
    flags = [flag for flag in TINY_FLAGS if not flag.startswith("--data=")]
    assert run("rules", f"--out={tmp_path}", *flags, "--network=ResNet-10 Id") == 0
    shown = capsys.readouterr().out
    assert "ResNet-10 IdShort, He fan-out" in shown
    assert "NF" not in shown
    assert _comparison.NOTHING in shown
    (known,) = _lines.read(tmp_path / "rules" / _beginnings.FILE, Beginning, "what is known of a network", "")
    assert len(known.forward) == len(known.backward) == _beginnings.SEEDS
    model = resnet.PreActResNet(TINY, "idshort", width=2, image_size=8, rngs=nnx.Rngs(0))
    assert known.parameters == cost.count(model, (1, 8, 8, 3)).parameters
    assert known.closed == pytest.approx([values[0] / values[-1] for values in closed_forms(model)], rel=0.3)


@pytest.mark.usefixtures("tiny")
def test_what_does_not_end_in_the_minutes_is_left_for_the_next_time(monkeypatch, tmp_path, capsys):
    flags = ["rules", f"--out={tmp_path}", f"--runs={tmp_path / 'runs'}", *TINY_FLAGS]
    monkeypatch.setattr(train, "train", None)  # nothing is started
    monkeypatch.setattr(_beginnings, "measure", None)
    assert run(*flags, "--minutes=0.001") == 0
    assert _comparison.NOTHING_YET in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_what_is_wrong_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_beginnings, "measure", None)
    flags = ["rules", f"--out={tmp_path}", f"--runs={tmp_path / 'runs'}", *TINY_FLAGS]
    assert run(*flags, "--config.batch_size=0") == 1
    assert "batch_size=0 must be positive" in capsys.readouterr().err
    (tmp_path / "rules" / _records.FILE).write_text("[]\n")
    assert run(*flags) == 1
    assert "training.jsonl, line 1 is not the record of a run" in capsys.readouterr().err
    (tmp_path / "rules" / _records.FILE).unlink()
    _records.append(tmp_path / "rules", made(IDSHORT, 0.5, data="Made up"))  # other images, on other terms
    assert run(*flags) == 1
    assert "whose images are others" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--network=ResNet-10 Nope", "--data=made-up"],
            1,
            "--network=ResNet-10 Nope: expected the beginning of",
        ),
        (["--config.model.depth=18"], 2, "model.depth is not for you to choose here"),
        (["--config.model.stage_sizes=(1,1)"], 2, "model.stage_sizes is not for you to choose here"),
        (["--config.model.block=basic"], 2, "model.block is not for you to choose here"),
        (["--config.model.name=resnet10"], 2, "model.name is not for you to choose here"),
        (
            ["--config.model.arguments=residual=identity"],
            2,
            "has 'residual': model.residual is not for you",
        ),
        (["--seeds=0"], 2, "--seeds=0 must be positive"),
        (["--minutes=0", "--data=made-up"], 2, "--minutes=0 must be positive"),
        (["--data=nowhere", "--config.data.source=folder"], 1, "nowhere does not exist"),
        (["--config.optim.learning_rate=0"], 1, "optim.learning_rate=0 must be positive"),
        (["rulez"], 2, "invalid choice: 'rulez'"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path, capsys, arguments, code, message):
    flags = [flag for flag in TINY_FLAGS if "--data=" not in flag]
    assert run("rules", f"--out={tmp_path}", *flags, *arguments) == code
    assert message in capsys.readouterr().err


def test_what_a_network_has_of_its_own_cannot_be_changed(tmp_path, capsys):
    assert run("rules", f"--out={tmp_path}", "--config.optim.scalar_rate=0.5") == 1
    assert f"ResNet-18 {FIXUP} has optim.scalar_rate=0.1 of its own" in capsys.readouterr().err
