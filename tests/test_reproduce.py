import csv
import sys

import pytest

from nfjax.reproduce import __main__ as command
from nfjax.reproduce import cost_table


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
