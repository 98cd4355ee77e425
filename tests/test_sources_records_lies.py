"""Packed data that lies: nothing is written or read outside of its folder, and no number is believed unseen."""

import fcntl
import json
import os
import pathlib

import numpy as np
import pytest
from fake_bucket import bucket  # noqa: F401

from nfjax.data import remote
from nfjax.data.packing import pack, shards
from nfjax.data.sources import array_records, records
from nfjax.data.splits import Dataset, Images

FIRST = "train-00000-of-00002.array_record"
ELSEWHERE = [
    "../../../../victim",
    "../victim",
    "a/b.array_record",
    "..\\victim",
    "C:victim",
    "..",
    ".",
    "",
    "\x1b[2J.array_record",
    "x\n.array_record",
    "x\0.array_record",
    "x" * 256,
]
OTHER = [
    "manifest.json",
    ".lock",
    "packing.json",
    "train-00001-of-00002.array_record",  # twice
    "train-00000-of-00003.array_record",
    "test-00000-of-00001.array_record",
    "x[0].array_record",
]


def made():
    images = Images(np.arange(5 * 192, dtype=np.uint16).reshape(5, 8, 8, 3).astype(np.uint8), np.arange(5) % 2)
    return Dataset(images, images, ("ant", "bee"))


def packed(out):
    """(the manifest's fields, a function that writes them back) of 5 + 5 images in shards of 3 and 2."""
    pack.pack(made(), str(out), per_shard=3)
    file = pathlib.Path(str(out).replace("gs://bucket", str(out))) / "manifest.json"
    return json.loads(file.read_text()), lambda fields: file.write_text(json.dumps(fields))


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", [*ELSEWHERE, *OTHER, "/etc/passwd"])
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_copied(tmp_path, bucket, name):  # noqa: F811
    fields, write = packed(bucket / "packed")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (bucket / "victim").write_text("theirs")
    fields["shards"]["train"][0] |= {"file": name, "bytes": 6}
    fields["shards"]["train"][0]["count"] = 3
    write(fields)
    before = below(tmp_path)
    for directory in ("gs://bucket/packed", str(bucket / "packed")):
        expected = "expected a plain name" if name in (*ELSEWHERE, "/etc/passwd") else f"expected {FIRST}; pack again"
        with pytest.raises(ValueError, match=expected) as raised:
            records.load(directory)
        assert str(raised.value).startswith(f"{directory}/manifest.json names the file ")
        assert str(raised.value).isprintable()
    assert below(tmp_path) == before
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_copy_keeps_to_its_folder_whoever_asks_for_it(tmp_path, bucket, name):  # noqa: F811
    before = below(tmp_path)
    with pytest.raises(ValueError, match="expected a plain name"):
        remote.mirror("gs://bucket/packed", {name: 1}, "1")
    with pytest.raises(ValueError, match=r"names the file '\.lock': expected one that is not hidden"):
        remote.mirror("gs://bucket/packed", {".lock": 1}, "1")
    assert below(tmp_path) == before


def test_links_are_followed_to_read_and_never_to_write(tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    packed(out)
    elsewhere = (out / FIRST).rename(tmp_path / "elsewhere")  # as on a machine with two disks
    (out / FIRST).symlink_to(elsewhere)
    assert records.load(str(out)).train.reader(0)[1] == 0
    victim.write_text("mine")
    for name in (f".{FIRST}.part", FIRST):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(victim)
    pack.pack(made(), str(out), per_shard=3)  # packs the shard again that has another size
    assert victim.read_text() == "mine"
    assert pack.verify(str(out)) == 10
    assert not (out / FIRST).is_symlink()


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(tmp_path, put):
    packed(tmp_path)
    (tmp_path / FIRST).unlink()
    put(tmp_path / FIRST)
    for read in (records.load, pack.verify):
        with pytest.raises(ValueError, match=f"{FIRST} is a folder, a pipe or a device: expected a shard; copy it ag"):
            read(str(tmp_path))
    (tmp_path / FIRST).rename(tmp_path / "elsewhere")
    for read in (records.load, pack.verify):
        with pytest.raises(FileNotFoundError, match=f"lacks the shard {FIRST} that its manifest.json lists: copy it"):
            read(str(tmp_path))


def test_names_of_classes_cannot_speak_to_the_terminal(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(records.logging, "warning", lambda text, *args: warnings.append(text % args))
    fields, write = packed(tmp_path)
    labels = [3, 2, 0, 0, 0]
    names = ["ant", "bee", "\x1b[2J", "ä", "\udcff"]
    write(fields | {"class_names": names, "labels": {"train": labels, "test": labels}})
    assert records.load(str(tmp_path)).class_names == tuple(names)
    assert warnings == [
        rf"{tmp_path} {split} has no example of 3 classes: '\x1b[2J', ä, '\udcff'" for split in ("train", "test")
    ]


@pytest.mark.parametrize("label", [True, 1.0, None, "1", -1, 2])
def test_a_label_is_a_number_of_a_class(label):
    array_records.check_label(1, 2, lambda: "record 0")
    with pytest.raises(ValueError, match=r"record 0 has the label .*: expected 0 to 1"):
        array_records.check_label(label, 2, lambda: "record 0")


# ---------------------------------------------------------------- numbers


def shard(**changes):
    return lambda fields: fields["shards"]["train"][0].update(changes)


def changed(**changes):
    return lambda fields: fields.update(changes)


def labels(*counts):
    return lambda fields: fields["labels"].update(train=list(counts))


def more_records(fields):
    fields["shards"]["train"][0]["count"] += 1
    fields["labels"]["train"][0] += 1


def fewer_records(fields):
    fields["shards"]["train"][0]["count"] -= 1
    fields["labels"]["train"][0] -= 1


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (shard(count=-3), r"Expected `int` >= 0 - at `\$\.shards\[\.\.\.\]\[0\]\.count`; pack the data again"),
        (shard(bytes=-1), r"Expected `int` >= 0 - at `\$\.shards\[\.\.\.\]\[0\]\.bytes`"),
        (shard(bytes=10**30), r"has \d+ bytes where manifest\.json says 10{30}: copy it again, or pack again"),
        (shard(count=10**12, bytes=10**6), r"holds 1,000,000,000,000 records in 1,000,000 bytes; pack again"),
        (shard(count="3"), "Expected `int`, got `str`"),
        (shard(count=3.5), "Expected `int`, got `float`"),
        (shard(count=True), "Expected `int`, got `bool`"),
        (shard(sha256="0"), r"Expected `str` matching regex .* - at `\$\.shards\[\.\.\.\]\[0\]\.sha256`"),
        (shard(file=5), "Expected `str`, got `int`"),
        (more_records, rf"{FIRST} holds 3 records where the metadata beside it says 4; copy it again, or pack"),
        (fewer_records, rf"{FIRST} holds 3 records where the metadata beside it says 2; copy it again, or pack"),
        (shard(count=2), "counts 5 labels of 2 classes in train: expected 4, as its shards hold, of 2; pack again"),
        (labels(3, -1, 3), r"Expected `int` >= 0 - at `\$\.labels\[\.\.\.\]\[1\]`"),
        (labels(3, 2, 0), "counts 5 labels of 3 classes in train: expected 5, as its shards hold, of 2; pack again"),
        (labels(5), "counts 5 labels of 1 classes in train"),
        (labels(3, 1), "counts 4 labels of 2 classes in train"),
        (changed(class_names=[]), "names nothing as a class: expected one or more, each with a name of its own"),
        (changed(class_names=["a", "a"]), "names 'a', 2 times, as a class: expected"),
        (changed(class_names=["a", ""]), "names '', 1 times, as a class: expected"),
        (changed(class_names=["a", 5]), "Expected `str`, got `int`"),
        (changed(class_names="ant"), "Expected `array`, got `str`"),
        (changed(class_names=["ant", "bee", "cat"]), "counts 5 labels of 2 classes in train: expected 5, .* of 3"),
        (changed(shards={}), "lacks the split train; pack again"),
        (changed(labels={"train": [3, 2]}), "lacks the split test; pack again"),
        (changed(skipped=[]), "Expected `object`, got `array`"),
        (changed(skipped={"train": {}}), "lacks the split test"),
        (changed(settings=5), "Expected `object`, got `int`"),
        (changed(version="1"), "has format version '1', this nfjax reads version 1"),
    ],
)
def test_numbers_that_contradict_each_other_or_the_files(tmp_path, lie, message):
    fields, write = packed(tmp_path)
    lie(fields)
    write(fields)
    with pytest.raises(ValueError, match=message) as raised:
        records.load(str(tmp_path))
    assert str(raised.value).startswith(str(tmp_path))
    if "holds 3 records" in message:
        with pytest.raises(ValueError, match=message):
            pack.verify(str(tmp_path))


DAMAGED = {
    "empty": (b"", "it is empty: expected a JSON object"),
    "binary": (b"\x00\xff", "byte 1 is no UTF-8 text, expected JSON"),
    "cut": (b'{"version": 1, "sha', r"it is damaged at line 1, column 16: expected JSON"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "nothing": (b"{}", "missing required field `version`"),
    "a number": (b"5", "Expected `object`, got `int`"),
    "no numbers of ours": (b'{"version": NaN}', "has format version nan, this nfjax reads version 1"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_manifest_is_named_with_place_expectation_and_way_out(tmp_path, kind):
    data, message = DAMAGED[kind]
    packed(tmp_path)
    (tmp_path / "manifest.json").write_bytes(data)
    for read in (records.load, pack.verify, lambda out: pack.pack(made(), out, per_shard=3)):
        with pytest.raises(ValueError, match=message) as raised:
            read(str(tmp_path))
        assert str(raised.value).startswith(f"{tmp_path}/manifest.json ")
        assert str(raised.value).endswith(("pack the data again", "pack again"))


def test_sizes_that_the_bucket_does_not_have_are_found_before_the_copy(bucket, monkeypatch):  # noqa: F811
    fields, write = packed(bucket / "packed")
    monkeypatch.setattr(remote, "_copy_one", lambda *args: pytest.fail("copied"))
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: remote.shutil._ntuple_diskusage(0, 0, 1 << 60))
    fields["shards"]["train"][1]["bytes"] = 10 * 10**12
    write(fields)
    with pytest.raises(OSError, match=r"train-00001-of-00002\.array_record has \d+ bytes instead of 10000000000000"):
        records.load("gs://bucket/packed")


def test_a_file_that_grows_while_it_is_copied_does_not_fill_the_disk(bucket, monkeypatch):  # noqa: F811
    (bucket / "endless").write_bytes(b"x" * 100)
    monkeypatch.setattr(remote, "BLOCK", 1)
    monkeypatch.setattr(remote, "_check_sizes", lambda *args: None)
    with pytest.raises(OSError, match="endless has 11 bytes instead of 10"):
        remote.mirror("gs://bucket", {"endless": 10}, "1")


def test_what_a_kill_left_of_a_copy_does_not_stay_for_ever(tmp_path, bucket):  # noqa: F811
    (bucket / "x").write_bytes(b"x" * 10)
    local = pathlib.Path(remote.mirror("gs://bucket", {"x": 10}, "1"))
    for name in ("x.4711.part", ".x.part"):
        (local / name).write_bytes(b"half of")
    assert remote.mirror("gs://bucket", {"x": 10}, "1") == str(local)
    assert sorted(os.listdir(local)) == [".lock", "x"]


# ---------------------------------------------------------------- an unfinished pack


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A pack that was interrupted at its third shard, and the names of those that are written from now on."""
    write, written = shards.write, []

    def dies(file, examples, bar):
        if file.name.startswith("test"):
            raise KeyboardInterrupt
        return write(file, examples, bar)

    monkeypatch.setattr(shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(made(), str(tmp_path / "out"), per_shard=3)
    monkeypatch.setattr(shards, "write", lambda file, *args: written.append(file.name) or write(file, *args))
    warnings = []
    monkeypatch.setattr(pack.logging, "warning", lambda text, *args: warnings.append(text % args))
    return tmp_path / "out", written, warnings


def finish(out):
    manifest = pack.pack(made(), str(out), per_shard=3, verify_after=True)
    assert set(os.listdir(out)) == {shard.file for split in manifest.shards.values() for shard in split} | {
        "manifest.json"
    }
    return manifest


NOTES = {name: data for name, (data, _) in DAMAGED.items()} | {
    "of another shard": b'{"shard": {"file": "x", "count": 0, "bytes": 0, "sha256": "%s"}, "labels": [], "skipped": {}}'
    % (b"0" * 64),
    "another type": b'{"shard": 5, "labels": [], "skipped": {}}',
}


@pytest.mark.parametrize("kind", NOTES)
def test_a_shard_with_a_damaged_note_is_packed_again(tmp_path, unfinished, kind):
    out, written, warnings = unfinished
    (out / f"{FIRST}.json").write_bytes(NOTES[kind])
    assert finish(out) == pack.pack(made(), str(tmp_path / "whole"), per_shard=3)
    assert written[:3] == [FIRST, "test-00000-of-00002.array_record", "test-00001-of-00002.array_record"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{out / FIRST}.json ")
    assert warnings[0].endswith("; the shard is packed again")


@pytest.mark.parametrize("change", [{"labels": [0, 1, 7]}, {"labels": [0, 1]}, {"labels": [0, 1, -1]}])
def test_a_note_with_wrong_labels_is_not_believed(unfinished, change):
    out, written, warnings = unfinished
    note = json.loads((out / f"{FIRST}.json").read_text())
    (out / f"{FIRST}.json").write_text(json.dumps(note | change))
    assert finish(out).labels["train"] == (3, 2)
    assert FIRST in written
    assert len(warnings) == 1


@pytest.mark.parametrize("kind", DAMAGED)
def test_an_unfinished_pack_whose_settings_are_damaged_begins_anew(unfinished, kind):
    out, written, warnings = unfinished
    (out / pack.STATE).write_bytes(DAMAGED[kind][0])
    finish(out)
    assert len(written) == 4
    assert warnings[0].startswith(f"{out / pack.STATE} ")
    assert warnings[0].endswith("; packing begins anew")


def test_a_folder_with_something_else_is_not_packed_over(tmp_path):
    for name, content in ((pack.STATE, "[]"), (FIRST, "of somebody else"), ("thesis.tex", "")):
        (tmp_path / name).write_text(content)
    with pytest.raises(
        FileExistsError, match=r"holds 'thesis\.tex' and a packing\.json that is none of a pack: choose"
    ):
        pack.pack(made(), str(tmp_path))
    assert (tmp_path / FIRST).read_text() == "of somebody else"
    assert (tmp_path / pack.STATE).read_text() == "[]"


def test_a_pack_that_was_killed_before_it_wrote_its_settings_goes_on(tmp_path):
    (tmp_path / pack.LOCK).touch()
    finish(tmp_path)


def test_a_full_disk_leaves_no_half_of_a_shard_or_manifest(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    pack.pack(made(), str(tmp_path / "whole"), per_shard=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            pack.pack(made(), str(tmp_path / "out"), per_shard=3)
        assert below(tmp_path / "out") == [pack.LOCK]
    finish(tmp_path / "out")


def test_a_lock_that_was_removed_after_it_was_opened_is_made_anew(tmp_path, monkeypatch):
    path, flock = tmp_path / pack.LOCK, fcntl.flock

    def late(lock, operation):
        flock(lock, operation)
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # by the process that held it until now

    monkeypatch.setattr(fcntl, "flock", late)
    with pack._lock(path) as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), path.stat())
        with pytest.raises(FileExistsError, match="another process is packing to"):
            pack._lock(path)
