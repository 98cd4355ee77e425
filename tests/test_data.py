import dataclasses
import io
import os
import pathlib
import pickle
import pwd

import jax
import numpy as np
import pytest
from PIL import Image

from nfjax import _cache, compilation, data
from nfjax import config as configs
from nfjax.data.decoding import crops, decode
from nfjax.data.loading import memory, skips
from nfjax.runs import files as workdir_files
from nfjax.runs import report, workdirs
from nfjax.training import loader, networks


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


def test_orders_are_the_batches_of_the_stream():
    orders = list(data.train_orders(3, 10, 4, 2, 6))
    np.testing.assert_array_equal([o.indices for o in orders], data.train_indices(3, 10, 4, 2, 4))
    np.testing.assert_array_equal(np.concatenate([o.positions for o in orders]), np.arange(8, 24))
    assert all((o.mask == 1).all() for o in orders)


def test_epoch_ends():
    assert [data.epoch_end(epoch, 50_000, 128) for epoch in (1, 2, 8)] == [391, 782, 3125]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (8, 4), (3, 4)])
def test_evaluation_visits_each_example_once(size, batch):
    orders = list(data.eval_orders(size, batch))
    assert all(order.indices.shape == order.mask.shape == (batch,) for order in orders)
    seen = np.concatenate([order.indices[order.mask > 0] for order in orders])
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


def in_memory(root, size=8, resize=None, max_skipped=0.01):
    dataset = data.load("folder", str(root), size)
    middle = crops.CentreCrop(size, resize or size)
    return memory.decoded(dataset, crops.CentreCrop(size, size), middle, max_skipped)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NFJAX_CACHE", str(tmp_path / "cache"))


def test_a_folder_in_memory(tmp_path):
    make_folder(tmp_path / "set", size=(20, 10))
    (tmp_path / "set" / "train" / "ant" / ".DS_Store").write_text("left alone")
    dataset = in_memory(tmp_path / "set")
    assert dataset.class_names == ("ant", "bee")
    assert dataset.skipped == {}
    assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert dataset.train.images.shape == (8, 8, 8, 3)
    assert dataset.train.images[:, 4, 4].tolist() == [[100 * c, 0, i] for c in range(2) for i in range(4)]
    assert dataset.test.images[:, 4, 4, 1].tolist() == [50] * 8


def test_the_short_side_is_resized_and_the_centre_cut_out(tmp_path):
    make_folder(tmp_path / "set", per_class=1)
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # the middle ten of forty columns
    Image.fromarray(wide).save(tmp_path / "set" / "train" / "ant" / "000.png")
    np.testing.assert_array_equal(in_memory(tmp_path / "set", 10).train.images[0], np.full((10, 10, 3), 255))


def test_test_images_may_be_resized_larger_than_they_are_cut(tmp_path):
    make_folder(tmp_path / "set", per_class=1, size=(10, 10))
    framed = np.zeros((10, 10, 3), np.uint8)
    framed[2:8, 2:8] = 255
    Image.fromarray(framed).save(tmp_path / "set" / "test" / "ant" / "000.png")
    assert in_memory(tmp_path / "set", 6, resize=10).test.images[0].min() == 255
    assert in_memory(tmp_path / "set", 6).test.images[0].min() < 255


def test_decoded_once(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    first = in_memory(tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_decode", lambda *args: pytest.fail("decoded again"))
        second = in_memory(tmp_path / "set")
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert in_memory(tmp_path / "set", 4).train.images.shape == (8, 4, 4, 3)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "set" / "train" / "ant" / "004.png")
    assert len(in_memory(tmp_path / "set").train) == 9


def test_damaged_cache_is_made_again(tmp_path):
    make_folder(tmp_path / "set")
    in_memory(tmp_path / "set")
    (cached,) = pathlib.Path(tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(in_memory(tmp_path / "set").train) == 8


def test_a_cache_of_something_else_is_made_again(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    whole = in_memory(tmp_path / "set")
    (cached,) = pathlib.Path(tmp_path / "cache").iterdir()
    content = cached.read_bytes()
    with np.load(cached) as stored:
        arrays = dict(stored)

    def npz(**changes):
        stream = io.BytesIO()
        np.savez(stream, **arrays | changes)
        return stream.getvalue()

    stream = io.BytesIO()
    np.save(stream, arrays["train_images"])
    rng = np.random.default_rng(0)
    damaged = [bytearray(content) for _ in range(20)]
    for flipped in damaged:
        flipped[int(rng.integers(len(flipped)))] ^= 1 << int(rng.integers(8))
    lies = [b"", b"\x00\xff", b"[]", b"{}", b"5", stream.getvalue(), pickle.dumps({}), content[:-30], *damaged]
    lies += [npz(skipped=np.array(text)) for text in ("", "[]", "{}", "5", '{"train": [], "test": {}}', '{"train": {')]
    lies += [npz(train_labels=np.zeros(3, np.int32)), npz(train_images=arrays["train_images"].astype(float))]
    lies += [npz(train_images=np.array([{}], object))]
    warnings = []
    monkeypatch.setattr(memory.logging, "warning", lambda text, *args: warnings.append(text % args))
    for lie in lies:
        cached.write_bytes(lie)
        again = in_memory(tmp_path / "set")
        np.testing.assert_array_equal(again.train.images, whole.train.images)
        np.testing.assert_array_equal(again.test.labels, whole.test.labels)
    assert len(lies) - 5 <= len(warnings) <= len(lies)  # a bit of the date of a file costs nothing
    assert all(str(cached) in warning and warning.endswith("and is made again") for warning in warnings)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cached.name]


def test_a_full_disk_leaves_no_half_of_a_cache(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    make_folder(tmp_path / "set")
    monkeypatch.setattr(os, "fsync", full)
    assert len(in_memory(tmp_path / "set").train) == 8
    assert list((tmp_path / "cache").iterdir()) == []


def test_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NFJAX_CACHE", str(tmp_path / "file" / "below"))
    assert len(in_memory(tmp_path / "set").train) == 8


def test_bad_files_are_left_out_and_named_with_the_cause(tmp_path):
    make_folder(tmp_path / "set", per_class=150)
    ant = tmp_path / "set" / "train" / "ant"
    (ant / "000.png").write_text("no image")
    (ant / "001.png").write_bytes((ant / "002.png").read_bytes()[:40])
    (ant / "zero.png").write_text("")
    (ant / "notes.txt").write_text("")
    dataset = in_memory(tmp_path / "set")
    assert set(dataset.skipped) == {"train/ant/000.png", "train/ant/001.png", "train/ant/zero.png"}
    assert dataset.left_aside == {".txt": 1}
    assert dataset.skipped["train/ant/zero.png"] == "empty file"
    assert dataset.skipped["train/ant/000.png"] == "no image"
    assert len(dataset.train) == len(dataset.train.labels) == 298
    assert dataset.train.images[0, 0, 0].tolist() == [0, 0, 2]  # nothing took the place of another
    assert in_memory(tmp_path / "set").skipped == dataset.skipped  # from the cache too


def test_too_many_bad_files(tmp_path):
    make_folder(tmp_path / "set", per_class=20)
    (tmp_path / "set" / "test" / "bee" / "000.png").write_text("no image")
    message = r"1 of the 40 images in test cannot .*data.max_skipped=0.01 allows; 1 no image: test/bee/000.png"
    with pytest.raises(skips.TooManySkippedError, match=message):
        in_memory(tmp_path / "set")
    assert len(in_memory(tmp_path / "set", max_skipped=0.03).test) == 39


def test_a_set_that_does_not_fit_is_refused(tmp_path):
    make_folder(tmp_path / "set")
    with pytest.raises(ValueError, match=r"more than half of this machine's memory.*--config\.data\.keep=disk"):
        in_memory(tmp_path / "set", 200_000)


def test_arrays_stay_as_they_are():
    dataset = data.load("digits", "", 8)
    assert memory.decoded(dataset, crops.CentreCrop(8, 8), crops.CentreCrop(8, 8), 0.0) is dataset


def test_skips_are_written_once_and_counted_anew_after_a_restart(tmp_path):
    made = skips.Skips("train", "image {}".format, 100, 0.02, tmp_path)
    for index in (3, 3, 4):
        made(index, "no image", "some detail")
    made.check(1, 3)
    with open(tmp_path / skips.FILE, "a") as file:
        file.write('{"split": "train", "na')  # the process was killed here
    again = skips.Skips("train", "image {}".format, 100, 0.02, tmp_path)
    again.check(0, 1)  # what was repaired meanwhile does not count
    for index, cause in ((4, "no image"), (5, "missing"), (3, "no image")):
        again(index, cause, "")
    with pytest.raises(
        skips.TooManySkippedError, match=r"3 of the 100 .*2 no image, 1 missing: image 4, image 5, image 3"
    ):
        again.check(10, 13)
    assert len((tmp_path / skips.FILE).read_text().splitlines()) == 3
    assert skips.read(tmp_path, "test") == {}
    assert skips.read(tmp_path) == {"image 3": "no image", "image 4": "no image", "image 5": "missing"}


def test_data_that_is_gone_stops_a_run_that_allows_everything():
    made = skips.Skips("train", "image {}".format, 10_000, 1.0)
    for good, wanted in ((0, 20), (1, 20), (0, 30), (30, 30), (0, 1), (0, 30)):  # small batches may be bad
        made.check(good, wanted)
    with pytest.raises(skips.TooManySkippedError, match="none of the last 32 images of train can be read: has the"):
        made.check(0, 1)


def test_the_cache_of_decoded_images_allows_no_more_than_the_run(tmp_path):
    make_folder(tmp_path / "set", per_class=20)
    (tmp_path / "set" / "test" / "bee" / "000.png").write_text("no image")
    assert len(in_memory(tmp_path / "set", max_skipped=0.03).test) == 39
    with pytest.raises(skips.TooManySkippedError, match="1 of the 40 images in test cannot be read"):
        in_memory(tmp_path / "set")


def test_a_split_without_one_good_image(tmp_path):
    make_folder(tmp_path / "set", per_class=2)
    for file in (tmp_path / "set" / "test").rglob("*.png"):
        file.write_text("no image")
    with pytest.raises(ValueError, match="none of the images in test can be read; 4 no image"):
        in_memory(tmp_path / "set", max_skipped=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet", "", 8), "unknown data source 'imagenet': expected one of digits, synthetic, folder.*tfds:<name>"),
        (("tfds:", "", 8), "unknown data source 'tfds:'"),
        (("digits", "", 0), "image_size=0 must be a positive"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(*arguments)


def test_arrays_of_another_size_are_refused(monkeypatch):
    small = data.load("digits", "", 8)
    monkeypatch.setitem(data.DATASETS, "small", lambda directory, size: dataclasses.replace(small))
    with pytest.raises(ValueError, match=r"the images of small have 8x8 pixels: expected --config\.data\.image_size=8"):
        data.load("small", "", 16)


def test_images_checks_its_arrays():
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
        data.Images(np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.int32))


def test_files_made_anew_with_the_same_size_and_time_are_decoded_anew(tmp_path):
    """As rsync -t, tar and `os.utime` make them: only the time of change differs."""
    make_folder(tmp_path / "set", suffix="bmp")
    before = in_memory(tmp_path / "set").train.images
    for file in (tmp_path / "set" / "train").rglob("*.bmp"):
        status = file.stat()
        pixels = 255 - np.asarray(Image.open(file))
        for path in (file, file.with_suffix(".new")) if file.name == "000.bmp" else (file,):
            Image.fromarray(pixels).save(path, "BMP")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if path != file:
            path.replace(file)  # and another file in its place
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    np.testing.assert_array_equal(in_memory(tmp_path / "set").train.images, 255 - before)


def test_skips_by_an_older_rule_are_not_served(tmp_path, monkeypatch):
    """A file that did not count as an image under another `decode.RULE` is looked at again."""
    make_folder(tmp_path / "set", per_class=60)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "RULE", decode.RULE - 1)
        read = decode.size

        def stricter(data):
            if data == (tmp_path / "set/train/ant/000.png").read_bytes():
                raise decode.BadImageError("damaged")
            return read(data)

        patch.setattr(decode, "size", stricter)
        assert in_memory(tmp_path / "set").skipped == {"train/ant/000.png": "damaged"}
        assert len(in_memory(tmp_path / "set").train) == 119
    again = in_memory(tmp_path / "set")
    assert again.skipped == {}
    assert len(again.train) == 120


def test_images_turned_upright_have_a_cache_of_their_own(tmp_path):
    make_folder(tmp_path / "set", per_class=1)
    noted = Image.Exif()
    noted[0x0112] = 6
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "set" / "train" / "ant" / "000.png", exif=noted)
    config = configs.base()
    config.data.source, config.data.image_size = "folder", 8
    for setting, corner in ((False, (0, 0)), (True, (0, 7)), (False, (0, 0))):
        config.data.exif_orientation = setting
        found = loader.open_data(config, str(tmp_path / "set")).train.images[0, ..., 0]
        assert np.argwhere(found == 255).tolist() == [list(corner)]
    config.data.keep, config.augment.resized_crop_scale = "disk", (1.0, 1.0)
    config.data.exif_orientation = True
    for name in ("train", "test"):
        assert loader.transform(config, name).upright
    assert loader.first_images(config, loader.open_data(config, str(tmp_path / "set")).train)[0, 0, 7, 0] == 255


def test_other_files_do_not_stop_a_small_data_set(tmp_path):
    make_folder(tmp_path / "set", per_class=3)
    for name in ("Thumbs.db", "desktop.ini", "0.txt", "1.txt", "set.zip"):
        for split in ("train", "test"):
            (tmp_path / "set" / split / "bee" / name).write_text("no image")
    dataset = in_memory(tmp_path / "set", max_skipped=0.0)
    assert (len(dataset.train), len(dataset.test), dataset.skipped) == (6, 6, {})
    assert dataset.left_aside == {".db": 2, ".ini": 2, ".txt": 4, ".zip": 2}


def test_one_class_is_refused_whatever_the_source(monkeypatch):
    one = dataclasses.replace(data.load("digits", "", 8), class_names=("0",))
    monkeypatch.setitem(data.DATASETS, "one", lambda directory, size: one)
    with pytest.raises(ValueError, match=r"the classes of one .*: 0; expected at least two"):
        data.load("one", "", 8)


def test_what_was_left_aside_stands_in_the_header_and_in_the_workdir(tmp_path, tiny_config):
    make_folder(tmp_path / "set", per_class=3)
    (tmp_path / "set" / "test" / "bee" / "Thumbs.db").write_text("no image")
    dataset = in_memory(tmp_path / "set")
    model = networks.build(tiny_config, 2, jax.random.key(0))
    header = report.header(tiny_config, "a network", tmp_path, dataset, model)
    assert "6 test images of 8x8, 2 classes; 1 file that is no image is left aside (1 .db)" in header
    (tmp_path / "run").mkdir()
    workdirs.start(tmp_path / "run", tiny_config, dataset)
    assert workdir_files.read_data(tmp_path / "run").left_aside == {".db": 1}


def test_without_a_home_directory(tmp_path, monkeypatch, caplog):
    """Copies that a run can do without are not kept; for others the way out is named."""

    def unknown(number):
        raise KeyError(number)

    whole = in_memory(make_folder(tmp_path / "set"))
    for name in ("HOME", "XDG_CACHE_HOME", "NFJAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    again = in_memory(tmp_path / "set")
    np.testing.assert_array_equal(again.train.images, whole.train.images)
    assert "the decoded images are not cached: there is no place for copies" in caplog.text
    kept_in = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.keep()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept_in)
    assert "what is compiled cannot be kept" in caplog.text
    with pytest.raises(OSError, match="set NFJAX_CACHE to a directory"):
        _cache.cache_folder("mirror")
    monkeypatch.setenv("HOME", str(tmp_path / "set" / "train" / "ant" / "000.png"))  # where nothing can be made
    with pytest.raises(OSError, match=r"ant/000\.png.*cannot be made .*set NFJAX_CACHE"):
        _cache.cache_folder("mirror")
