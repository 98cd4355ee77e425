"""Metadata of tfds that lies: nothing is imported for it, nothing is read outside of its folder."""

import json
import os
import shutil
import sys

import pytest
from fake_bucket import bucket  # noqa: F401
from test_sources_tfds import make_set

from nfjax.data.sources import tfds


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def made(tmp_path, original):
    """The folder of a prepared set of 10 + 3 images that the test may change."""
    return shutil.copytree(original, tmp_path / "small" / "1.0.0")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that writes a file when it is imported, and that file."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "nfjax_evil.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield "nfjax_evil", tmp_path / "harmed"
    sys.modules.pop("nfjax_evil", None)


def changed(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def of_text(**to):
    """Replaces the feature "file_name"."""

    def change(content):
        content["featuresDict"]["features"]["file_name"] = to

    return change


def legacy(content):
    feature = {"type": "nfjax_evil.Text", "content": {}}
    content.clear()
    content.update(type="tensorflow_datasets.core.features.features_dict.FeaturesDict", content={"text": feature})


LIES = {
    "a feature": ("features.json", of_text(pythonClassName="nfjax_evil.Text", text={})),
    "as protobuf names it": ("features.json", of_text(python_class_name="nfjax_evil.Text", text={})),
    "as it was called": ("features.json", legacy),
    "JSON within JSON": (
        "features.json",
        of_text(
            pythonClassName="tensorflow_datasets.core.features.sequence_feature.Sequence",
            jsonFeature={"json": json.dumps({"feature": {"type": "nfjax_evil.Text", "content": {}}})},
        ),
    ),
    "features elsewhere": (
        "dataset_info.json",
        lambda content: content.update(features={"pythonClassName": "nfjax_evil.Text", "text": {}}),
    ),
    "a path that ends well": (
        "features.json",
        of_text(pythonClassName="nfjax_evil.tensorflow_datasets.core.features.x"),
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_no_module_is_imported_for_metadata(tmp_path, made, module, kind):
    name, change = LIES[kind]
    changed(made / name, change)
    with pytest.raises(ValueError, match=rf"{made / name} names the Python class 'nfjax_evil\..*: expected one of"):
        tfds.load("small", str(tmp_path))
    assert not module[1].exists()
    assert module[0] not in sys.modules


@pytest.mark.parametrize("name", ["small", "small:1.0.0", "small:1.*.*"])
def test_no_version_is_overlooked(tmp_path, made, module, name):
    changed(made / "features.json", LIES["a feature"][1])
    with pytest.raises(ValueError, match="names the Python class"):
        tfds.load(name, str(tmp_path))
    made.parent.rename(tmp_path / "config")
    (tmp_path / "small").mkdir()
    (tmp_path / "config").rename(tmp_path / "small" / "config")
    with pytest.raises(ValueError, match="names the Python class"):
        tfds.load("small/config:1.0.0", str(tmp_path))
    assert not module[1].exists()


def test_a_bucket_is_looked_at_before_it_is_believed(tmp_path, original, module, bucket):  # noqa: F811
    changed(shutil.copytree(original, bucket / "sets" / "small" / "1.0.0") / "features.json", LIES["a feature"][1])
    with pytest.raises(ValueError, match=r"gs://bucket/sets/small/1\.0\.0/features\.json names the Python class"):
        tfds.load("small", "gs://bucket/sets")
    assert not module[1].exists()


DAMAGED = {
    "empty": (b"", "is empty: expected a JSON object"),
    "binary": (b"\x00\xff", "byte 1 is no UTF-8 text"),
    "cut": (b'{"description": "ma', "is damaged at line 1, column 17: expected JSON"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "a number": (b"5", "Expected `object`, got `int`"),
    "nested without end": (b'{"a":' * 100_000, "is damaged: JSON nested too deeply"),
    "nothing": (b"{}", "cannot be read by tfds"),
    "another type": (b'{"splits": 5, "featuresDict": 5}', "cannot be read by tfds"),
}


@pytest.mark.parametrize("name", tfds.METADATA)
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_metadata_is_named_with_the_way_out(tmp_path, made, name, kind):
    data, message = DAMAGED[kind]
    (made / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        tfds.load("small", str(tmp_path))
    assert str(made / name if "tfds" not in message else tmp_path) in str(raised.value)
    assert str(raised.value).endswith("copy it again, or prepare it again")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (b"ant\nbee\n", "names 2 classes, 2 of them different: expected the 3 of features.json"),
        (b"ant\nbee\ncat\ndog\n", "names 4 classes, 4 of them different: expected the 3 of features.json"),
        (b"ant\nbee\nbee\n", "names 3 classes, 2 of them different: expected the 3 of features.json"),
        (b"", "names 0 classes, 0 of them different: expected the 3 of features.json"),
        (b"\xff\n\xfe\n\xfd\n", "is damaged: byte 0 is no UTF-8 text, expected a class in each line"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, made, classes, message):
    file = made / "label.labels.txt"
    file.write_bytes(classes)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the whole of it is compared
        tfds.load("small", str(tmp_path))
    assert str(raised.value) == f"{file} {message}; copy it again, or prepare it again"
    file.unlink()
    assert tfds.load("small", str(tmp_path)).class_names == ("0", "1", "2")


def split(**to):
    return lambda content: content["splits"][0].update(to)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            split(filepathTemplate="../../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"),
            "names the shard .*expected one in",
        ),
        (split(filepathTemplate="/victim-{SHARD_INDEX}"), "names the shard '/victim-00000': expected one in"),
        (split(filepathTemplate="\u001b[2J{SHARD_INDEX}"), "expected a plain name"),
        (split(filepathTemplate="small-train.array_record-00000"), "counts .*: expected a number of each"),
        (split(shardLengths=["4", "-4", "2"]), r"counts \[4, -4, 2\] examples in the shards"),
        (split(shardLengths=["4", "4", "3"]), "small-train.array_record-00002 holds 2 records where .* says 3"),
        (split(shardLengths=["4", "4"]), None),
        (split(shardLengths=["1000000000000", "4", "2"]), "00000 holds 4 records where .* says 1,000,000,000,000"),
        (split(shardLengths=["four"]), "cannot be read by tfds"),
    ],
)
def test_shards_lie_in_their_folder_and_hold_what_is_said(tmp_path, made, change, message):
    changed(made / "dataset_info.json", change)
    if message is None:  # shards that nobody counts are left alone
        assert len(tfds.load("small", str(tmp_path)).train) == 8
        return
    with pytest.raises(ValueError, match=message) as raised:
        tfds.load("small", str(tmp_path))
    assert str(raised.value).isprintable()


def test_a_pipe_is_not_opened(tmp_path, made):
    (made / "small-test.array_record-00000").unlink()
    os.mkfifo(made / "small-test.array_record-00000")
    with pytest.raises(ValueError, match=r"small-test\.array_record-00000 is a folder, a pipe or a device"):
        tfds.load("small", str(tmp_path))


def test_hidden_files_and_folders_of_a_bucket_stay_there(tmp_path, original, bucket):  # noqa: F811
    there = shutil.copytree(original, bucket / "sets" / "small" / "1.0.0")
    (there / "._features.json").write_text("what a Mac leaves")
    (there / "old.json").mkdir()
    assert len(tfds.load("small", "gs://bucket/sets").train) == 10
    (there / "x\n.json").write_text("")
    with pytest.raises(ValueError, match="expected a plain name"):
        tfds.load("small", "gs://bucket/sets")
