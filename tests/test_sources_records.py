"""Packing and the packed records: what goes in comes out, and damage never comes out as another image."""

import contextlib
import http.server
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pytest
import simplejpeg
from fake_bucket import bucket  # noqa: F401
from PIL import Image

from nfjax import cli, data
from nfjax.data import remote
from nfjax.data.packing import manifest as manifests
from nfjax.data.packing import pack, shards
from nfjax.data.sources import cifar, folder, records
from nfjax.data.splits import Dataset, Images


def make_folder(root, per_class=6, size=(40, 30)):
    """JPEGs with some structure, so that a resize or a wrong decoder shows."""
    rng = np.random.default_rng(0)
    for split, count in (("train", per_class), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 255, (3, 4, 3), np.uint8)
                small[0, 0] = 100 * label
                image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{i:03d}.jpg", quality=95)
    return root


@pytest.fixture
def source(tmp_path):
    return make_folder(tmp_path / "images")


def contents(split):
    return [split.reader(split.reference(i)) for i in range(len(split))]


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


def test_what_goes_in_comes_out(tmp_path, source):
    dataset = folder.load(str(source))
    manifest = pack.pack(dataset, tmp_path / "out", source="folder", per_shard=5, verify_after=True)
    packed = records.load(str(tmp_path / "out"))
    assert contents(packed.train) == contents(dataset.train)
    assert contents(packed.test) == contents(dataset.test)
    assert packed.class_names == dataset.class_names
    assert [shard.count for shard in manifest.shards["train"]] == [5, 5, 2]
    assert packed.train.name(7) == "train-00001-of-00003.array_record record 2"
    assert packed.train.reader.record(7)["name"] == "train/bee/001.jpg"
    assert manifest.labels == {"train": (6, 6), "test": (2, 2)}
    assert packed.fingerprint() == records.load(str(tmp_path / "out")).fingerprint()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {shard.file for listed in manifest.shards.values() for shard in listed} | {"manifest.json"}


def test_readers_travel_closed(tmp_path, source):
    pack.pack(folder.load(str(source)), str(tmp_path / "out"))
    reader = records.load(str(tmp_path / "out")).train.reader
    expected = reader(3)
    assert len(pickle.dumps(reader)) < 1000
    assert pickle.loads(pickle.dumps(reader))(3) == expected


def test_reduced_images_are_those_of_the_evaluation_resize(tmp_path, source):
    small = Image.new("RGB", (12, 10), (9, 8, 7))
    small.save(source / "train" / "ant" / "small.png")
    dataset = folder.load(str(source))
    pack.pack(dataset, str(tmp_path / "out"), short_side=15, quality=100, threads=4)
    for (before, label), (after, packed) in zip(
        contents(dataset.train), contents(records.load(str(tmp_path / "out")).train), strict=True
    ):
        assert label == packed
        original, reduced = Image.open(io.BytesIO(before)), Image.open(io.BytesIO(after))
        if original.size == (12, 10):
            assert after == before  # a smaller image keeps its bytes
            continue
        assert reduced.format == "JPEG"
        assert reduced.size == (20, 15)
        expected = original.resize((20, 15), Image.Resampling.BILINEAR)
        expected = simplejpeg.encode_jpeg(np.asarray(expected), 100, colorspace="RGB", colorsubsampling="420")
        assert after == expected


def test_threads_change_nothing(tmp_path, source):
    manifests = [
        pack.pack(folder.load(str(source)), str(tmp_path / f"out{threads}"), short_side=20, threads=threads)
        for threads in (1, 8)
    ]
    assert manifests[0].shards == manifests[1].shards


def test_arrays_are_packed_without_loss(tmp_path):
    rng = np.random.default_rng(0)
    images = Images(rng.integers(0, 255, (7, 32, 32, 3), np.uint8), np.arange(7, dtype=np.int32) % 2)
    pack.pack(Dataset(images, images, ("a", "b")), str(tmp_path / "out"), per_shard=3)
    packed = contents(records.load(str(tmp_path / "out")).train)
    assert [label for _, label in packed] == images.labels.tolist()
    np.testing.assert_array_equal([np.asarray(Image.open(io.BytesIO(image))) for image, _ in packed], images.images)


def test_bad_images_are_left_out_counted_and_named(tmp_path, source):
    (source / "train" / "ant" / "000.jpg").write_bytes(b"")
    (source / "train" / "bee" / "zzz.jpg").write_text("no image")
    dataset = folder.load(str(source))
    with pytest.raises(
        ValueError, match=r"(?s)2 of the 13 images of train.*1 empty file.*more than 0.01 of them.*train/ant/000.jpg"
    ):
        pack.pack(dataset, str(tmp_path / "out"))
    manifest = pack.pack(dataset, str(tmp_path / "out"), max_skipped=0.5)  # goes on from there
    assert set(manifest.skipped["train"]) == {"train/ant/000.jpg", "train/bee/zzz.jpg"}
    assert manifest.labels["train"] == (5, 6)
    assert len(records.load(str(tmp_path / "out")).train) == 11


def test_the_command_says_what_was_left_aside(tmp_path, source, capsys):
    (source / "train" / "bee" / "Thumbs.db").write_text("no image")
    assert cli.run(["data", "pack", "--source=folder", f"--dir={source}", f"--out={tmp_path}/out", "--no-verify"]) == 0
    assert f"of {source}, 1 file that is no image is left aside (1 .db)" in capsys.readouterr().out


def test_a_label_out_of_range_is_a_bad_image(tmp_path, source):
    dataset = folder.load(str(source))
    few = Dataset(dataset.train, dataset.test, ("ant",), fingerprint=dataset.fingerprint)
    manifest = pack.pack(few, str(tmp_path / "out"), max_skipped=1.0)
    assert manifest.labels["train"] == (6,)
    assert "train/bee/000.jpg has the label 1: expected 0 to 0" in manifest.skipped["train"]["train/bee/000.jpg"]


def test_a_finished_shard_is_not_packed_again(tmp_path, source, monkeypatch):
    dataset, out = folder.load(str(source)), tmp_path / "out"
    whole = pack.pack(dataset, str(tmp_path / "whole"), per_shard=4)
    read, write = [], shards.write

    def dies(file, examples, bar):
        if "train-00002" in file.name:
            raise KeyboardInterrupt
        return write(file, examples, bar)

    monkeypatch.setattr(shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(dataset, str(out), per_shard=4)
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json.*(?s:.*)interrupted goes on"):
        records.load(str(out))
    monkeypatch.setattr(shards, "write", lambda file, *args: read.append(file.name) or write(file, *args))
    assert pack.pack(dataset, str(out), per_shard=4).shards == whole.shards
    assert read == ["train-00002-of-00003.array_record", "test-00000-of-00001.array_record"]
    pack.pack(dataset, str(out), per_shard=4)  # complete: nothing is done again
    assert len(read) == 2


def test_killed_it_goes_on(tmp_path):
    source, out = make_folder(tmp_path / "images", per_class=400, size=(400, 300)), tmp_path / "out"
    arguments = ["pack", "--source=folder", f"--dir={source}", f"--out={out}", "--per-shard=100", "--short-side=100"]
    process = subprocess.Popen([sys.executable, "-m", "nfjax.data", *arguments], stderr=subprocess.DEVNULL)
    while not list(out.glob("*.json")) or not list(out.glob("train-00001*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.array_record")}
    assert cli.run(["data", *arguments]) == 0
    assert len(kept) >= 2
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert pack.verify(str(out)) == 804


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"short_side": 10}, "short_side: None there, 10 now; quality: None there, 90 now"),
        ({"per_shard": 3}, "per_shard: 5 there, 3 now"),
        ({"source": "other"}, "source: '' there, 'other' now"),
    ],
)
def test_other_settings_are_refused(tmp_path, source, changed, message):
    dataset = folder.load(str(source))
    pack.pack(dataset, str(tmp_path / "out"), per_shard=5)
    with pytest.raises(ValueError, match=rf"packed from other data or with other settings; {message}\. Choose another"):
        pack.pack(dataset, str(tmp_path / "out"), **{"per_shard": 5} | changed)


def test_a_changed_source_is_refused(tmp_path, source):
    pack.pack(folder.load(str(source)), str(tmp_path / "out"))
    os.utime(source / "train" / "ant" / "000.jpg", (1, 1))
    with pytest.raises(ValueError, match=r"the source \(its files changed\)"):
        pack.pack(folder.load(str(source)), str(tmp_path / "out"))


def test_an_unfinished_pack_of_a_source_that_was_mended_begins_anew(tmp_path, source):
    bad = source / "train" / "ant" / "005.jpg"
    good = bad.read_bytes()
    bad.write_text("no image")
    with pytest.raises(ValueError, match=r"(?s)1 of the 12 images of train.*Repair or remove them"):
        pack.pack(folder.load(str(source)), str(tmp_path / "out"), per_shard=4)
    bad.write_bytes(good)
    assert pack.pack(folder.load(str(source)), str(tmp_path / "out"), per_shard=4).labels["train"] == (6, 6)
    assert pack.verify(str(tmp_path / "out")) == 16


def test_lost_and_damaged_shards_are_packed_again(tmp_path, source):
    dataset, out = folder.load(str(source)), tmp_path / "out"
    whole = pack.pack(dataset, str(out), per_shard=4)
    lost, damaged = (out / f"train-0000{k}-of-00003.array_record" for k in (0, 1))
    before = damaged.read_bytes()
    for thorough in (False, True):
        lost.unlink()
        assert pack.pack(dataset, str(out), per_shard=4, verify_after=thorough) == whole
        flip(damaged, len(before) // 2)
    assert pack.pack(dataset, str(out), per_shard=4, verify_after=True) == whole
    assert damaged.read_bytes() == before
    assert not list(out.glob("*.array_record.json"))


def test_a_directory_with_something_else_is_left_alone(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not empty, and holds no pack"):
        pack.pack(folder.load(str(source)), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_two_packers_do_not_meet(tmp_path, source):
    with pack._locked(tmp_path / "out"), pytest.raises(FileExistsError, match="another process is packing"):
        pack.pack(folder.load(str(source)), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_side": 0}, "short_side=0: expected a positive"),
        ({"quality": 101}, "quality=101: expected 1 to 100"),
        ({"per_shard": 0}, "per_shard=0: expected a positive"),
        ({"max_skipped": 2}, "max_skipped=2: expected a share"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    empty = Images(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int32))
    with pytest.raises(ValueError, match=message):
        pack.pack(Dataset(empty, empty, ()), str(tmp_path / "out"), **settings)


def test_a_record_with_a_bad_checksum_is_named_and_never_another_image(tmp_path, source):
    dataset, out = folder.load(str(source)), tmp_path / "out"
    pack.pack(dataset, str(out))
    shard = out / "train-00000-of-00001.array_record"
    expected = contents(dataset.train)
    content = shard.read_bytes()
    flip(shard, content.index(expected[4][0]) + 50)
    reader = records.load(str(out)).train.reader
    for i in (3, 5, 4, 6, 4, 11):
        if i == 4:
            with pytest.raises(
                ValueError, match=r"train-00000-of-00001.array_record record 4 is damaged.*hash mismatch"
            ):
                reader(i)
        else:
            assert reader(i) == expected[i]
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        pack.verify(str(out))


def test_no_flipped_byte_goes_unnoticed(tmp_path, source):
    dataset, out = folder.load(str(source)), tmp_path / "out"
    pack.pack(dataset, str(out))
    shard = out / "train-00000-of-00001.array_record"
    expected, content = contents(dataset.train), shard.read_bytes()
    rng = np.random.default_rng(0)
    last = content.index(expected[-1][0])
    failed = 0
    for at in [*rng.integers(0, last, 60), *rng.integers(0, len(content), 60)]:
        flip(shard, at)
        reader = records.load(str(out)).train.reader
        for i in range(len(expected)):
            try:
                assert reader(i) == expected[i]
            except (ValueError, OSError):
                failed += 1
        shard.write_bytes(content)
    assert failed > 60


def test_missing_and_cut_shards(tmp_path, source):
    out = tmp_path / "out"
    pack.pack(folder.load(str(source)), str(out), per_shard=5)
    dataset = records.load(str(out))
    shard = out / "train-00001-of-00003.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:70_000])
    with pytest.raises(ValueError, match=r"has 70000 bytes where manifest\.json says"):
        records.load(str(out))
    with pytest.raises(ValueError, match="record 1 is damaged"):
        dataset.train.reader(6)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shard train-00001-of-00003\.array_record"):
        records.load(str(out))
    with pytest.raises(OSError, match="record 1"):
        pickle.loads(pickle.dumps(dataset.train.reader))(6)
    assert dataset.train.reader(0)[1] == 0


def test_what_is_no_record_of_ours(tmp_path, source):
    import msgpack
    from array_record.python import array_record_module

    out = tmp_path / "out"
    pack.pack(folder.load(str(source)), str(out))
    dataset = records.load(str(out))
    writer = array_record_module.ArrayRecordWriter(str(out / "train-00000-of-00001.array_record"), manifests.OPTIONS)
    for record in (7, {"image": b"x"}, {"image": "text", "label": 0}, {"image": b"x", "label": 2}):
        writer.write(msgpack.packb(record))
    writer.write(b"\xc1")
    writer.close()
    for i, message in enumerate(["no packed image", "no packed image", "holds str", "label 2: expected 0 to 1"]):
        with pytest.raises(ValueError, match=message):
            dataset.train.reader(i)
    with pytest.raises(ValueError, match="no packed image"):
        dataset.train.reader(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no manifest of packed records"),
        ("[]", "is no manifest of packed records"),
        ('{"version": 2}', "has format version 2, this nfjax reads version 1"),
        ('{"version": 1}', "is no manifest of packed records.*shards"),
    ],
)
def test_bad_manifests(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        records.load(str(tmp_path))


def test_no_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m nfjax.data pack --source=folder"):
        records.load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        records.load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no data directory given"):
        records.load("")


def test_to_a_bucket_and_from_it(tmp_path, source, bucket):  # noqa: F811
    dataset = folder.load(str(source))
    pack.pack(dataset, "gs://bucket/packed", per_shard=5)
    assert (bucket / "packed" / "manifest.json").exists()
    packed = records.load("gs://bucket/packed")
    assert contents(packed.train) == contents(dataset.train)
    (copy,) = (tmp_path / "cache" / "mirror").iterdir()
    assert {file.name for file in copy.iterdir()} - {".lock"} == set(os.listdir(bucket / "packed")) - {"manifest.json"}


def test_a_shard_is_copied_once_whole_and_checked(tmp_path, source, bucket, monkeypatch):  # noqa: F811
    pack.pack(folder.load(str(source)), "gs://bucket/packed", per_shard=5)
    shard = bucket / "packed" / "train-00001-of-00003.array_record"
    content = shard.read_bytes()
    flip(shard, 500)
    with pytest.raises(OSError, match=r"train-00001-of-00003\.array_record has another SHA-256 than the manifest says"):
        records.load("gs://bucket/packed")
    shard.write_bytes(content[:-1])
    with pytest.raises(OSError, match="has 131071 bytes instead of 131072"):
        records.load("gs://bucket/packed")
    shard.write_bytes(content)
    copied, copy_one = [], remote._copy_one
    monkeypatch.setattr(remote, "_copy_one", lambda *args: copied.append(args[1].name) or copy_one(*args))
    for _ in range(2):
        assert len(records.load("gs://bucket/packed").train) == 12
    assert "train-00001-of-00003.array_record" in copied
    assert len(set(copied)) == len(copied) <= 4


def test_a_full_disk(source, bucket, monkeypatch):  # noqa: F811
    pack.pack(folder.load(str(source)), "gs://bucket/packed")
    monkeypatch.setattr(remote, "SPARE", 1 << 60)
    warnings = []
    monkeypatch.setattr(remote.logging, "warning", lambda text, *args: warnings.append(text % args))
    packed = records.load("gs://bucket/packed")
    assert packed.train.reader._directory == "gs://bucket/packed"  # array_record reads gs:// itself
    assert "too little" in warnings[0]
    with pytest.raises(OSError, match="set NFJAX_CACHE to a directory on a larger disk"):
        remote.mirror("s3://bucket/packed", {"x": 1}, "1")


@contextlib.contextmanager
def cloud_storage(directory):
    """A server that answers as Google's does to a read of part of an object."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = urllib.parse.unquote(urllib.parse.urlparse(self.path).path.rpartition("/o/")[2])
            content = (directory / name).read_bytes()
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("x-goog-generation", "1")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has what it needs
                self.wfile.write(content[begin:end])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_array_record_reads_a_bucket_in_place(tmp_path, source):
    out = tmp_path / "bucket" / "packed"
    manifest = pack.pack(folder.load(str(source)), str(out))
    reader = records.RecordReader("gs://bucket/packed", manifest.shards["train"], 2)
    code = (
        "import pickle, sys\n"
        "reader = pickle.loads(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(pickle.dumps([reader(i) for i in (7, 0, 11)]))"
    )
    with cloud_storage(tmp_path / "bucket") as url:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(reader),
            capture_output=True,
            timeout=60,
            env=os.environ | {"CLOUD_STORAGE_EMULATOR_ENDPOINT": url},
        )
    local = records.load(str(out)).train.reader
    assert pickle.loads(done.stdout) == [local(i) for i in (7, 0, 11)], done.stderr.decode()


def test_remote_paths_say_what_they_need(monkeypatch):
    monkeypatch.setitem(remote.PACKAGES, "gs", "no_such_package")
    with pytest.raises(ImportError, match="pip install no_such_package"):
        records.load("gs://bucket/packed")
    with pytest.raises(ValueError, match="unknown protocol ftp://; expected a local directory, or one of gs://"):
        records.load("ftp://bucket/packed")


def test_the_command(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert cli.run(["data", "pack", "--source=folder", f"--dir={source}", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "train  12 images in 1 shards" in printed
    assert f"--config.data.source=records --config.data.dir={out}" in printed
    assert len(data.load("records", str(out), 32).train) == 12
    assert json.loads((out / "manifest.json").read_text())["settings"]["source"] == "folder"
    assert cli.run(["data", "pack", "--source=folder", "--dir=/nowhere", f"--out={out}"]) == 1
    assert "nfjax: the data directory /nowhere does not exist" in capsys.readouterr().err
    assert cli.run(["data", "pack"]) == 2
    assert "--source" in capsys.readouterr().err


def test_cifar_and_others_can_be_packed(tmp_path, monkeypatch):
    images = Images(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int32))
    monkeypatch.setattr(cifar, "load_cifar10", lambda directory: Dataset(images, images, ("plane",)))
    assert cli.run(["data", "pack", "--source=cifar10", f"--dir={tmp_path}", f"--out={tmp_path / 'out'}"]) == 0
    assert len(records.load(str(tmp_path / "out")).test) == 4
