"""Sets of TensorFlow Datasets, made here in its own format with its own code, and no TensorFlow."""

import io
import os
import pickle
import subprocess
import sys

import pytest
from fake_bucket import bucket  # noqa: F401
from PIL import Image

from nfjax.data import remote
from nfjax.data.sources import tfds

NAMES = ("ant", "bee", "cat")


def jpeg(value, size=(20, 10)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def make_set(root, splits=None, label=lambda i: i % 3, name="small", file_format="array_record", features=None):
    """A prepared data set: JPEGs of one colour each, four to a shard."""
    import tensorflow_datasets
    from tensorflow_datasets.core import sequential_writer

    directory = root / name / "1.0.0"
    directory.mkdir(parents=True)
    if features is None:
        features = {
            "image": tensorflow_datasets.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tensorflow_datasets.features.ClassLabel(names=list(NAMES)),
            "file_name": tensorflow_datasets.features.Text(),
        }
    identity = tensorflow_datasets.core.DatasetIdentity(
        name=name,
        version=tensorflow_datasets.core.utils.Version("1.0.0"),
        data_dir=str(directory),
        module_name="of a test",
    )
    info = tensorflow_datasets.core.DatasetInfo(
        builder=identity, features=tensorflow_datasets.features.FeaturesDict(features), description="made by a test"
    )
    writer = sequential_writer.SequentialWriter(info, max_examples_per_shard=4, file_format=file_format)
    splits = splits or {"train": 10, "test": 3}
    writer.initialize_splits(list(splits))
    for split, size in splits.items():
        for i in range(size):
            example = {"image": io.BytesIO(jpeg(20 * i)), "label": label(i), "file_name": f"{i}.jpg"}
            writer.add_examples({split: [{key: value for key, value in example.items() if key in features}]})
    writer.close_all()
    return directory


def test_examples_in_order_as_they_were_encoded(tmp_path):
    make_set(tmp_path)
    dataset = tfds.load("small", str(tmp_path))
    assert dataset.class_names == NAMES
    assert (len(dataset.train), len(dataset.test)) == (10, 3)
    read = [dataset.train.reader(dataset.train.reference(i)) for i in range(10)]
    assert read == [(jpeg(20 * i), i % 3) for i in range(10)]
    assert dataset.train.name(7) == "small train example 7"
    assert dataset.skipped == {}


def test_readers_travel_closed(tmp_path):
    make_set(tmp_path)
    reader = tfds.load("small", str(tmp_path)).train.reader
    assert reader(9) == (jpeg(180), 0)
    sent = pickle.dumps(reader)
    assert len(sent) < 1000
    assert pickle.loads(sent)(9) == (jpeg(180), 0)


def test_tensorflow_is_not_imported(tmp_path):
    make_set(tmp_path)
    code = (
        "import sys\n"
        "from nfjax.data.sources import tfds\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"dataset = tfds.load('small', {str(tmp_path)!r})\n"
        "print(dataset.train.reader(5)[1], [m for m in ('tensorflow', 'jax', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "2 []", out.stderr


def test_version_is_chosen_or_named(tmp_path):
    make_set(tmp_path)
    assert len(tfds.load("small:1.0.0", str(tmp_path)).train) == 10
    with pytest.raises(FileNotFoundError, match=r"no prepared data set small:2\.0\.0"):
        tfds.load("small:2.0.0", str(tmp_path))


def test_validation_where_there_is_no_test(tmp_path):
    make_set(tmp_path, {"train": 4, "validation": 2})
    assert tfds.load("small", str(tmp_path)).test.name(0) == "small validation example 0"


def test_validation_where_the_labels_of_test_are_secret(tmp_path):
    directory = make_set(tmp_path, {"train": 4, "test": 3, "validation": 2})
    assert tfds.load("small", str(tmp_path)).test.name(0) == "small test example 0"
    rewrite(directory / "small-test.array_record-00000", [(jpeg(0), -1)] * 3)
    assert tfds.load("small", str(tmp_path)).test.name(0) == "small validation example 0"


def rewrite(shard, examples):
    """Another content of a shard, which tfds's own checks of labels would refuse to write."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
    for image, label in examples:
        feature = {
            "image": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[image])),
            "label": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
        }
        features = tf_feature_pb2.Features(feature=feature)
        writer.write(tf_example_pb2.Example(features=features).SerializeToString())
    writer.close()


def test_labels_out_of_range(tmp_path):
    directory = make_set(tmp_path)
    rewrite(directory / "small-train.array_record-00001", [(jpeg(0), 0), (jpeg(0), 3), (jpeg(0), -1), (jpeg(0), 2)])
    reader = tfds.load("small", str(tmp_path)).train.reader
    for index, label in ((5, 3), (6, -1)):
        with pytest.raises(ValueError, match=rf"small train example {index} has the label {label}: expected 0 to 2"):
            reader(index)
    assert reader(7)[1] == 2


def test_damaged_examples_are_named_and_take_no_other_with_them(tmp_path):
    directory = make_set(tmp_path)
    shard = directory / "small-train.array_record-00000"
    data = bytearray(shard.read_bytes())
    data[500] ^= 1  # within the compressed first examples
    shard.write_bytes(bytes(data))
    reader = tfds.load("small", str(tmp_path)).train.reader
    good = {}
    for i in range(10):
        try:
            good[i] = reader(i)
        except ValueError as error:
            assert f"small train example {i} is damaged" in str(error)  # noqa: PT017
    assert len(good) == 9
    assert all(example == (jpeg(20 * i), i % 3) for i, example in good.items())


def test_what_is_no_example(tmp_path):
    from array_record.python import array_record_module

    directory = make_set(tmp_path)
    writer = array_record_module.ArrayRecordWriter(str(directory / "small-train.array_record-00000"), "group_size:1")
    for data in (b"\xff\xff\xff", b"", b"no example", b"\x0a\x00"):
        writer.write(data)
    writer.close()
    reader = tfds.load("small", str(tmp_path)).train.reader
    for i in range(4):
        with pytest.raises(ValueError, match=rf"small train example {i} (cannot be parsed|holds no encoded image)"):
            reader(i)


def test_missing_shard(tmp_path):
    directory = make_set(tmp_path)
    dataset = tfds.load("small", str(tmp_path))
    (directory / "small-train.array_record-00001").unlink()
    assert dataset.train.reader(0)[1] == 0
    with pytest.raises(OSError, match="small train example 5"):
        dataset.train.reader(5)
    with pytest.raises(FileNotFoundError, match=r"small-train\.array_record-00001 is missing"):
        tfds.load("small", str(tmp_path))


PREPARE = r"""pip install "nfjax\[prepare\]".*tfds.builder\('small', data_dir='.*', file_format='array_record'\)"""


def test_what_is_not_prepared_says_how(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)holds no prepared data set small.*" + PREPARE):
        tfds.load("small", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"(?s)nowhere does not exist.*" + PREPARE):
        tfds.load("small", str(tmp_path / "nowhere"))


def test_prepared_as_tfrecord_says_how(tmp_path):
    info = make_set(tmp_path) / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match=r"(?s)is prepared as tfrecord.*" + PREPARE):
        tfds.load("small", str(tmp_path))


@pytest.mark.parametrize("name", ["", "small/", "a b", "../small", "https://x"])
def test_names(tmp_path, name):
    with pytest.raises(ValueError, match="names no data set: expected tfds:NAME"):
        tfds.load(name, str(tmp_path))


def test_features_and_splits_expected(tmp_path):
    import tensorflow_datasets

    label = tensorflow_datasets.features.ClassLabel(names=list(NAMES))
    make_set(tmp_path, name="unlabelled", features={"label": label, "file_name": tensorflow_datasets.features.Text()})
    make_set(tmp_path, {"train": 2}, name="untested")
    make_set(tmp_path, {"test": 2}, name="untrained")
    with pytest.raises(
        ValueError, match=r"no image classification set.*it has file_name \(Text\), label \(ClassLabel\)"
    ):
        tfds.load("unlabelled", str(tmp_path))
    with pytest.raises(ValueError, match=r"no split test or validation with examples: it has train \(2\)"):
        tfds.load("untested", str(tmp_path))
    with pytest.raises(ValueError, match=r"no split train with examples: it has test \(2\)"):
        tfds.load("untrained", str(tmp_path))


def test_fingerprint_changes_with_the_data(tmp_path):
    directory = make_set(tmp_path)
    first = tfds.load("small", str(tmp_path)).fingerprint()
    assert tfds.load("small", str(tmp_path)).fingerprint() == first
    os.utime(directory / "small-test.array_record-00000", (1, 1))
    assert tfds.load("small", str(tmp_path)).fingerprint() != first


def test_from_a_bucket_through_a_local_copy(tmp_path, bucket, monkeypatch):  # noqa: F811
    make_set(bucket / "sets")
    dataset = tfds.load("small", "gs://bucket/sets")
    assert [dataset.train.reader(i)[1] for i in range(10)] == [i % 3 for i in range(10)]
    monkeypatch.setattr(remote, "_copy_one", lambda *args: pytest.fail("copied again"))
    assert tfds.load("small", "gs://bucket/sets").train.reader(3) == dataset.train.reader(3)
    (copy,) = (tmp_path / "cache" / "mirror").iterdir()
    assert copy.name.startswith("bucket-sets-small-1-0-0-")


def test_one_class_is_refused(tmp_path):
    import tensorflow_datasets

    features = {
        "image": tensorflow_datasets.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tensorflow_datasets.features.ClassLabel(names=["ant"]),
    }
    make_set(tmp_path, label=lambda i: 0, features=features)
    with pytest.raises(ValueError, match=r"the classes of tfds:small: ant; expected at least two"):
        tfds.load("small", str(tmp_path))


def test_the_fingerprint_sees_a_shard_made_anew_with_the_same_size_and_time(tmp_path):
    directory = make_set(tmp_path)
    before = tfds.load("small", str(tmp_path)).fingerprint()
    shard = sorted(directory.glob("*train*"))[0]
    content, status = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[::-1])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert tfds.load("small", str(tmp_path)).fingerprint() != before
