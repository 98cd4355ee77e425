"""A workdir goes on with its own config and images, whatever befell its small files, and is never somebody else's."""

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest
from fake_bucket import bucket  # noqa: F401

from nfjax import data, evaluate, storage
from nfjax.data import identity as identities
from nfjax.runs import files, mirror, workdirs
from nfjax.training import loader
from nfjax.training import loop as train

DAMAGE = {
    "empty": b"",
    "binary": b"\x00\xff\xfe",
    "cut": b'{"model": {"depth": 1',
    "a list": b"[]",
    "an object": b"{}",
    "a number": b"5",
}
NAMES = ["config.json", "data.json", "versions.json"]


def begin(config, folder):
    """What a start does before it trains."""
    opened = workdirs.open_for(config, str(folder))
    workdirs.start(opened, config, loader.open_data(config, config.data.dir))
    workdirs.note_start(opened, config, 0)


@pytest.fixture
def begun(tiny_config, tmp_path):
    """(config, workdir) of a run that has logged a line."""
    folder = tmp_path / "run"
    begin(tiny_config, folder)
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 2.0}\n')
    return tiny_config, folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_set_aside_and_the_run_goes_on(begun, caplog, name, damage):
    config, folder = begun
    whole = json.loads((folder / name).read_bytes())
    (folder / name).write_bytes(DAMAGE[damage])
    begin(config, folder)
    assert (folder / f"{name}.damaged").read_bytes() == DAMAGE[damage]
    assert f"{folder / name} " in caplog.text
    assert f"set aside as {name}.damaged" in caplog.text
    mended = json.loads((folder / name).read_bytes())
    if name == "versions.json":
        assert [entry["packages"] for entry in mended] == [whole[0]["packages"]]
    else:
        assert mended == whole


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_damaged_file_is_not_replaced_by_other_settings_or_images(begun, monkeypatch, name):
    config, folder = begun
    (folder / name).write_bytes(b"{")
    before = contents(folder)
    other = config.copy_and_resolve_references()
    other.optim.learning_rate = 0.5
    whole = data.load("synthetic", "", 8)
    images = whole.train.images.copy()
    images[7, 0, 0, 0] ^= 1
    changed = dataclasses.replace(whole, train=data.Images(images, whole.train.labels))
    if name == "data.json":
        other = config
        monkeypatch.setitem(data.DATASETS, "synthetic", lambda directory, size: changed)
    message = rf"{folder / name} is damaged at line 1, .*move {name} away, and start again"
    with pytest.raises(ValueError, match=message):
        begin(other, folder)
    assert contents(folder) == before
    (folder / name).unlink()  # the way out
    begin(other, folder)
    assert json.loads((folder / name).read_bytes())


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_what_nothing_vouches_for_is_asked_for(begun, caplog, name):
    """Runs of before: their versions.json does not tell with what they were started."""
    config, folder = begun
    entries = json.loads((folder / "versions.json").read_bytes())
    (folder / "versions.json").write_text(json.dumps([{k: entries[0][k] for k in ("started", "step", "packages")}]))
    (folder / name).write_bytes(b"[]")
    with pytest.raises(ValueError, match=rf"{name} does not hold what it should: .*cannot be told"):
        begin(config, folder)
    (folder / name).unlink()
    begin(config, folder)
    assert f"{folder / name} is missing: the" in caplog.text


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_by_those_who_only_read(begun, damage):
    _, folder = begun
    for name, read in (("config.json", files.read_config), ("data.json", files.read_data)):
        (folder / name).write_bytes(DAMAGE[damage])
        with pytest.raises(storage.DamagedFileError, match=rf"^{folder / name} .*started again, mends it$"):
            read(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("model", "depth"), "18", "holds what this version of nfjax has no setting for: .*depth"),
        (("model", "wings"), 2, "holds what this version of nfjax has no setting for: .*wings"),
        (("model",), 5, r"Expected `object`, got `int` - at `\$.model`"),
        (("data", "mean"), "grey", "holds what this version of nfjax has no setting for: .*mean"),
    ],
)
def test_a_config_with_other_fields_is_named(begun, field, value, message):
    _, folder = begun
    settings = node = json.loads((folder / "config.json").read_bytes())
    for name in field[:-1]:
        node = node[name]
    node[field[-1]] = value
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(storage.DamagedFileError, match=rf"{folder / 'config.json'} .*{message}"):
        files.read_config(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("class_names", "cat"), ("class_names", []), ("train_images", 0), ("test_images", 2.5), ("skipped_files", [])],
)
def test_data_with_a_field_of_another_type_is_named(begun, field, value):
    _, folder = begun
    described = json.loads((folder / "data.json").read_bytes()) | {field: value}
    (folder / "data.json").write_text(json.dumps(described))
    with pytest.raises(storage.DamagedFileError, match=rf"{folder / 'data.json'} .* - at `\$.{field}`"):
        files.read_data(folder)


def test_the_config_comes_back_as_it_was(begun):
    config, folder = begun
    assert files.read_config(folder).to_json_best_effort() == config.to_json_best_effort()


def test_a_network_that_cannot_be_built_is_told_with_its_file(begun, monkeypatch):
    _, folder = begun
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"convshort"', '"convshot"'))
    monkeypatch.setattr(evaluate, "_known_step", lambda folder, step: 5)
    with pytest.raises(ValueError, match=r"config\.json describes no network that can be built: unknown residual"):
        evaluate.load_model(str(folder))


@pytest.mark.parametrize("name", [*NAMES, "parameters.txt"])
def test_a_full_disk_leaves_the_file_as_it_was(begun, monkeypatch, name):
    config, folder = begun
    workdirs.note_parameters(folder, {"a": np.zeros(3)})
    if name == "data.json":
        (folder / name).unlink()  # otherwise there is nothing new to write
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config.log.every_steps = 7
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".{name}.part"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    def start_again():
        begin(config, folder)
        workdirs.note_parameters(folder, {"a": np.ones(3)})

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"{folder / name} cannot be written \(No space left on device\)"):
            start_again()
    assert not list(folder.glob(".*.part"))
    if name in before:
        assert (folder / name).read_bytes() == before[name]
    start_again()
    assert json.loads((folder / "config.json").read_bytes())["log"]["every_steps"] == 7
    assert (folder / name).read_bytes() != before.get(name)


def test_a_start_that_changes_nothing_writes_neither_config_nor_data(begun, monkeypatch):
    """A disk that is full does not keep a run from going on because of what is there already."""
    config, folder = begun
    before = [(folder / name).stat().st_ino for name in ("config.json", "data.json")]
    begin(config, folder)
    assert [(folder / name).stat().st_ino for name in ("config.json", "data.json")] == before


def test_a_run_of_before_goes_on(begun):
    """Without the settings that came later, without the identity of its images."""
    config, folder = begun
    settings = json.loads((folder / "config.json").read_bytes())
    del settings["train"], settings["data"]["share"]
    (folder / "config.json").write_text(json.dumps(settings))
    described = json.loads((folder / "data.json").read_bytes())
    identity = described.pop("identity")
    (folder / "data.json").write_text(json.dumps(described))
    assert files.read_config(folder).data.share == 1.0
    begin(config, folder)
    assert json.loads((folder / "data.json").read_bytes())["identity"] == identity
    config.data.share = 0.5
    with pytest.raises(ValueError, match=r"data\.share: 1\.0 there, 0\.5 now"):
        begin(config, folder)


# ---------------------------------------------------------------- whose folder it is

THEIRS = {
    "a config of another program": {"config.json": '{"model": "bert", "data": [1]}'},
    "a picture": {"curves.png": "theirs"},
    "other metrics": {"metrics.jsonl": '{"loss": 1}\n'},
    "checkpoints of another program": {"checkpoints/epoch3.pt": "theirs"},
    "runs below it": {"first/config.json": "{}"},
    "a lock of another program": {".lock": "uv"},
    "data of another program": {"data.json": "[1, 2]", "versions.json": '[{"python": "3.11"}]'},
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_folder_of_somebody_else_is_refused_before_the_first_write(tiny_config, tmp_path, kind):
    folder = tmp_path / "theirs"
    for name, text in THEIRS[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = contents(folder)
    first = sorted(THEIRS[kind])[0].split("/")[0]
    with pytest.raises(ValueError, match=rf"the workdir .* is not empty, and what lies there \({first}.* is of no run"):
        train.train(tiny_config, str(folder))
    assert contents(folder) == before


def test_hidden_files_and_what_a_first_try_left_do_not_stand_in_the_way(tiny_config, tmp_path):
    folder = tmp_path / "run"
    (folder / "lost+found").mkdir(parents=True)
    for name in (".DS_Store", ".writable", ".gitignore"):
        (folder / name).write_text("theirs")
    with workdirs.claim(workdirs.open_for(tiny_config, str(folder))):
        pass
    assert (folder / ".lock").read_text().startswith("process ")
    begin(tiny_config, folder)
    tiny_config.model.width = 8  # nothing was trained yet
    begin(tiny_config, folder)
    assert (folder / ".writable").read_text() == "theirs"
    assert json.loads((folder / "config.json").read_bytes())["model"]["width"] == 8


def test_a_folder_of_somebody_else_in_a_bucket_is_refused(tiny_config, bucket):  # noqa: F811
    folder = bucket / "theirs"
    folder.mkdir()
    (folder / "curves.png").write_text("theirs")
    with pytest.raises(ValueError, match=r"the workdir gs://bucket/theirs is not empty.*curves\.png"):
        workdirs.open_for(tiny_config, "gs://bucket/theirs")
    assert contents(folder) == {(folder / "curves.png").relative_to(folder): b"theirs"}
    opened = workdirs.open_for(tiny_config, "gs://bucket/ours")
    mirror.own(opened)  # and no further
    assert workdirs.open_for(tiny_config, "gs://bucket/ours") == opened


# ---------------------------------------------------------------- whether the images are the same


@pytest.fixture
def images(tiny_config, tmp_path):
    """A run on a folder of files, which are no images: nobody decodes them here."""
    for split, count in (("train", 64), ("test", 6)):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count // 2):
                (folder / f"{i:02d}.jpg").write_bytes(f"{split} {label} {i}".encode() * (1 + i % 3))
    tiny_config.data.source, tiny_config.data.dir, tiny_config.data.keep = "folder", str(tmp_path / "images"), "disk"
    tiny_config.batch_size = 16
    begin(tiny_config, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 2.0}\n')
    return tiny_config, tmp_path / "images"


def replaced(path):
    """Other bytes, as many as before."""
    path.write_bytes(path.read_bytes()[::-1])


CHANGES = {
    "a test image removed": (lambda root: (root / "test/a/00.jpg").unlink(), "Its test_images: 6; now: 5"),
    "a training image removed": (lambda root: (root / "train/a/00.jpg").unlink(), "Its train_images: 64; now: 63"),
    "a training image in another class": (
        lambda root: (root / "train/a/03.jpg").rename(root / "train/b/99.jpg"),
        "What differs: the contents of its train images, the names and classes of its train images, the sizes of",
    ),
    "a training image of another size": (
        lambda root: (root / "train/b/03.jpg").write_bytes(b"x"),
        "What differs: the contents of its train images, the sizes of its train images. Put",
    ),
    "a training image of other bytes": (
        lambda root: replaced(root / "train/b/03.jpg"),
        "What differs: the contents of its train images. Put the images back, .*move .*data.json away",
    ),
    "a test image of other bytes": (
        lambda root: replaced(root / "test/b/01.jpg"),
        "What differs: the contents of its test images. Put",
    ),
    "a test image of another name": (
        lambda root: (root / "test/b/01.jpg").rename(root / "test/b/01b.jpg"),
        "What differs: the names and classes of its test images. Put",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_noticed(images, tmp_path, change):
    config, root = images
    act, message = CHANGES[change]
    act(root)
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"trained on other images; nothing was changed there\. {message}"):
        begin(config, tmp_path / "run")
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / "data.json").unlink()  # the way out
    begin(config, tmp_path / "run")


def test_images_that_were_copied_elsewhere_are_the_same(images, tmp_path):
    config, root = images
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root, elsewhere, copy_function=shutil.copyfile)
    for i, path in enumerate(sorted(elsewhere.rglob("*.jpg"))):
        os.utime(path, (i, i))
    (elsewhere / "train" / "a" / ".DS_Store").write_bytes(b"hidden")
    shutil.rmtree(root)
    config.data.dir = str(elsewhere)
    begin(config, tmp_path / "run")


def test_a_large_split_is_compared_by_names_sizes_and_a_sample(images, monkeypatch):
    config, root = images

    def now():
        return loader.open_data(config, config.data.dir).identity()["train"]

    monkeypatch.setattr(identities, "WHOLE", 1)
    monkeypatch.setattr(identities, "SAMPLES", 3)
    before = now()
    read = [0, 31, 63]  # of 64, spread evenly
    paths = sorted((root / "train").rglob("*.jpg"))
    for index in (1, 30, 62):
        replaced(paths[index])
    assert now() == before
    for index in read:
        replaced(paths[index])
        after = now()
        assert {what for what in before if after[what] != before[what]} == {"contents"}
        replaced(paths[index])
    paths[30].write_bytes(b"x")
    after = now()
    assert {what for what in before if after[what] != before[what]} == {"sizes"}


def test_the_identity_of_arrays_is_that_of_their_pixels_and_classes():
    made = data.load("synthetic", "", 8)
    first = identities.identity(made)
    assert first == identities.identity(data.load("synthetic", "", 8))
    labels = made.train.labels.copy()
    labels[[0, 1]] = labels[[1, 0]]
    swapped = identities.identity(dataclasses.replace(made, train=data.Images(made.train.images, labels)))
    assert swapped["train"]["pixels"] == first["train"]["pixels"]
    assert swapped["train"]["classes"] != first["train"]["classes"]
    assert swapped["test"] == first["test"]


def test_files_that_cannot_be_read_are_left_to_training(images):
    config, root = images
    before = loader.open_data(config, config.data.dir).identity()
    (root / "train/a/05.jpg").unlink()
    (root / "train/a/05.jpg").symlink_to(root / "nowhere")
    after = loader.open_data(config, config.data.dir).identity()
    assert after["test"] == before["test"]
    assert after["train"]["names and classes"] == before["train"]["names and classes"]
    assert after["train"]["sizes"] != before["train"]["sizes"]


@pytest.mark.parametrize(("then", "now"), [("epoch", "cosine_by_epoch"), ("step", "cosine")])
def test_a_run_from_before_a_field_had_its_name_goes_on(tiny_config, tmp_path, then, now):
    tiny_config.epochs, tiny_config.optim.schedule = 1, now
    summary = train.train(tiny_config, str(tmp_path))
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["optim"]["schedule"], settings["model"]["name"], settings["log"]["trackers"]
    settings["optim"]["anneal"] = then
    path.write_text(json.dumps(settings))
    assert files.read_config(tmp_path).optim.schedule == now
    assert train.train(tiny_config, str(tmp_path)) == summary
    tiny_config.optim.schedule = "linear"
    with pytest.raises(ValueError, match=f"optim.schedule: '{now}' there, 'linear' now"):
        train.train(tiny_config, str(tmp_path))
