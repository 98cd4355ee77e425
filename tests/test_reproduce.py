import csv
import sys

import numpy as np
import pytest

from nfjax.reproduce import __main__ as command
from nfjax.reproduce import cost_table, propagation_figure
from nfjax.reproduce._signal import CURVES
from tests.conftest import TINY


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
    command.main()


def test_table2(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "table2", f"--out={tmp_path}")
    printed = capsys.readouterr().out
    assert printed.count(" yes ") == 4
    assert "NO" not in printed
    rows = list(csv.DictReader((tmp_path / "table2.csv").read_text().splitlines()))
    assert [row["params (M), ours"] for row in rows] == ["11.52", "11.16", "11.16", "11.52"]
    assert rows[1]["FLOPs (G), paper"] == rows[1]["FLOPs (G), ours"] == "1.12"
    assert (rows[0]["parameters, all"], rows[0]["multiply-accumulates"]) == ("11524426", "576394240")
    markdown = (tmp_path / "table2.md").read_text()
    assert (
        "| ResNet-18 ConvShort | 11.52 | 11.52 | 1.16 | 1.16 | yes | 11,516,618 | 576,394,240 | 1,152,788,480 |"
        in markdown
    )


def test_disagreement_is_shown():
    table = cost_table("wrong", {(18, "IdShort"): (11.17, 1.12)})
    assert table.rows[0][5] == "NO"


def test_unknown_name_lists_the_right_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "table3")
    assert "table1" in capsys.readouterr().err


def test_a_propagation_figure_is_measured_and_written(monkeypatch, tmp_path):
    curves = {name: CURVES[name] for name in ("IdShort, He fan-out", "ConvShort, effective fan-out")}
    figure = propagation_figure("Figure", (TINY,), curves=curves, seeds=2, batch=4, image_size=8, width=4)
    written = figure.write(tmp_path / "figure")
    assert [path.name for path in written] == ["figure.md", f"figure_resnet{TINY}.png", f"figure_resnet{TINY}.csv"]
    rows = list(csv.DictReader(written[2].read_text().splitlines()))
    assert len(rows) == 2 * 2 * 4
    profile = figure.profiles[TINY]["IdShort, He fan-out"]
    assert float(rows[0]["backward_var"]) == pytest.approx(profile.samples["backward_var"][0, 0], rel=1e-6)
    ratios = profile.samples["backward_var"][:, 0] / profile.samples["backward_var"][:, -1]
    assert f"{np.median(ratios):.3g} [{ratios.min():.3g}, {ratios.max():.3g}]" in written[0].read_text()
    row = figure.table().rows[0]
    within, across = float(row[5]), float(row[6])
    assert within * across == pytest.approx(profile.diagnose().backward.total, rel=0.02)
