"""The training figures: what is missing is trained once, what may not be compared is kept apart, numbers are right."""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
import statistics

import jax
import numpy as np
import pytest
import scipy.stats

from nfjax import cli, compilation, data, preemption, reproduce
from nfjax.data.contents import contents
from nfjax.reproduce import _endings, _grids, _intervals, _lines, _provenance, _records, _runs, _training
from nfjax.reproduce._claims import CLAIMS, claims_table
from nfjax.reproduce._curves import CURVES
from nfjax.reproduce._grids import BASELINE, BROCK, CONVSHORT, SCHEMES, Cell, Grid
from nfjax.training import loop as train
from tests.conftest import TINY, TINY_FLAGS

START = {
    "started": "2026-01-01T00:00:00+00:00",
    "packages": {"jax": "0.10.2"},
    "device": {"kind": "cpu", "platform": "cpu", "count": 1},
    "commit": None,
}


def made(curve, accuracies, depth=18, seed=0, dataset="CIFAR-10", diverged=None, **changes):
    """The record of a run with these test accuracies, one per epoch."""
    changes = {"epochs": len(accuracies), **{name.replace("__", "."): value for name, value in changes.items()}}
    request = _runs.Request(out=None, changes=changes)
    config = _runs.make_config(dataset, Cell(depth, curve, ""), seed, request)
    epochs = {name: list(accuracies) for name in _records.PER_EPOCH}
    about = {
        "data": "images",
        "fingerprint": "f00d",
        "images": (50_000, 10_000),
        "classes": _runs.BASES[dataset].classes,
    }
    settings = _runs.workdirs.essence(config)
    return _records.Record(dataset, **about, curve=curve, settings=settings, epochs=epochs, diverged=diverged,
                          seconds=60.0, starts=[START])  # fmt: skip


def write(out, *many):
    for record in many:
        _records.append(out, record)


class Ended(SystemExit):
    """The command has ended with this code; its text is what it told on stderr."""

    def __str__(self):
        return self.told


def run(monkeypatch, *arguments):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = cli.run(["reproduce", *map(str, arguments)])
    if code:
        ended = Ended(code)
        ended.told = told.getvalue()
        raise ended


# ---------------------------------------------------------------- grids


def test_every_figure_names_curves_and_labels_them_once():
    for grid in [*_grids.GRIDS.values(), _grids.DEPTH, _grids.ablations(30)]:
        assert grid.dataset in _runs.BASES
        assert all(cell.curve in CURVES for cell in grid.cells)
        assert len({cell.label for cell in grid.cells}) == len(grid.cells)


def test_the_most_telling_runs_come_first():
    plan = _runs.planned(_grids.GRIDS["figure3"], _runs.Request(out=None, seeds=2))
    names = [(run.cell.depth, run.cell.curve) for run in plan[:5]]
    assert names == [
        (50, BASELINE),
        (50, CONVSHORT),
        (50, "IdShort, He fan-out"),
        (50, "ConvShort, Brock"),
        (50, "ConvShort, effective fan-out"),
    ]
    assert [run.seed for run in plan] == [0] * 8 + [1] * 8 + [0] * 8 + [1] * 8
    assert [run.cell.depth for run in plan] == [50] * 16 + [101] * 16


def test_an_ablation_changes_one_setting_of_the_figures():
    request = _runs.Request(out=None, changes={"epochs": 30})
    plan = _runs.planned(_training.ablation_grid(request), dataclasses.replace(request, seeds=1))
    usual = plan[0].settings
    changed = [{name: value for name, value in run.settings.items() if usual[name] != value} for run in plan[1:]]
    assert [next(iter(change.items())) for change in changed if len(change) == 1] == [
        ("optim.weight_decay", 1e-4),
        ("optim.weight_decay", 5e-4),
        ("augment.rand_operations", 0),
        ("augment.rand_operations", 1),
        ("augment.rand_magnitude", 5),
        ("augment.rand_magnitude", 15),
        ("epochs", 15),
        ("epochs", 60),
    ]


# ---------------------------------------------------------------- records


def test_a_line_that_a_crash_cut_short_is_left_out_and_ended(tmp_path):
    first, second = made(BASELINE, [0.5]), made(CONVSHORT, [0.6])
    write(tmp_path, first)
    with open(tmp_path / _records.FILE, "a") as stream:
        stream.write('{"dataset": "CIF')
    assert [record.curve for record in _records.read(tmp_path)] == [BASELINE]
    write(tmp_path, second)
    assert [record.curve for record in _records.read(tmp_path)] == [BASELINE, CONVSHORT]
    again = dataclasses.replace(second, seconds=1.0)
    write(tmp_path, again)
    assert [record.seconds for record in _records.read(tmp_path)] == [60.0, 1.0]


@pytest.mark.parametrize("damage", [b"{}\n", b"\xff\n{}\n", b"[1]\n", b"7"])
def test_a_damaged_line_is_named(tmp_path, damage):
    (tmp_path / _records.FILE).write_bytes(damage)
    with pytest.raises(ValueError, match=r"training.jsonl, line 1 is not the record of a run"):
        _records.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, r"Expected `object`, got `null` - at `\$\.epochs`; remove or mend that line"),
        ({"settings": 5}, r"Expected `object`, got `int` - at `\$\.settings`"),
        ({"epochs": {name: ["0.5"] for name in _records.PER_EPOCH}}, "Expected `float`, got `str`"),
        ({"epochs": {name: [0.5, 0.5] for name in _records.PER_EPOCH}}, "it has more epochs than its settings, 1"),
        ({"epochs": {name: [93.5] for name in _records.PER_EPOCH}}, "train_accuracy is 93.5, expected a share from 0"),
        ({"epochs": {name: [0.5] * len(name) for name in _records.PER_EPOCH}}, "a number per epoch in each"),
        ({"images": [5]}, r"Expected `array` of length >= 2"),
        ({"images": [5, -1]}, r"Expected `int` >= 1 - at `\$\.images\[1\]`"),
        ({"classes": 0}, "Expected `int` >= 1"),
        ({"seconds": -1}, r"Expected `float` >= 0"),
        ({"curve": 5}, "Expected `str`, got `int`"),
        ({"data": "\x1b[2J"}, r"'\\x1b\[2J' is no name that can be printed"),
        ({"starts": [{}]}, r"missing required field `.*` - at `\$\.starts\[0\]`"),
        ({"starts": [START | {"device": "cpu"}]}, r"Expected `object`, got `str` - at `\$\.starts\[0\]\.device`"),
        (
            {
                "settings": {
                    "seed": "0",
                    "model.depth": 18,
                    "model.residual": "",
                    "model.norm": "",
                    "model.init": "",
                    "epochs": 1,
                }
            },
            "settings have seed='0', expected a whole number",
        ),
        ({"epochs": {"test_accuracy": [0.5]}}, "epochs must have train_loss"),
        ({"epochs": {name: [] for name in _records.PER_EPOCH}}, "it has no epoch, and did not diverge"),
        ({"settings": {}}, "settings lack epochs, model.depth"),
    ],
)
def test_a_record_that_says_nothing_is_named(tmp_path, changes, message):
    line = json.dumps(dataclasses.asdict(made(BASELINE, [0.5])) | changes)
    (tmp_path / _records.FILE).write_text(f"{line}\n")
    with pytest.raises(ValueError, match=f"line 1 is not the record of a run .*{message}"):
        _records.read(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(_lines.logging, "warning", lambda text, *args: warnings.append(text % args))
    path = tmp_path / _records.FILE
    for content in (b"\x00\xff\n", b"\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}, line 1 is not the record of a run \(it is "):
            _records.read(tmp_path)
    assert warnings == []
    path.write_bytes(b"\x00\xff")  # which a crash may have left of a line
    assert _records.read(tmp_path) == []
    assert warnings == [f"the last line of {path} was cut short; it is left out, and its run is not known"]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a pipe or a device, which may never end"):
        _records.read(tmp_path)


def test_a_full_disk_leaves_no_half_of_a_record(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write(tmp_path, made(BASELINE, [0.5]))
    before = (tmp_path / _records.FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"{_records.FILE} cannot be written \(No space left on device\)"):
            write(tmp_path, made(CONVSHORT, [0.6]))
    assert (tmp_path / _records.FILE).read_bytes() == before
    write(tmp_path, made(CONVSHORT, [0.6]))
    assert [record.curve for record in _records.read(tmp_path)] == [BASELINE, CONVSHORT]


@pytest.mark.parametrize("data", [b"", b"\x00\xff", b'[{"sta', b"{}", b"5", b"[5]", b'[{"started": 5}]', None])
def test_a_run_is_recorded_without_what_cannot_be_read_of_its_starts(tmp_path, monkeypatch, data):
    warnings = []
    monkeypatch.setattr(_endings.logging, "warning", lambda text, *args: warnings.append(text % args))
    path = tmp_path / "versions.json"
    path.write_text(json.dumps([START | {"step": 0, "python": "3.11.7"}]))
    assert _endings._starts(path) == [START | {"step": 0, "python": "3.11.7"}]
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    assert _endings._starts(path) == []
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    group = [dataclasses.replace(made(BASELINE, [0.5]), starts=[])]
    assert _training._row("BatchNorm", group)[4] == "50.00 %"
    assert _provenance.versions(group) == ""


def test_a_full_disk_leaves_tables_and_figures_as_they_were(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write(tmp_path, made(BASELINE, [0.5]), made(CONVSHORT, [0.6]))
    (figure,) = figures(tmp_path, changes={"epochs": 1})
    written = figure.write(tmp_path / "figure7")
    before = [path.read_bytes() for path in written]
    assert [path.suffix for path in written] == [".md", ".png", ".csv"]
    assert before[1].startswith(b"\x89PNG")
    write(tmp_path, made(CONVSHORT, [0.7], seed=1))
    (figure,) = figures(tmp_path, changes={"epochs": 1})
    files = set(tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"figure7_images_epochs1\.md cannot be written \(No space left on device\)"):
        figure.write(tmp_path / "figure7")
    assert [path.read_bytes() for path in written] == before
    assert set(tmp_path.iterdir()) == files


def test_a_last_line_without_its_end_is_kept(tmp_path):
    write(tmp_path, made(BASELINE, [0.5]))
    path = tmp_path / _records.FILE
    path.write_text(path.read_text().rstrip())  # as an editor may leave it
    write(tmp_path, made(CONVSHORT, [0.6]))
    assert [record.curve for record in _records.read(tmp_path)] == [BASELINE, CONVSHORT]


def test_only_runs_on_equal_terms_are_grouped():
    one, other = made(BASELINE, [0.5]), made(CONVSHORT, [0.6], seed=3)
    longer, wider = made(CONVSHORT, [0.6, 0.7]), made(CONVSHORT, [0.6], model__width=8)
    elsewhere = dataclasses.replace(made(CONVSHORT, [0.6]), fingerprint="beef")
    found = _records.groups([one, longer, other, wider, elsewhere])
    assert found == [[one, other], [longer], [wider], [elsewhere]]


def test_a_field_that_a_record_does_not_know_does_not_part_it():
    record = made(CONVSHORT, [0.6])
    older = {name: value for name, value in record.terms.items() if name != "data.share"}
    assert _records.agree(older, record.terms)
    assert not _records.agree({**older, "batch_size": 64}, record.terms)


def test_mean_and_deviation_over_seeds():
    group = [made(CONVSHORT, values, seed=seed) for seed, values in enumerate([[0.7, 0.6], [0.5, 0.63], [0.6, 0.66]])]
    final, best = _records.over_seeds(group, "test_accuracy"), _records.over_seeds(group, "test_accuracy", "best")
    assert final.mean == pytest.approx(0.63)
    assert final.std == pytest.approx(statistics.stdev([0.60, 0.63, 0.66]))
    assert final.percent() == "63.00 ± 3.00 %"
    assert best.mean == pytest.approx((0.7 + 0.63 + 0.66) / 3)
    assert _records.mean([0.5]).percent() == "50.00 %"
    assert _records.over_seeds([made(CONVSHORT, [0.1], diverged="at step 3")], "test_accuracy") is None


def test_contents_name_the_pixels(tmp_path):
    dataset = data.load("synthetic", "", 8)
    assert contents(dataset) == contents(data.load("synthetic", "", 8))
    dataset.train.images[0, 0, 0, 0] ^= 1
    assert contents(dataset) != contents(data.load("synthetic", "", 8))


def test_a_share_of_the_images_is_spread_over_all_classes():
    whole = data.load("synthetic", "", 8)
    order = np.argsort(whole.train.labels, kind="stable")
    thin = dataclasses.replace(whole, train=whole.train.part(order)).thinned(0.1)
    assert (len(thin.train), len(thin.test)) == (102, 25)
    assert set(np.bincount(thin.train.labels)) <= {9, 10, 11}
    assert whole.thinned(1) is whole


def test_a_share_of_encoded_images(tmp_path):
    from test_data import make_folder

    make_folder(tmp_path, per_class=10)
    whole = data.load("folder", str(tmp_path), 32)
    thin = whole.thinned(0.3)
    assert len(thin.train) == round(0.3 * len(whole.train))
    assert thin.train.name(1) in {whole.train.name(i) for i in range(len(whole.train))}
    assert thin.train.reader(thin.train.reference(0))[1] == 0
    assert thin.fingerprint() != whole.fingerprint()


# ---------------------------------------------------------------- figures


def figures(out, name="figure7", **asked):
    changes = {"epochs": 2, **asked.pop("changes", {})}
    return _training.training_figures(_grids.GRIDS[name], _runs.Request(out=out, seeds=2, changes=changes, **asked))


def test_a_partial_grid_shows_what_is_there_and_tells_what_is_missing(tmp_path):
    write(
        tmp_path,
        made(BASELINE, [0.4, 0.6]),
        made(BASELINE, [0.4, 0.64], seed=1),
        made(CONVSHORT, [0.3, 0.5]),
        made("ConvShort, Brock", [0.1], diverged="at step 30 the loss is nan", epochs=2),
        made("IdShort, Brock", [], diverged="at step 0 the loss is nan", epochs=2),
        made(CONVSHORT, [0.3, 0.9, 0.95]),  # of another length
        made(CONVSHORT, [0.9, 0.9], depth=50),  # of another figure
    )
    (figure,) = figures(tmp_path)
    rows = {row[0]: row[1:-1] for row in figure.table().rows}
    assert rows == {
        f"ResNet-18 {BASELINE}": [2, 0, 2, "62.00 ± 2.83 %", "62.00 ± 2.83 %", "62.00 ± 2.83 %", "1.0"],
        f"ResNet-18 {CONVSHORT}": [1, 0, 2, "50.00 %", "50.00 %", "50.00 %", "1.0"],
        "ResNet-18 ConvShort, Brock": [1, "1, after epoch 1", 2, "diverged", "diverged", "diverged", ""],
        "ResNet-18 IdShort, Brock": [1, "1, after epoch 0", 2, "diverged", "diverged", "diverged", ""],
    }
    note = figure.table().note
    assert "not as in the configs: epochs 2." in note
    assert "1 x cpu" in note
    assert "Diverged: ResNet-18 ConvShort, Brock, seed 0, at step 30 the loss is nan; ResNet-18 IdShort, Bro" in note
    assert "fingerprint f00d: 50,000 training and 10,000 test images" in note
    assert f"Missing: seed 1 of ResNet-18 {CONVSHORT}; ResNet-18 ConvShort, Brock; ResNet-18 IdShort, Brock. " in note
    assert "seed 0, 1 of ResNet-18 IdShort, He fan-out; ResNet-18 LearnScalar, He fan-out; " in note
    written = figure.write(tmp_path / "figure7")
    assert [path.name for path in written] == [f"figure7_images_epochs2.{kind}" for kind in ("md", "png", "csv")]
    rows = list(csv.DictReader(written[2].read_text().splitlines()))
    assert len(rows) == 2 + 2 + 2 + 1
    assert (rows[3]["seed"], rows[3]["epoch"], rows[3]["test_accuracy"]) == ("1", "2", "0.64")


def test_each_set_of_images_is_a_figure_of_its_own(tmp_path):
    other = {"data": "others", "fingerprint": "beef"}
    write(tmp_path, made(BASELINE, [0.4, 0.6]), dataclasses.replace(made(CONVSHORT, [0.4, 0.6]), **other))
    first, second = figures(tmp_path)
    assert [list(filter(figure.found.get, figure.found)) for figure in (first, second)] == [
        [f"ResNet-18 {BASELINE}"],
        [f"ResNet-18 {CONVSHORT}"],
    ]
    assert [figure.first.data for figure in figures(tmp_path, data_name="others")] == ["others"]


def test_ablations_are_drawn_with_the_settings_that_they_start_from(tmp_path):
    write(tmp_path, made(CONVSHORT, [0.4, 0.6]), made(CONVSHORT, [0.4, 0.6, 0.7, 0.8]), made(CONVSHORT, [0.5]))
    request = _runs.Request(out=tmp_path, seeds=1, changes={"epochs": 2})
    (figure,) = _training.training_figures(_training.ablation_grid(request), request)
    rows = [(row[0], row[3], row[4]) for row in figure.table().rows]
    assert rows == [("as in the figures", 2, "60.00 %"), ("1 epochs", 1, "50.00 %"), ("4 epochs", 4, "80.00 %")]
    assert figure.write(tmp_path / "ablations")[0].name == "ablations_images_epochs2.md"


def test_nothing_to_draw_tells_what_to_do_and_what_is_there(tmp_path):
    write(tmp_path, made(BASELINE, [0.4, 0.6]), made(CONVSHORT, [0.5], depth=50))
    with pytest.raises(ValueError, match=r"no run of Figure 7.* with these settings; train them with --data=DIR") as no:
        figures(tmp_path, changes={"model.width": 8})
    assert str(no.value).splitlines()[1:] == ["  images, not as in the configs: epochs 2"]
    with pytest.raises(ValueError, match=r"with these settings on CIFAR10; train them"):
        figures(tmp_path, data_name="CIFAR10")


def test_names_that_would_share_a_file_are_refused(tiny_grid, monkeypatch, tmp_path):
    known = made(CONVSHORT, [0.5], depth=TINY, model__width=2, data__image_size=8, data__share=0.25, batch_size=64,
                 data__source="synthetic", augment__crop_padding=1, augment__rand_operations=0,
                 train__onednn=False)  # fmt: skip
    write(tmp_path, dataclasses.replace(known, data="Made up!"))
    with pytest.raises(SystemExit, match=r"whose images are others .*: give these another name with --data-name"):
        run(monkeypatch, "figure7", f"--out={tmp_path}", *TINY_FLAGS)


# ---------------------------------------------------------------- claims


def judged(out, *many, claim, depth=50):
    write(out, *many)
    (row,) = (row for row in claims_table(out).rows if claim in row[0] and row[1] == f"CIFAR-10, ResNet-{depth}")
    assert row[3].startswith("here: ")  # two epochs are not the paper's
    return row[3].removeprefix("here: "), row[4]


def three(curve, *values, depth=50):
    return [made(curve, [value / 2, value], depth=depth, seed=seed) for seed, value in enumerate(values)]


def test_what_was_not_measured_names_its_command(tmp_path):
    rows = claims_table(tmp_path).rows
    assert len(rows) == len(CLAIMS) == 18
    assert {row[3] for row in rows} == {"not measured yet"}
    assert {row[4] for row in rows} == {f"`python -m nfjax.reproduce {name} --data=DIR`" for name in _grids.GRIDS}


BATCH_NORM = (0.9, 0.901, 0.899)


@pytest.mark.parametrize(
    ("values", "held"),
    [
        ((0.95, 0.951, 0.949), "yes"),
        ((0.901, 0.902, 0.9), "yes"),  # a little above, and surely not a point below
        ((0.85, 0.851, 0.849), "no"),
        ((0.9, 0.93, 0.88), "undecided, points to yes"),
        ((0.9, 0.92, 0.87), "undecided, points to no"),
        ((0.99,), "undecided, points to yes"),
        ((0.91, 0.89), "undecided, points to yes"),
    ],
)
def test_convshort_against_batch_norm(tmp_path, values, held):
    many = [*three(BASELINE, *BATCH_NORM), *three(CONVSHORT, *values)]
    found, numbers = judged(tmp_path, *many, claim="reaches or passes")
    assert found == held
    assert f"{BASELINE} 90.00 ± 0.10 % (3); {CONVSHORT} " in numbers


def test_the_interval_is_welchs_when_test_images_are_many():
    one, other = _records.mean([0.91, 0.93, 0.95]), _records.mean([0.90, 0.905])
    expected = scipy.stats.ttest_ind([0.91, 0.93, 0.95], [0.90, 0.905], equal_var=False).confidence_interval(0.95)
    half = _intervals.half_width(one, other, images=10**12)
    assert one.mean - other.mean - half == pytest.approx(expected.low, rel=1e-4)
    assert one.mean - other.mean + half == pytest.approx(expected.high, rel=1e-4)


def test_the_interval_of_equal_seeds_is_that_of_the_test_images():
    one, other = _records.mean([0.9, 0.9]), _records.mean([0.8, 0.8])
    assert _intervals.half_width(one, other, 1000) == pytest.approx(1.96 * ((0.09 + 0.16) / 1000) ** 0.5, rel=1e-4)


def test_the_other_schemes_stay_below(tmp_path):
    many = [*three(BASELINE, *BATCH_NORM), *three(SCHEMES[1], 0.8, 0.801, 0.799)]
    assert judged(tmp_path, *many, claim="stay below")[0] == "yes (1 of 2 networks measured)"
    assert judged(tmp_path, *three(SCHEMES[2], 0.95, 0.951, 0.949), claim="stay below")[0] == (
        "IdShort yes; LearnScalar no"
    )


def test_which_networks_train(tmp_path):
    many = [*three(BASELINE, 0.9), *three(CONVSHORT, 0.9), *three(SCHEMES[1], 0.15)]
    assert judged(tmp_path, *many, claim="Every proposed")[0] == ("in 1 of 2 runs (2 of 3 networks measured, one seed)")


def test_what_does_not_train_is_held_against_the_same_scheme_that_does(tmp_path):
    many = [record for curve in (BASELINE, *SCHEMES) for record in three(curve, 0.9, 0.9)]
    fails = [made(BROCK[0], [], depth=50, diverged="at step 0", epochs=2, seed=seed) for seed in (0, 1)]
    held, numbers = judged(tmp_path, *many, *fails, *three(BROCK[1], 0.1, 0.12), claim="Brock")
    assert held == "yes (2 of 3 networks measured)"
    assert "ConvShort, Brock 2 of 2 diverged; IdShort, Brock 11.00" in numbers
    assert judged(tmp_path, *three(BROCK[2], 0.1, 0.9), claim="Brock")[0] == "in 5 of 6 runs"


def test_a_control_that_does_not_train_leaves_it_undecided(tmp_path):
    many = [*three(BASELINE, 0.4), *three(CONVSHORT, 0.19), *three(BROCK[0], 0.19)]
    assert judged(tmp_path, *many, claim="Brock")[0] == f"undecided: {CONVSHORT} does not train either"
    slow = [*three(BASELINE, 0.1), *three(CONVSHORT, 0.4)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for claim in ("reaches or passes", "more slowly"):
        assert judged(elsewhere, *slow, claim=claim)[0].startswith("undecided: BatchNorm does not train")
    assert judged(elsewhere, claim="Every proposed")[0] == f"undecided: {BASELINE} does not train either"


def test_runs_that_diverged_leave_a_comparison_undecided(tmp_path):
    many = [*three(BASELINE, *BATCH_NORM), *three(CONVSHORT, 0.95, 0.951)]
    diverged = made(CONVSHORT, [0.3], depth=50, seed=2, diverged="at step 30", epochs=2)
    held, numbers = judged(tmp_path, *many, diverged, claim="reaches or passes")
    assert held == "undecided, points to yes"
    assert numbers.endswith("95.05 ± 0.07 % (2), 1 of 3 diverged")
    assert judged(tmp_path, claim="Every proposed")[0] == "in 2 of 3 runs (1 of 3 networks measured)"


def test_at_18_layers_convshort_comes_second(tmp_path):
    others = [record for curve in SCHEMES[1:] for record in three(curve, 0.7, 0.701, 0.699, depth=18)]
    many = [*three(BASELINE, *BATCH_NORM, depth=18), *three(CONVSHORT, 0.8, 0.801, 0.799, depth=18), *others]
    claim = "comes second"
    assert judged(tmp_path, *many, claim=claim, depth=18)[0] == "yes (4 of 7 networks measured)"
    assert judged(tmp_path, *three(BROCK[0], 0.85, 0.8, 0.79, depth=18), claim=claim, depth=18)[0] == (
        "undecided, points to no (5 of 7 networks measured)"
    )
    assert judged(tmp_path, *three(BROCK[1], 0.85, 0.851, 0.849, depth=18), claim=claim, depth=18)[0] == (
        "no (6 of 7 networks measured)"
    )


def test_the_committed_claims_are_those_of_the_committed_runs():
    results = pathlib.Path(__file__).parent.parent / "results"
    assert (results / "claims.md").read_text() == claims_table(results).markdown()


def test_the_papers_settings_and_images_are_not_marked(tmp_path):
    values = [0.5] * 200
    pair = [dataclasses.replace(made(curve, values), data="CIFAR-10") for curve in (BASELINE, CONVSHORT)]
    write(tmp_path, *pair)
    table = claims_table(tmp_path)
    assert table.rows[0][2:4] == ["1", "yes (1 of 3 networks measured, one seed)"]
    assert table.note.startswith(
        "Runs 1: CIFAR-10, 50,000 training and 10,000 test images; the settings of the paper, and where it states none "
        "those of the configs. "
    )
    fewer = [dataclasses.replace(record, images=(20, 10), fingerprint="beef") for record in pair]
    write(tmp_path, *fewer)
    assert [row[2:4] for row in claims_table(tmp_path).rows[:2]] == [
        ["1", "yes (1 of 3 networks measured, one seed)"],
        ["2", "here: yes (1 of 3 networks measured, one seed)"],
    ]


def test_a_slow_start(tmp_path):
    many = [*three(BASELINE, 0.9, 0.901, 0.899), *three(CONVSHORT, 0.95, 0.951, 0.949)]
    held, numbers = judged(tmp_path, *many, claim="more slowly")
    assert held == "no (1 of 3 networks measured)"
    assert numbers.startswith(f"{BASELINE} 45.00 ± 0.05 % (3); {CONVSHORT} 47.50")
    assert numbers.endswith(" after epoch 1")


def test_imagenet_is_held_against_torchvision(tmp_path):
    write(tmp_path, made(CONVSHORT, [0.3, 0.7555], depth=50, dataset="ImageNet"))
    row = claims_table(tmp_path).rows[-1]
    assert row[3:] == ["here: yes (one seed)", f"{CONVSHORT} 75.55 % (1); torchvision 76.13 %"]
    write(tmp_path, made(CONVSHORT, [0.3], depth=50, dataset="ImageNet", seed=1, diverged="at step 9", epochs=2))
    assert claims_table(tmp_path).rows[-1][3] == "here: undecided, points to yes"


# ---------------------------------------------------------------- training, and the command


@pytest.fixture
def tiny_grid(monkeypatch):
    """A figure of two networks that are the same program, on made-up images."""
    cells = tuple(Cell(TINY, curve, curve) for curve in (CONVSHORT, BROCK[0]))
    monkeypatch.setitem(reproduce.TRAINED, "figure7", lambda request: Grid("Tiny", "CIFAR-10", cells))


@contextlib.contextmanager
def compilations():
    """Yields a list that gets how many programs were compiled within, and not read from those that are kept."""
    events, found = collections.Counter(), []

    def listen(event, **details):
        events[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listen)
    found.append(events["compile_requests_use_cache"] - events["cache_hits"])
    assert events["compile_requests_use_cache"] > 0


@pytest.fixture
def _all_is_kept():
    """Of what is compiled, however short it takes."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation.forget()  # what other tests have left in the process, and not on the disk
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.mark.usefixtures("_all_is_kept")
def test_a_grid_is_trained_once_resumed_and_compiled_once(tiny_grid, monkeypatch, tmp_path, capsys):
    flags = ["figure7", f"--out={tmp_path}", f"--runs={tmp_path / 'runs'}", *TINY_FLAGS]
    started, real = [], train.train

    def one(config, workdir, more):
        started.append(workdir)
        if len(started) == 2:
            raise preemption.TrainingInterruptedError("interrupted: saved")
        return real(config, workdir, more)

    monkeypatch.setattr(train, "train", one)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *flags, "--seeds=1")
    assert stopped.value.code == 130
    assert [record.curve for record in _records.read(tmp_path)] == [CONVSHORT]
    assert f"Missing: seed 0 of {BROCK[0]}." in capsys.readouterr().out  # what is there was drawn

    with compilations() as compiled:
        run(monkeypatch, *flags, "--seeds=2")
    assert started[1] == started[2]
    assert len(started) == 5
    assert compiled == [0]  # another initialization, another seed: the same programs
    found = _records.read(tmp_path)
    assert [(record.curve, record.seed) for record in found] == [
        (CONVSHORT, 0), (BROCK[0], 0), (CONVSHORT, 1), (BROCK[0], 1),
    ]  # fmt: skip
    assert len({record.final("train_loss") for record in found}) == 4
    (record,) = (record for record in found if (record.curve, record.seed) == (BROCK[0], 1))
    assert record.images == [256, 62]
    assert record.seconds > 0
    written = json.loads((tmp_path / _records.FILE).read_text().splitlines()[0])
    assert written["starts"][0]["packages"]["jax"] == jax.__version__

    before = (tmp_path / _records.FILE).read_text()
    monkeypatch.setattr(train, "train", None)  # nothing is left to train
    run(monkeypatch, *flags, "--seeds=2")
    assert (tmp_path / _records.FILE).read_text() == before
    with pytest.raises(SystemExit, match="runs on these images under the name 'made-up'"):
        run(monkeypatch, *flags, "--data-name=other", "--seeds=3")


def test_a_run_that_diverges_is_a_result(tiny_grid, monkeypatch, tmp_path, capsys):
    flags = ["figure7", f"--out={tmp_path}", f"--runs={tmp_path / 'runs'}", *TINY_FLAGS]

    def diverging(config, workdir, more):
        pathlib.Path(workdir).mkdir(parents=True)
        (pathlib.Path(workdir) / "versions.json").write_text(json.dumps([START]))
        raise train.TrainingDivergedError("at step 3 the loss is nan; no checkpoint was saved yet. Try a smaller one")

    monkeypatch.setattr(train, "train", diverging)
    run(monkeypatch, *flags, "--seeds=1")
    first, second = _records.read(tmp_path)
    assert first.diverged == "at step 3 the loss is nan"
    assert (first.epochs["test_accuracy"], second.epochs["test_accuracy"]) == ([], [])
    assert "1, after epoch 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["table2", "--seeds=3"],
            "--seeds: only figure3, .*ablations, rules, very_deep, mended are trained; table2 is not",
        ),
        (["figure7", "--seeds=0"], "--seeds=0 must be positive"),
        (
            ["figure7", "--config.model.wdth=8"],
            "unknown config field 'model.wdth': config.model has arguments, block, depth, .*width",
        ),
        (["figure7", "--config.model.width=wide"], "wide"),
        (["figure7", "--config.model.depth=50"], "model.depth is not for you to choose here"),
        (["figure7", "--config.log.evaluate_every_epochs=5"], "the figures show every epoch"),
        (["figure7", "--width=8"], "unknown argument '--width=8': settings are flags such as --config.model.width=8"),
        (["figure4", "--data=x", "--config.data.source=synthetic"], "10 classes, expected the 100 of CIFAR-100"),
        (["figure7"], "no run of Figure 7"),
        (["figure7", "--sedes=2"], "unknown argument '--sedes=2': did you mean --seeds"),
        (["figure7", "-seeds=2"], "did you mean --seeds"),
        (["figure7", "--config.model=8"], "--config.model=8: model has fields of its own, arguments, block, depth, "),
        (["figure7", "--config.model.width=wide"], "--config.model.width=wide: expected a value of the kind of 64"),
        (["ablations", "--config.epochs=abc"], "--config.epochs=abc: expected a value of the kind of 200"),
        (["ablations", "--config.epochs=none"], "--config.epochs=none: expected a value, such as 200"),
        (["figure7", "--epochs=3", "--config.epochs=2"], "--epochs is short for --config.epochs: give one of them"),
        (["figure7", "--data=nowhere", "--epochs=0"], "epochs=0 must be positive"),
        (["figure7", "--data="], "--data is empty"),
        (["figure7", "--data=/"], "--data=/ has no name: say what the images are called with --data-name"),
        (["claims", "--runs=elsewhere"], "--runs: only figure3, .* are trained; claims is not"),
    ],
)
def test_wrong_arguments_are_explained(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *arguments, f"--out={tmp_path}")
