"""What a run has skipped: what can be read of a damaged list is used."""

import json

import pytest

from nfjax.data.loading import skips

GOOD = {"split": "train", "name": "a.jpg", "cause": "truncated", "detail": "at the end"}
DAMAGED = {
    "empty": (b"", "is empty: expected a JSON object"),
    "binary": (b"\x00\xff", "byte 1 is no UTF-8 text"),
    "cut": (b'{"split": "tra', r"is damaged at line 1, column 11: expected JSON"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "nothing": (b"{}", "missing required field `split`"),
    "a number": (b"5", "Expected `object`, got `int`"),
    "another type": (b'{"split": "train", "name": 5, "cause": ""}', "Expected `str`, got `int` - at `$.name`"),
    "a list for a split": (b'{"split": [], "name": "a", "cause": ""}', "Expected `str`, got `array`"),
}


@pytest.fixture
def warnings(monkeypatch):
    warnings = []
    monkeypatch.setattr(skips.logging, "warning", lambda text, *args: warnings.append(text % args))
    return warnings


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_left_out_and_named(tmp_path, warnings, kind):
    line, message = DAMAGED[kind]
    other = GOOD | {"split": "test", "name": "b.jpg"}
    path = tmp_path / skips.FILE
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), line, json.dumps(other).encode(), b""]))
    assert skips.read(tmp_path) == {"a.jpg": "truncated", "b.jpg": "truncated"}
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path}, line 2 ")
    assert message in warnings[0]
    assert warnings[0].endswith("; it is left out")
    assert skips.read(tmp_path, "test") == {"b.jpg": "truncated"}


def test_many_damaged_lines_are_one_warning(tmp_path, warnings):
    (tmp_path / skips.FILE).write_bytes(b"\x00\n" * 1000)
    assert skips.read(tmp_path) == {}
    assert len(warnings) == 1
    assert warnings[0].endswith("; it is left out, as are 999 more")


def test_a_run_goes_on_with_a_damaged_list(tmp_path, warnings):
    path = tmp_path / skips.FILE
    path.write_bytes(b"\x00\xff\n" + json.dumps(GOOD).encode() + b"\n" + b'{"split": "tr')
    found = skips.Skips("train", ["a.jpg", "b.jpg"].__getitem__, 2, 1.0, tmp_path)
    for index in (0, 1, 1):
        found(index, "truncated", "")
    assert [json.loads(line)["name"] for line in path.read_bytes().splitlines()[1:]] == ["a.jpg", "b.jpg"]


def test_names_cannot_speak_to_the_terminal(tmp_path, warnings):
    names = ["\x1b[2Jä.jpg", "a\nb.jpg", b"\xff\x1b.jpg", "plain ä.jpg"]
    for _ in range(2):
        found = skips.Skips("train", names.__getitem__, 4, 1.0, tmp_path)
        for index in range(4):
            found(index, "truncated", "")
    assert list(skips.read(tmp_path)) == [r"\x1b[2Jä.jpg", r"a\nb.jpg", r"\xff\x1b.jpg", "plain ä.jpg"]
    assert len((tmp_path / skips.FILE).read_text().splitlines()) == 4
    (tmp_path / skips.FILE).write_text(json.dumps(GOOD | {"name": "\x1b\ud800", "cause": "\x1b"}) + "\n")
    assert skips.read(tmp_path) == {r"\x1b\ud800": r"\x1b"}
    assert warnings == []
