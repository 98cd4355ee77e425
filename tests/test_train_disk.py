"""Training from images that stay on the disk: the same run however often it is stopped, and nothing hidden."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from test_train import assert_equal, final_state, interrupt_at, records

from nfjax import evaluate, preemption
from nfjax.data.decoding import crops
from nfjax.data.loading import skips
from nfjax.runs import metrics
from nfjax.runs.progress import Bar
from nfjax.training import loader
from nfjax.training import loop as train


@pytest.fixture
def disk_config(tiny_config, tmp_path):
    """Two epochs of 5 steps on noise in two brightnesses, as JPEG files of many sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 12)):
        for label in range(2):
            folder = tmp_path / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count // 2):
                noise = rng.integers(0, 128, (10 + i % 7, 12 + i % 5, 3)) + 120 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i:03d}.jpg")
    config = tiny_config
    config.data.source, config.data.dir, config.data.keep = "folder", str(tmp_path / "images"), "disk"
    config.data.workers = 1
    config.batch_size, config.log.every_steps = 16, 2
    config.augment.resized_crop_scale = (0.3, 1.0)
    return config


def test_stopped_runs_end_as_if_they_had_not_been(disk_config, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch, and going on with another number of workers."""
    summary = train.train(disk_config, str(tmp_path / "whole"))
    assert summary["steps"] == 10
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(preemption.TrainingInterruptedError):
            train.train(disk_config, str(tmp_path / "stopped"))
    disk_config.data.workers, disk_config.data.ahead = 2, 3
    train.train(disk_config, str(tmp_path / "stopped"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert_equal(final_state(disk_config, tmp_path / "stopped"), final_state(disk_config, tmp_path / "whole"))
    waits = [record["data_wait"] for record in metrics.read(tmp_path / "whole") if record["kind"] == "train"]
    assert all(0 <= wait <= 1 for wait in waits)
    scored = evaluate.evaluate(str(tmp_path / "whole"))
    assert scored["images"] == 12
    assert scored["accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-6)


def test_from_the_disk_or_from_memory_is_the_same_run(disk_config, tmp_path):
    disk_config.augment.resized_crop_scale = None  # a box of the whole image: nothing is random on the host
    disk_config.epochs = 1
    train.train(disk_config, str(tmp_path / "disk"))
    disk_config.data.keep = "host"
    train.train(disk_config, str(tmp_path / "host"))
    assert records(tmp_path / "disk") == records(tmp_path / "host")


def test_what_cannot_be_read_is_named_in_the_workdir(disk_config, tmp_path, capsys):
    bad = tmp_path / "images" / "train" / "class 1" / "007.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    (tmp_path / "images" / "test" / "class 0" / "002.jpg").write_bytes(b"")
    disk_config.data.max_skipped, disk_config.epochs = 0.1, 1
    train.train(disk_config, str(tmp_path / "run"))
    named = skips.read(tmp_path / "run")
    assert named == {"train/class 1/007.jpg": "truncated JPEG", "test/class 0/002.jpg": "empty file"}
    out = capsys.readouterr().out
    assert "skipped 2 images that cannot be read: " in out
    assert str(tmp_path / "run" / skips.FILE) in out
    assert evaluate.evaluate(str(tmp_path / "run"))["images"] == 11
    disk_config.data.max_skipped = 0.001
    with pytest.raises(
        skips.TooManySkippedError, match=r"1 of the 80 images in train .*1 truncated JPEG: train/class 1"
    ):
        train.train(disk_config, str(tmp_path / "strict"))


def test_a_bad_image_does_not_stop_the_measurement_of_the_signal(disk_config, tmp_path):
    for name, data in (("000.jpg", b""), ("001.jpg", b"no image")):
        (tmp_path / "images" / "train" / "class 0" / name).write_bytes(data)
    dataset = loader.open_data(disk_config, disk_config.data.dir)
    images = loader.first_images(disk_config, dataset.train)
    split, crop = dataset.train, crops.CentreCrop(disk_config.data.image_size, disk_config.data.image_size)
    assert len(images) == disk_config.batch_size
    for image, index in zip(images, range(2, 2 + len(images)), strict=True):  # all but the two bad ones, in order
        np.testing.assert_array_equal(image, crop(split.reader(split.reference(index))[0]))
    for file in (tmp_path / "images" / "train").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 80 training images can be read"):
        loader.first_images(disk_config, dataset.train)


def test_checkpoints_that_disappear_under_a_run(disk_config, tmp_path, monkeypatch):
    """What is gone is gone; the next checkpoint is whole again, and the run goes on."""
    disk_config.epochs = 3

    def vanish(step, stop, bar=Bar.line):
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        return bar(step, stop)

    monkeypatch.setattr(Bar, "line", vanish)
    train.train(disk_config, str(tmp_path / "run"))
    assert evaluate.evaluate(str(tmp_path / "run"))["step"] == 15


def test_a_directory_that_disappears_stops_the_run(disk_config, tmp_path, monkeypatch):
    disk_config.epochs = 40

    def vanish(step, stop, bar=Bar.line):
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        return bar(step, stop)

    monkeypatch.setattr(Bar, "line", vanish)
    with pytest.raises(skips.TooManySkippedError, match=r"cannot be read.*missing"):
        train.train(disk_config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints").exists()


def test_images_whose_names_are_not_utf8(disk_config, tmp_path, capsys):
    """Nor are those of their classes and of the folder that holds them all."""
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.rename(tmp_path / "images", odd)
    for split in (b"train", b"test"):
        os.rename(os.path.join(odd, split, b"class 1"), os.path.join(odd, split, b"\xff"))
    for path in os.listdir(os.path.join(odd, b"test", b"\xff"))[:1]:
        os.rename(os.path.join(odd, b"test", b"\xff", path), os.path.join(odd, b"test", b"\xff", b"\xe9.jpg"))
    disk_config.data.dir, disk_config.data.keep, disk_config.epochs = os.fsdecode(odd), "device", 1
    disk_config.augment.resized_crop_scale = None
    workdir = str(tmp_path / "run")
    summary = train.train(disk_config, workdir)
    assert "caf" in capsys.readouterr().out
    assert summary["steps"] == 5
    score = evaluate.evaluate(workdir)
    assert (score["accuracy"], score["images"]) == (summary["test_accuracy"], 12)
    assert train.train(disk_config, workdir) == summary  # its settings and classes are found to be the same
