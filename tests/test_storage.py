"""Files are written in full or not at all, and what is read from them is checked and named."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Annotated

import msgspec
import pytest
from etils import epath

from nfjax import storage


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    count: Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class Whole:
    parts: list[Part]
    rate: float = 1.0


DAMAGED = {
    "empty": (b"", "is empty: expected a JSON object"),
    "blank": (b" \n", "is empty"),
    "binary": (b"\x00\xff\xfe", "byte 1 is no UTF-8 text"),
    "cut": (b'{"parts": [{"name": "a",', "line 1, column 25"),
    "another line": (b'{\n"parts": [,]}', "line 2, column 11"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "a number": (b"5", "Expected `object`, got `int`"),
    "null": (b"null", "Expected `object`, got `null`"),
    "a field missing": (b"{}", "missing required field `parts`"),
    "another type": (b'{"parts": [{"name": 5, "count": 1}]}', r"Expected `str`, got `int` - at `\$.parts\[0\].name`"),
    "below zero": (b'{"parts": [{"name": "a", "count": -1}]}', r"Expected `int` >= 0 - at `\$.parts\[0\].count`"),
    "true for a number": (b'{"parts": [{"name": "a", "count": true}]}', "Expected `int`, got `bool`"),
    "too many digits": (b'{"parts": [], "rate": ' + b"9" * 5000 + b"}", "is damaged: "),
    "nested without end": (b"[" * 100_000, "is damaged: JSON nested too deeply"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_json_is_named_with_place_expectation_and_way_out(tmp_path, kind):
    data, message = DAMAGED[kind]
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(storage.DamagedFileError, match=message) as raised:
        storage.read_json(path, Whole, "make it again")
    assert str(path) in str(raised.value)
    assert str(raised.value).endswith("; make it again")


def test_json_comes_back_as_the_type_that_was_asked_for(tmp_path):
    path = tmp_path / "x.json"
    storage.write_json(path, {"parts": [{"name": "ä", "count": 2}], "rate": math.inf})
    assert storage.read_json(path, Whole, "") == Whole([Part("ä", 2)], math.inf)
    assert storage.read_json(path, dict, "")["parts"] == [{"name": "ä", "count": 2}]
    path.write_text('{"parts": [], "rate": NaN}')
    assert math.isnan(storage.read_json(path, Whole, "").rate)


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    storage.write_json(path, [1])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"{path} cannot be written \(No space left on device\)") as raised:
        storage.write_json(path, [2] * 1000)
    assert raised.value.errno == 28
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["x.json"]


def test_what_a_kill_left_of_a_write_is_replaced_by_the_next(tmp_path):
    (tmp_path / ".x.txt.part").write_text("half of")
    storage.write_text(tmp_path / "x.txt", "whole \udcff")
    assert (tmp_path / "x.txt").read_text() == "whole \\udcff"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_what_is_set_aside_never_replaces_what_was_set_aside_before(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "x").write_text(str(number))
        storage.set_aside(tmp_path / "x", "damaged")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.damaged": "1",
        "x.damaged2": "2",
        "x.damaged3": "3",
    }


@pytest.mark.parametrize("name", ["a", "train-00001.array_record", "ä ö.jpg", "..a", "a" * 255])
def test_plain_names_pass(name):
    assert storage.plain_name(name, "m.json") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "C:x", "a\0", "a\n", "\x1b[2J", "a" * 256, 5, None]
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(storage.DamagedFileError, match=r"m\.json names the file .* expected a plain name"):
        storage.plain_name(name, "m.json")


def test_pipes_and_folders_are_no_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    assert storage.regular_file(tmp_path / "file")
    assert not any(storage.regular_file(tmp_path / name) for name in ("pipe", ".", "missing"))


@pytest.mark.parametrize("kind", [pathlib.Path, epath.Path])
def test_what_would_never_end_is_not_read(tmp_path, monkeypatch, kind):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_text("[1, 2, 3]")
    with pytest.raises(storage.DamagedFileError, match=r"pipe\.json is a pipe or a device.*; look elsewhere"):
        storage.read_json(kind(tmp_path / "pipe.json"), list, "look elsewhere")
    assert storage.read_json(kind(tmp_path / "large.json"), list, "") == [1, 2, 3]
    monkeypatch.setattr(storage, "LARGEST", 8)
    with pytest.raises(storage.DamagedFileError, match=r"large\.json has 9 bytes: expected at most 8; look elsewhere"):
        storage.read_json(kind(tmp_path / "large.json"), list, "look elsewhere")


def test_a_file_written_in_pieces_is_there_when_it_is_whole(tmp_path):
    path, victim = tmp_path / "x", tmp_path / "victim"
    path.write_text("before")
    victim.write_text("mine")
    (tmp_path / ".x.part").symlink_to(victim)  # somebody hopes that it is followed

    def interrupted():
        with storage.replacing(path) as part:
            part.write_text("half of")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text() == "before"
    (tmp_path / ".x.part").symlink_to(victim)
    with storage.replacing(path) as part:
        part.write_text("whole")
        assert path.read_text() == "before"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"x": "whole", "victim": "mine"}


def test_tables_and_pictures(tmp_path):
    from matplotlib.figure import Figure

    storage.write_csv(tmp_path / "x.csv", [["a", "b, c"], [1, 0.5], ["ä", 'say "x"']])
    assert (tmp_path / "x.csv").read_bytes() == 'a,"b, c"\n1,0.5\nä,"say ""x"""\n'.encode()
    for name, start in (("x.png", b"\x89PNG"), ("x.pdf", b"%PDF")):
        storage.write_figure(tmp_path / name, Figure(figsize=(1, 1)), dpi=10)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert sorted(os.listdir(tmp_path)) == ["x.csv", "x.pdf", "x.png"]
