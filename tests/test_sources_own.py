"""A source of one's own: a line in the table, a function by its name, anything with a length and an index, and sets of
Hugging Face.
"""

import dataclasses
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import own_source
import pytest
from own_source import FORMS, Noise
from PIL import Image

from nfjax import data
from nfjax.data.contents import contents
from nfjax.data.decoding import crops, decode
from nfjax.data.identity import identity
from nfjax.data.loading import memory, order, pickling, stream
from nfjax.data.packing import pack
from nfjax.data.sources import records
from nfjax.training import loop as train

CLASSES = ("dark", "bright")


def in_memory(dataset, size=8):
    return memory.decoded(dataset, crops.CentreCrop(size, size), crops.CentreCrop(size, size), 0.01)


def streamed(split, size=8):
    failures = []
    orders = order.eval_orders(len(split), len(split))
    crop = crops.CentreCrop(size, size)
    (batch,) = stream.stream(split, crop, (size, size, 3), orders, lambda *args: failures.append(args), workers=1)
    return batch, failures


def test_a_line_in_the_table(monkeypatch):
    made = data.load("synthetic", "", 8)
    monkeypatch.setitem(data.DATASETS, "mine", lambda directory, image_size: made)
    assert data.load("mine", "", 8) is made


def test_a_function_by_its_name_or_itself():
    by_name = data.load("own_source:load", "grey", 8)
    assert by_name.class_names == CLASSES
    assert (len(by_name.train), len(by_name.test)) == (48, 12)
    itself = data.load(own_source.load, "grey", 8)
    assert itself.train.reader(5) == by_name.train.reader(5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("own_source:gone", "has no function 'gone'; it has .*load, wrong; the sources .* digits, synthetic"),
        ("no_such_module:load", "there is no module 'no_such_module' .*; the sources that come along are digits"),
        ("own_source:", "unknown data source 'own_source:': expected one of digits, .*, package.module:function"),
        (
            "own_source:wrong",
            r"the data source own_source:wrong gives tuple: expected an nfjax\.data\.Dataset, such as",
        ),
    ],
)
def test_what_is_no_source(source, message):
    with pytest.raises(ValueError, match=message):
        data.load(source, "", 8)


def images(count=4, size=(8, 8), labels=None):
    labels = np.arange(count, dtype=np.int32) % 2 if labels is None else labels
    return data.Images(np.zeros((count, *size, 3), np.uint8), labels)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            [(np.zeros((8, 8, 3), np.uint8), 0)],
            r"train .* is list: expected nfjax\.data\.Images, or what .*from_sequences",
        ),
        (images(0), "train of the data source .* has no images"),
        (
            images(labels=np.array([0, 1, 2, 0], np.int32)),
            r"labels int32 \[4\], label 2 is 2: expected int32 \[4\], from 0 to 1",
        ),
        (images(labels=np.array([-1, 0, 0, 0], np.int32)), "label 0 is -1"),
        (images(labels=np.zeros(4, np.float32)), r"labels float32 \[4\], label 0 is 0\.0"),
        (images(labels=np.eye(4, 2, dtype=np.int32)), r"labels int32 \[4, 2\], label 0 is \[1 0\]"),
        (images(size=(8, 12)), "have 8x12 pixels: expected as many rows as columns"),
        (images(size=(12, 12)), "have 12x12 pixels: expected --config.data.image_size=12"),
    ],
)
def test_what_is_no_split(train, message):
    with pytest.raises(ValueError, match=message):
        data.load(lambda directory, image_size: data.Dataset(train, images(), CLASSES), "", 8)


def test_arrays_in_memory_are_taken_as_they_are():
    train = images()
    made = data.load(lambda directory, image_size: data.Dataset(train, images(), list(CLASSES)), "", 8)
    assert made.train is train
    assert made.class_names == CLASSES


def test_a_source_of_the_current_folder(tmp_path):
    (tmp_path / "birds.py").write_text("from own_source import load\n")
    code = "from nfjax import data; print(len(data.load('birds:load', '', 8).train))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])}
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True)
    assert run.stdout == b"48\n", run.stderr


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_its_pixels(form):
    """In this process and in a worker; grey ones in all three channels."""
    dataset = data.from_sequences(Noise(form, 12), Noise(form, 5), CLASSES)
    expected = np.random.default_rng(0).integers(0, 128, (8, 8, 3), np.uint8)
    if form.startswith("grey"):
        expected = np.repeat(expected[..., :1], 3, axis=-1)
    whole = in_memory(dataset)
    assert whole.skipped == {}
    np.testing.assert_array_equal(whole.train.images[0], expected)
    assert whole.train.images.shape == (12, 8, 8, 3)
    assert whole.test.labels.tolist() == [0, 1, 0, 1, 0]
    batch, failures = streamed(dataset.train)
    assert failures == []
    np.testing.assert_array_equal(batch["image"], whole.train.images)
    np.testing.assert_array_equal(batch["label"], whole.train.labels)


def test_a_list_of_pairs_is_a_sequence():
    pairs = [(np.full((8, 8, 3), 9 * i, np.uint8), i % 2) for i in range(4)]
    whole = in_memory(data.from_sequences(pairs, pairs[:2], CLASSES))
    np.testing.assert_array_equal(whole.train.images[:, 0, 0, 0], [0, 9, 18, 27])


def test_what_pillow_opens_is_converted_as_a_file_is(tmp_path):
    """16 bits, a palette, CMYK; and the orientation that is noted, for those who ask for it."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    for image in (
        Image.fromarray(rng.integers(0, 2**16, (6, 8), np.uint16)),
        rgb.quantize(16),
        rgb.convert("CMYK"),
        rgb.convert("RGBA"),
    ):
        stored = io.BytesIO()
        image.save(stored, "TIFF" if image.mode == "CMYK" else "PNG")
        reader = data.from_sequences([(image, 0)], [(image, 1)], CLASSES).train.reader
        np.testing.assert_array_equal(decode.decode(reader(0)[0]), decode.decode(stored.getvalue()))
    noted = Image.Exif()
    noted[0x0112] = 6
    rgb.save(tmp_path / "turned.png", exif=noted)
    with Image.open(tmp_path / "turned.png") as turned:
        data_of_it, _ = data.from_sequences([(turned, 0)], [(turned, 0)], CLASSES).train.reader(0)
    header = decode.header(data_of_it, upright=True)
    assert (header.height, header.width, header.orientation) == (8, 6, 6)
    np.testing.assert_array_equal(decode.decode(data_of_it), np.asarray(rgb))


GOOD = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((GOOD.astype(np.float32) / 255, 0), r"float32 of shape \[8, 8, 3\]: expected uint8.*np.uint8\(255 \* image"),
        ((GOOD.astype(np.float64) - 1, 0), r"float64 of shape \[8, 8, 3\]: expected uint8.*before they are normalised"),
        (
            (GOOD.transpose(2, 0, 1), 0),
            r"uint8 of shape \[3, 8, 8\]: expected .*channels come last.*transpose",
        ),
        ((GOOD.astype(np.int64), 0), r"int64 of shape \[8, 8, 3\]: expected uint8 \[H, W, 3\] or \[H, W\]$"),
        ((GOOD[None], 0), r"uint8 of shape \[1, 8, 8, 3\]"),
        ((np.zeros((8, 8, 4), np.uint8), 0), r"uint8 of shape \[8, 8, 4\]"),
        ((np.zeros((0, 8, 3), np.uint8), 0), r"uint8 of shape \[0, 8, 3\]"),
        (("cat.jpg", 0), "is str: expected a pair"),
        ({"image": GOOD, "label": 0}, "is dict with image, label: expected a pair"),
        ((GOOD, 0, 1), "is tuple of 3: expected a pair"),
        (GOOD, r"is uint8 of shape \[8, 8, 3\]: expected a pair"),
        ((GOOD, 2), "has the label 2: expected a number from 0 to 1"),
        ((GOOD, -1), "has the label -1"),
        ((GOOD, 0.0), "has the label 0.0"),
        ((GOOD, "dark"), "has the label 'dark'"),
        ((GOOD, True), "has the label True"),
    ],
)
def test_what_is_no_example(example, message):
    """The first is looked at when the data set is made; others count as damaged images, by their cause."""
    with pytest.raises(ValueError, match=rf"train example 0 .*{message}"):
        data.from_sequences([example], [(GOOD, 0)], CLASSES)
    with pytest.raises(ValueError, match=rf"test example 0 .*{message}"):
        data.from_sequences([(GOOD, 0)], [example], CLASSES)
    late = data.from_sequences([(GOOD, 0)] * 200 + [example], [(GOOD, 0)], CLASSES)
    skipped = in_memory(late).skipped
    assert list(skipped) == ["train example 200"]
    assert skipped["train example 200"] in ("not an image", "not an image and a label", "wrong label")
    with pytest.raises(ValueError, match=rf"train example 200 .*{message}"):
        late.train.reader(200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [(GOOD, 0)], CLASSES), "train has no examples"),
        (([(GOOD, 0)], 5, CLASSES), "test is int: expected something with __len__ and __getitem__"),
        ((iter([(GOOD, 0)]), [(GOOD, 0)], CLASSES), "train is list_iterator: expected something with __len__"),
        (([(GOOD, 0)], [(GOOD, 0)], "dark"), "class_names='dark': expected a name for each label"),
        (([(GOOD, 0)], [(GOOD, 0)], (0, 1)), r"class_names=\(0, 1\): expected a name for each label"),
        (([(GOOD, 0)], [(GOOD, 0)], ("dark", "dark")), "each a text of its own"),
    ],
)
def test_what_is_no_data_set(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.from_sequences(*arguments)


def test_a_class_of_the_script_and_open_files_stay_in_this_process(tmp_path):
    class Local(list):
        pass

    Local.__module__ = "__main__"
    dataset = data.from_sequences(Local([(GOOD, 0)]), [(GOOD, 0)], CLASSES)
    assert in_memory(dataset).train.images.shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match=r"is defined in the script that was started.*move it to a module"):
        streamed(dataset.train)
    with open(tmp_path / "file", "wb") as file:
        opened = Noise("array", 1)
        opened.file = file
        dataset = data.from_sequences(opened, [(GOOD, 0)], CLASSES)
        with pytest.raises(ValueError, match=r"cannot be sent to worker processes \(.*keep=device"):
            streamed(dataset.train)


def test_what_is_sent_arrives():
    value = {"a": np.arange(5), "b": (Noise, "text")}
    again = pickle.loads(pickling.dumps(value))
    np.testing.assert_array_equal(again["a"], value["a"])
    assert again["b"] == value["b"]


def test_one_thread_at_a_time_asks_a_sequence():
    class Careful(Noise):
        inside = 0

        def __getitem__(self, index):
            assert not self.inside
            self.inside += 1
            for _ in range(1000):
                pass
            self.inside -= 1
            return super().__getitem__(index)

    dataset = data.from_sequences(Careful("array", 300), Noise("array", 4), CLASSES)
    assert in_memory(dataset).skipped == {}


def test_nothing_is_cached_of_what_nobody_can_tell_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("NFJAX_CACHE", str(tmp_path / "cache"))
    dark = data.from_sequences([(GOOD, 0)], [(GOOD, 0)], CLASSES)
    bright = data.from_sequences([(GOOD + 200, 0)], [(GOOD, 0)], CLASSES)
    assert in_memory(dark).train.images.max() == 0
    assert in_memory(bright).train.images.max() == 200
    assert not (tmp_path / "cache").exists()
    assert identity(dark)["train"] != identity(bright)["train"]
    assert identity(dark) == identity(data.from_sequences([(GOOD, 0)], [(GOOD, 0)], CLASSES))
    assert contents(dark) != contents(bright)


def test_packed(tmp_path):
    """From a sequence, goes on where it was interrupted, and gives the same pixels."""
    dataset = data.from_sequences(Noise("array", 10), Noise("file", 3), CLASSES)
    manifest = pack.pack(dataset, str(tmp_path / "packed"), source="own", per_shard=4, threads=1)
    assert manifest.labels == {"train": (5, 5), "test": (2, 1)}
    again = pack.pack(dataset, str(tmp_path / "packed"), source="own", per_shard=4, threads=1)
    assert again == manifest
    np.testing.assert_array_equal(
        in_memory(records.load(str(tmp_path / "packed"))).train.images, in_memory(dataset).train.images
    )
    other = data.from_sequences(Noise("grey", 10), Noise("file", 3), CLASSES)
    with pytest.raises(ValueError, match="its files changed"):
        pack.pack(other, str(tmp_path / "packed"), source="own", per_shard=4, threads=1)


@pytest.mark.parametrize("keep", ["device", "disk"])
def test_a_source_of_ones_own_is_trained(tiny_config, tmp_path, keep):
    config = tiny_config
    config.data.source, config.data.dir, config.data.keep, config.data.workers = "own_source:load", "array", keep, 1
    config.epochs, config.batch_size, config.log.every_steps, config.augment.flip = 8, 16, 3, False
    config.optim.learning_rate = 0.1
    summary = train.train(config, str(tmp_path / "run"))
    assert summary["steps"] == 24
    assert summary["test_accuracy"] == 1.0  # brightness is easily seen


@pytest.fixture
def huggingface(tmp_path, monkeypatch):
    """`datasets`, without the network, and with what it keeps below `tmp_path`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    datasets.disable_progress_bars()
    return datasets


def rows(datasets, size, form="pillow", label="label", names=CLASSES):
    examples = [Noise(form, size)[index] for index in range(size)]
    columns = {"img": [image for image, _ in examples], label: [int(number) for _, number in examples]}
    features = {"img": datasets.Image(), label: datasets.ClassLabel(names=list(names))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(datasets, folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return f"huggingface:{folder}"


@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_set_of_hugging_face(huggingface, tmp_path, test):
    source = saved(huggingface, tmp_path / "set", train=rows(huggingface, 9), **{test: rows(huggingface, 4)})
    dataset = data.load(source, "", 8)
    assert dataset.class_names == CLASSES
    assert (len(dataset.train), len(dataset.test)) == (9, 4)
    assert dataset.train.reader(0)[0].startswith(b"\x89PNG")  # as the file holds it
    batch, failures = streamed(dataset.train)
    assert failures == []
    np.testing.assert_array_equal(batch["image"], in_memory(dataset).train.images)
    np.testing.assert_array_equal(batch["image"][0], np.random.default_rng(0).integers(0, 128, (8, 8, 3), np.uint8))
    assert batch["label"].tolist() == [index % 2 for index in range(9)]


def test_a_changed_set_of_hugging_face_is_decoded_anew(huggingface, tmp_path):
    source = saved(huggingface, tmp_path / "set", train=rows(huggingface, 4), test=rows(huggingface, 4))
    first = data.load(source, "", 8)
    assert first.fingerprint() == data.load(source, "", 8).fingerprint()
    other = saved(huggingface, tmp_path / "other", train=rows(huggingface, 4, "grey"), test=rows(huggingface, 4))
    assert first.fingerprint() != data.load(other, "", 8).fingerprint()


def test_images_of_a_folder_that_are_kept_by_their_paths(huggingface, tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (90 * label, i, 0)).save(tmp_path / "set" / split / name / f"{i}.png")
    dataset = data.load(f"huggingface:{tmp_path / 'set'}", str(tmp_path / "kept"), 8)
    assert sorted(dataset.class_names) == sorted(CLASSES)
    whole = in_memory(dataset)
    assert len(whole.train) == 8
    for image, label in zip(whole.train.images, whole.train.labels, strict=True):
        assert image[0, 0, 0] == (90 if dataset.class_names[label] == "bright" else 0)


def test_secret_labels_are_not_scored(huggingface, tmp_path):
    secret = rows(huggingface, 3).map(lambda row: {"label": -1})
    splits = {"train": rows(huggingface, 4), "test": secret, "validation": rows(huggingface, 2)}
    dataset = data.load(saved(huggingface, tmp_path / "set", **splits), "", 8)
    assert len(dataset.test) == 2


def test_what_is_no_image_set_of_hugging_face(huggingface, tmp_path):
    from nfjax.data.sources import huggingface as source

    good = rows(huggingface, 4)
    with pytest.raises(FileNotFoundError, match=r"has the splits train \(4\): expected train, and test or validation"):
        data.load(saved(huggingface, tmp_path / "one", train=good), "", 8)
    with pytest.raises(FileNotFoundError, match=r"huggingface:nobody/nothing cannot be opened.*local directory"):
        data.load("huggingface:nobody/nothing", str(tmp_path / "kept"), 8)
    texts = huggingface.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"has the columns text \(Value\), label \(Value\): expected one Image"):
        data.load(saved(huggingface, tmp_path / "texts", train=texts, test=texts), "", 8)
    two = rows(huggingface, 4, label="fine").add_column("coarse", [0, 1, 1, 0])
    two = two.cast_column("coarse", huggingface.ClassLabel(names=["x", "y"]))
    name = saved(huggingface, tmp_path / "two", train=two, test=two)
    with pytest.raises(ValueError, match=r"fine \(ClassLabel\), coarse \(ClassLabel\).*load\(NAME, label=COLUMN\)"):
        data.load(name, "", 8)
    chosen = source.load(name.partition(":")[2], label="coarse")
    assert chosen.class_names == ("x", "y")
    assert [chosen.train.reader(i)[1] for i in range(4)] == [0, 1, 1, 0]
    swapped = rows(huggingface, 4, names=CLASSES[::-1])
    with pytest.raises(ValueError, match="has other classes, or another order of them, in test than in train"):
        data.load(saved(huggingface, tmp_path / "swapped", train=good, test=swapped), "", 8)


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'needs a package more: pip install "nfjax\[huggingface\]"'):
        data.load("huggingface:uoft-cs/cifar10", "", 8)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, nfjax.data\n"
        "heavy = 'cv2 sklearn scipy PIL tqdm msgspec msgpack datasets tensorflow_datasets etils simplejpeg jax'\n"
        "print(sorted(set(heavy.split()) & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_surface():
    assert set(dir(data)) == set(data.__all__)
    assert all(hasattr(data, name) for name in data.__all__)
    assert dataclasses.is_dataclass(data.Dataset)
