import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from nfjax import data
from nfjax.data import folder


def test_every_epoch_visits_each_example_once():
    size, batch = 10, 4
    steps = data.epoch_end(6, size, batch)
    stream = data.train_indices(7, size, batch, 0, steps).reshape(-1)
    for epoch in range(6):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert (stream[:size] != stream[size : 2 * size]).any()


def test_the_order_is_a_function_of_seed_and_position():
    whole = data.train_indices(3, 100, 8, 0, 40)
    assert whole.shape == (40, 8)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(data.train_indices(3, 100, 8, 17, 5), whole[17:22])
    assert (data.train_indices(4, 100, 8, 0, 1) != whole[:1]).any()


def test_epoch_ends():
    assert [data.epoch_end(epoch, 50_000, 128) for epoch in (1, 2, 8)] == [391, 782, 3125]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (8, 4), (3, 4)])
def test_evaluation_visits_each_example_once(size, batch):
    batches = list(data.eval_indices(size, batch))
    assert all(indices.shape == mask.shape == (batch,) for indices, mask in batches)
    seen = np.concatenate([indices[mask > 0] for indices, mask in batches])
    assert list(seen) == list(range(size))


@pytest.mark.parametrize("source", ["digits", "synthetic"])
@pytest.mark.parametrize("size", [8, 12])
def test_sources_without_files(source, size):
    dataset = data.load(source, "", size)
    for split in (dataset.train, dataset.test):
        assert split.images.shape[1:] == (size, size, 3)
        assert split.images.dtype == np.uint8
        assert set(split.labels) == set(range(10))
    again = data.load(source, "", size)
    np.testing.assert_array_equal(dataset.train.images, again.train.images)


def test_digits_split_is_fixed_and_stratified():
    dataset = data.load("digits", "", 8)
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert np.bincount(dataset.test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert dataset.train.images.max() == 255
    assert (dataset.train.images[..., 0] == dataset.train.images[..., 2]).all()


def make_folder(root, per_class=4, classes=("ant", "bee"), splits=("train", "test"), size=(8, 8), suffix="png"):
    """Images of one colour each: red is the class, green the split, blue the number."""
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                Image.new("RGB", size, (100 * c, 50 * s, i)).save(root / split / name / f"{i:03d}.{suffix}")
    return root


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NFJAX_CACHE", str(tmp_path / "cache"))


def test_folder(tmp_path):
    make_folder(tmp_path / "set", size=(20, 10))
    (tmp_path / "set" / "train" / "ant" / ".DS_Store").write_text("left alone")
    dataset = data.load("folder", str(tmp_path / "set"), 8)
    assert dataset.class_names == ("ant", "bee")
    assert dataset.skipped == ()
    assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert dataset.train.images.shape == (8, 8, 8, 3)
    assert dataset.train.images[:, 4, 4].tolist() == [[100 * c, 0, i] for c in range(2) for i in range(4)]
    assert dataset.test.images[:, 4, 4, 1].tolist() == [50] * 8


def test_folder_resizes_the_short_side_and_cuts_the_centre(tmp_path):
    make_folder(tmp_path / "set", per_class=1)
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # the middle ten of forty columns
    Image.fromarray(wide).save(tmp_path / "set" / "train" / "ant" / "000.png")
    image = data.load("folder", str(tmp_path / "set"), 10).train.images[0]
    np.testing.assert_array_equal(image, np.full((10, 10, 3), 255))


def test_val_serves_as_test(tmp_path):
    make_folder(tmp_path / "set", splits=("train", "val"))
    assert len(data.load("folder", str(tmp_path / "set"), 8).test) == 8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    make_folder(tmp_path / "set", per_class=1)
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode).save(tmp_path / "set" / "train" / "ant" / f"999.{suffix}")
    assert data.load("folder", str(tmp_path / "set"), 8).train.images.shape == (3, 8, 8, 3)


def test_decoded_once(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    first = data.load("folder", str(tmp_path / "set"), 8)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "decode", lambda *args: pytest.fail("decoded again"))
        second = data.load("folder", str(tmp_path / "set"), 8)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert data.load("folder", str(tmp_path / "set"), 4).train.images.shape == (8, 4, 4, 3)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "set" / "train" / "ant" / "004.png")
    assert len(data.load("folder", str(tmp_path / "set"), 8).train) == 9


def test_damaged_cache_is_made_again(tmp_path):
    make_folder(tmp_path / "set")
    data.load("folder", str(tmp_path / "set"), 8)
    (cached,) = pathlib.Path(tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(data.load("folder", str(tmp_path / "set"), 8).train) == 8


def test_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NFJAX_CACHE", str(tmp_path / "file" / "below"))
    assert len(data.load("folder", str(tmp_path / "set"), 8).train) == 8


def test_bad_files_are_skipped_and_named(tmp_path):
    make_folder(tmp_path / "set", per_class=150)
    ant = tmp_path / "set" / "train" / "ant"
    (ant / "000.png").write_text("no image")
    (ant / "001.png").write_bytes((ant / "002.png").read_bytes()[:40])
    (ant / "notes.txt").write_text("")
    dataset = data.load("folder", str(tmp_path / "set"), 8)
    assert dataset.skipped == ("train/ant/000.png", "train/ant/001.png", "train/ant/notes.txt")
    assert len(dataset.train) == len(dataset.train.labels) == 298
    assert dataset.train.images[0, 0, 0].tolist() == [0, 0, 2]  # nothing took the place of another
    assert data.load("folder", str(tmp_path / "set"), 8).skipped == dataset.skipped  # from the cache too


def test_links_and_deep_pixels(tmp_path):
    make_folder(tmp_path / "set", per_class=200)
    ant = tmp_path / "set" / "train" / "ant"
    (ant / "x.png").symlink_to("nowhere")
    (ant / "loop").symlink_to(".")
    os.mkfifo(ant / "pipe.png")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(ant / "deep.png")
    dataset = data.load("folder", str(tmp_path / "set"), 8)
    assert set(dataset.skipped) == {"train/ant/deep.png", "train/ant/pipe.png", "train/ant/x.png"}
    assert len(dataset.train) == 400


def test_train_class_without_files(tmp_path):
    make_folder(tmp_path / "set")
    (tmp_path / "set" / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"class folders without files: cat"):
        data.load("folder", str(tmp_path / "set"), 8)


def test_too_many_bad_files(tmp_path):
    make_folder(tmp_path / "set", per_class=20)
    (tmp_path / "set" / "test" / "bee" / "000.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1 of the 40 files in .*test cannot be read.*more than 1%.*test/bee/000.png"):
        data.load("folder", str(tmp_path / "set"), 8)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    make_folder(tmp_path / "set", per_class=60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (40, 40)).save(tmp_path / "set" / "train" / "ant" / "000.png")
    assert data.load("folder", str(tmp_path / "set"), 8).skipped == ("train/ant/000.png",)


def empty(root):
    root.mkdir()


def no_test(root):
    make_folder(root, splits=("train",))


def no_classes(root):
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()


def no_files(root):
    make_folder(root, per_class=0)


def a_file(root):
    root.write_text("")


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda root: None, FileNotFoundError, "does not exist"),
        (a_file, NotADirectoryError, "is a file"),
        (empty, FileNotFoundError, "has no folder train: it holds nothing"),
        (no_test, FileNotFoundError, r"has no folder test \(or val\): it holds train"),
        (no_classes, FileNotFoundError, "has no class folders"),
        (no_files, FileNotFoundError, "no files in them"),
    ],
)
def test_missing_parts_are_named_with_the_layout_expected(tmp_path, prepare, error, message):
    prepare(tmp_path / "set")
    with pytest.raises(error, match=message) as caught:
        data.load("folder", str(tmp_path / "set"), 8)
    assert f"{tmp_path}/set/train/<class>/*.jpg" in str(caught.value)


def test_class_that_train_lacks(tmp_path):
    make_folder(tmp_path / "set")
    make_folder(tmp_path / "set", classes=("cat",), splits=("test",))
    with pytest.raises(ValueError, match=r"class folders that .*train lacks: cat"):
        data.load("folder", str(tmp_path / "set"), 8)


def test_a_set_that_does_not_fit_is_refused(tmp_path):
    make_folder(tmp_path / "set")
    with pytest.raises(ValueError, match="more than half of this machine's memory"):
        data.load("folder", str(tmp_path / "set"), 200_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet", "", 8), "unknown data source 'imagenet': expected one of digits, synthetic, folder"),
        (("folder", "", 8), "no data directory given; set it with --config.data.dir"),
        (("digits", "", 0), "image_size=0 must be a positive"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(*arguments)


def test_images_checks_its_arrays():
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
        data.Images(np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.int32))
