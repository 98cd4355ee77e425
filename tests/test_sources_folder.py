"""Folders of images: what is listed, in which order, and what is said where something is missing."""

import os
import pickle
import time

import numpy as np
import pytest
from absl import logging
from scipy import io

from nfjax.data import splits
from nfjax.data.decoding import formats
from nfjax.data.sources import cifar, folder


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: found.append(text % args))
    return found


def make(root, files):
    """Files whose content is their own path."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def make_folder(root, splits=("train", "test"), classes=("ant", "bee"), per_class=3):
    return make(root, [f"{s}/{c}/{i}.jpg" for s in splits for c in classes for i in range(per_class)])


def contents(split):
    return [split.reader(split.reference(i)) for i in range(len(split))]


def test_files_in_order_read_when_they_are_asked_for(tmp_path):
    make_folder(tmp_path)
    dataset = folder.load(str(tmp_path))
    assert dataset.class_names == ("ant", "bee")
    assert contents(dataset.train) == [
        (f"train/{name}/{i}.jpg".encode(), label) for label, name in enumerate(("ant", "bee")) for i in range(3)
    ]
    assert dataset.train.reference(4) == (b"train/bee/1.jpg", 1)
    assert dataset.train.name(4) == "train/bee/1.jpg"
    (tmp_path / "train" / "bee" / "1.jpg").write_bytes(b"changed")
    assert dataset.train.reader(dataset.train.reference(4)) == (b"changed", 1)
    (tmp_path / "train" / "bee" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        dataset.train.reader(dataset.train.reference(4))


def test_the_reader_travels_without_the_listing(tmp_path):
    make_folder(tmp_path, per_class=1000)
    dataset = folder.load(str(tmp_path))
    assert len(pickle.dumps(dataset.train.reader)) < 300
    assert pickle.loads(pickle.dumps(dataset.train.reader))((b"train/ant/7.jpg", 0)) == (b"train/ant/7.jpg", 0)


def test_subfolders_links_and_hidden_files(tmp_path):
    make_folder(tmp_path)
    ant = tmp_path / "train" / "ant"
    make(ant, ["b/9.jpg", "a/8.jpg", ".hidden", ".dir/1.jpg"])
    (tmp_path / "train" / ".git").mkdir()
    (tmp_path / "train" / "README").write_text("of no class")
    (ant / "loop").symlink_to(".")
    (ant / "upwards").symlink_to("..")  # to the images of other classes
    (ant / "z.jpg").symlink_to("nowhere")
    (ant / "circle").symlink_to("circle")
    make(tmp_path / "elsewhere", ["e.jpg"])
    (ant / "linked").symlink_to(tmp_path / "elsewhere")
    dataset = folder.load(str(tmp_path))
    listed = [dataset.train.name(i).removeprefix("train/ant/") for i in range(len(dataset.train)) if i < 8]
    assert listed == ["0.jpg", "1.jpg", "2.jpg", "circle", "z.jpg", "a/8.jpg", "b/9.jpg", "linked/e.jpg"]
    with pytest.raises(OSError, match=r"No such file"):
        dataset.train.reader(dataset.train.reference(4))
    with pytest.raises(OSError, match=r"symbolic links"):
        dataset.train.reader(dataset.train.reference(3))


def test_a_pipe_does_not_hang(tmp_path):
    make_folder(tmp_path)
    os.mkfifo(tmp_path / "train" / "ant" / "0.pipe")
    dataset = folder.load(str(tmp_path))
    with pytest.raises(OSError, match=r"train/ant/0\.pipe is no regular file"):
        dataset.train.reader((b"train/ant/0.pipe", 0))
    with pytest.raises(OSError, match="directory"):
        dataset.train.reader((b"train/ant", 0))


def test_a_file_too_large_is_not_read(tmp_path):
    make_folder(tmp_path)
    with open(tmp_path / "train" / "ant" / "0.jpg", "wb") as stream:
        stream.truncate(10 * 2**30)
    with pytest.raises(ValueError, match=r"too large: 10737418240 bytes"):
        folder.load(str(tmp_path)).train.reader((b"train/ant/0.jpg", 0))


def test_names_that_are_no_text(tmp_path):
    make_folder(tmp_path)
    with open(os.fsencode(tmp_path) + b"/train/ant/\xff\xfe.jpg", "wb") as stream:
        stream.write(b"here")
    dataset = folder.load(str(tmp_path))
    assert dataset.train.name(3) == r"train/ant/\xff\xfe.jpg"
    assert dataset.train.reader(dataset.train.reference(3)) == (b"here", 0)
    dataset.fingerprint()


def test_the_listing_is_compact_and_fast(tmp_path, monkeypatch):
    make_folder(tmp_path, per_class=1)
    names = [f"n01440764_{i}.JPEG".encode() for i in range(100_000)]
    monkeypatch.setattr(folder, "_walk", lambda place, prefix: (prefix + name for name in names))
    start = time.monotonic()
    files = folder.load(str(tmp_path)).train
    assert time.monotonic() - start < 10
    assert len(files) == 200_000
    assert files.reference(123_456) == (b"train/bee/n01440764_23456.JPEG", 1)
    arrays = (files._ends, files.labels)
    assert len(files._names) + sum(array.nbytes for array in arrays) < 50 * len(files)


def test_val_serves_as_test(tmp_path):
    make_folder(tmp_path, splits=("train", "val"))
    assert folder.load(str(tmp_path)).test.name(0) == "val/ant/0.jpg"


def test_a_class_that_test_lacks_is_a_warning(tmp_path, warnings):
    make_folder(tmp_path, classes=("ant", "bee", "cat"))
    for i in range(3):
        (tmp_path / "test" / "bee" / f"{i}.jpg").unlink()
    dataset = folder.load(str(tmp_path))
    assert dataset.test.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert warnings == [f"{tmp_path}/test has no image of 1 classes: bee"]


def test_a_class_that_train_lacks_is_an_error(tmp_path):
    make_folder(tmp_path)
    make_folder(tmp_path, classes=("cat",), splits=("test",))
    with pytest.raises(ValueError, match=r"class folders that .*train lacks: cat"):
        folder.load(str(tmp_path))


def test_a_train_class_without_files_is_an_error(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"class folders without files: cat; fill or remove them"):
        folder.load(str(tmp_path))


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda root: root.rmdir(), FileNotFoundError, "does not exist"),
        (lambda root: (root.rmdir(), root.write_text("")), NotADirectoryError, "is a file"),
        (lambda root: None, FileNotFoundError, "has no folder train: it holds nothing"),
        (
            lambda root: make_folder(root, splits=("train",)),
            FileNotFoundError,
            r"has no folder test \(or val\): it holds train",
        ),
        (
            lambda root: [(root / split).mkdir() for split in ("train", "test")],
            FileNotFoundError,
            "train has no class folders",
        ),
        (
            lambda root: [(root / split / "ant").mkdir(parents=True) for split in ("train", "test")],
            FileNotFoundError,
            "no files in them",
        ),
        (
            lambda root: (make_folder(root, splits=("train",)), (root / "val").mkdir()),
            FileNotFoundError,
            "val has no class folders and no files",
        ),
    ],
)
def test_missing_parts_are_named_with_the_layout_expected(tmp_path, prepare, error, message):
    root = tmp_path / "set"
    root.mkdir()
    prepare(root)
    with pytest.raises(error, match=message) as caught:
        folder.load(str(root))
    assert f"{root}/train/<class>/*.jpg" in str(caught.value)


def test_no_directory():
    with pytest.raises(ValueError, match=r"no data directory given; set it with --config\.data\.dir"):
        folder.load("")


def test_fingerprint_changes_with_the_files(tmp_path):
    make_folder(tmp_path)
    first = folder.load(str(tmp_path)).fingerprint()
    assert folder.load(str(tmp_path)).fingerprint() == first
    os.utime(tmp_path / "test" / "bee" / "2.jpg", (1, 1))
    assert folder.load(str(tmp_path)).fingerprint() != first


def test_cifar_archives_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "load_cifar100", lambda directory: f"CIFAR-100 in {directory}")
    (tmp_path / "cifar-100-python").mkdir()
    assert folder.load(str(tmp_path)) == f"CIFAR-100 in {tmp_path}"


# The flat validation folder.

WNIDS = ("n01", "n02", "n03")


def make_flat(root, count=5, classes=WNIDS, pattern="ILSVRC2012_val_{:08d}.JPEG"):
    make_folder(root, splits=("train",), classes=classes)
    return make(root, [f"val/{pattern.format(i)}" for i in range(1, count + 1)])


def make_devkit(place, numbers, ids={1: "n03", 2: "n01", 3: "n02"}):  # noqa: B006
    """As ImageNet's development kit: ids in an order of their own, and inner nodes behind the leaves."""
    place.mkdir(parents=True, exist_ok=True)
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    nodes = [(number, wnid, "a word, another", 0) for number, wnid in ids.items()] + [(len(ids) + 1, "n99", "node", 3)]
    synsets = np.array(nodes, dtype).reshape(-1, 1)
    io.savemat(place / "meta.mat", {"synsets": synsets})
    (place / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in numbers))


def test_a_flat_test_folder_without_labels_does_not_hide_val(tmp_path):
    """Kaggle's copy of ImageNet."""
    make_flat(tmp_path, count=3)
    make(tmp_path, ["test/ILSVRC2012_test_00000001.JPEG"])
    rows = "".join(f"ILSVRC2012_val_{i:08d},n0{i} 1 2 3 4\n" for i in (1, 2, 3))
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    assert folder.load(str(tmp_path)).test.labels.tolist() == [0, 1, 2]
    (tmp_path / "test.csv").write_text("ILSVRC2012_test_00000001,n02\n")
    assert folder.load(str(tmp_path)).test.labels.tolist() == [1]


@pytest.mark.parametrize("place", [".", "val", "devkit", "devkit/data", "ILSVRC2012_devkit_t12/data"])
def test_ground_truth_of_the_development_kit(tmp_path, place):
    make_flat(tmp_path)
    make_devkit(tmp_path / place, [1, 2, 3, 3, 1])
    dataset = folder.load(str(tmp_path))
    assert dataset.test.labels.tolist() == [2, 0, 1, 1, 2]
    assert dataset.test.name(0) == "val/ILSVRC2012_val_00000001.JPEG"
    assert contents(dataset.test)[3] == (b"val/ILSVRC2012_val_00000004.JPEG", 1)
    assert dataset.skipped == {}


def test_ground_truth_goes_by_the_number_in_the_name(tmp_path, warnings):
    make_flat(tmp_path)
    make_devkit(tmp_path, [1, 2, 3, 3, 1])
    (tmp_path / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    assert folder.load(str(tmp_path)).test.labels.tolist() == [2, 1, 1, 2]
    assert "has 5 lines for 4 files" in warnings[0]


def test_ground_truth_of_other_names_goes_by_their_order(tmp_path):
    make_flat(tmp_path, pattern="image{}.jpg")
    make_devkit(tmp_path, [1, 2, 3, 3, 1])
    assert folder.load(str(tmp_path)).test.labels.tolist() == [2, 0, 1, 1, 2]
    (tmp_path / "val" / "image2.jpg").unlink()  # now the order would give the others' labels
    with pytest.raises(ValueError, match=r"has 5 lines for 4 files.*which belongs to which is unknown"):
        folder.load(str(tmp_path))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1, 2, 4, 3, 1], "line 3 is '4': expected one of the 3 numbers"),
        ([1, 0, 2, 3, 1], "line 2 is '0'"),
        ([1, "x", 2, 3, 1], "line 2 is 'x'"),
        ([1, 2, 3], r"ILSVRC2012_val_00000004\.JPEG has no line in .*, which has 3 lines"),
    ],
)
def test_bad_ground_truth(tmp_path, numbers, message):
    make_flat(tmp_path)
    make_devkit(tmp_path, numbers)
    with pytest.raises(ValueError, match=message):
        folder.load(str(tmp_path))


def test_ground_truth_without_its_numbers(tmp_path):
    make_flat(tmp_path)
    make_devkit(tmp_path, [1, 2, 3, 3, 1])
    (tmp_path / "meta.mat").write_text("no MATLAB file")
    with pytest.raises(ValueError, match=r"meta\.mat is no meta\.mat of ImageNet's development kit"):
        folder.load(str(tmp_path))
    (tmp_path / "meta.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"meta\.mat, which names them, is missing"):
        folder.load(str(tmp_path))


def test_ground_truth_of_classes_that_train_lacks(tmp_path):
    make_flat(tmp_path, classes=("n01", "n02"))
    make_devkit(tmp_path, [1, 2, 3, 3, 1])
    with pytest.raises(ValueError, match="images of 1 classes that train lacks, such as n03"):
        folder.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.csv", "{0},n03\n{1},n01\n{2},n02\n"),
        ("val/labels.csv", "filename,label\nval/{0},n03\n{1}, n01\n\n{2},n02\n"),
        ("val_labels.csv", '\ufeff"{0}","n03"\r\n"{1}","n01"\r\n"{2}","n02"\r\n'),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\n{2s},n02 1 2 3 4 n02 5 6 7 8 \n{0s},n03 1 2 3 4 \n{1s},n01 \n",
        ),
    ],
)
def test_labels_as_csv(tmp_path, name, text):
    make_flat(tmp_path, count=3)
    files = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)]
    for i, file in enumerate(files):
        text = text.replace(f"{{{i}}}", file).replace(f"{{{i}s}}", file.removesuffix(".JPEG"))
    (tmp_path / name).write_text(text, newline="")
    dataset = folder.load(str(tmp_path))
    assert dataset.test.labels.tolist() == [2, 0, 1]
    assert [dataset.test.name(i) for i in range(3)] == [f"val/{file}" for file in files]


def test_class_names_with_spaces(tmp_path):
    make_flat(tmp_path, count=1, classes=("great auk", "great"), pattern="{}.jpg")
    (tmp_path / "val.csv").write_text("1.jpg,great auk\n")
    assert folder.load(str(tmp_path)).test.labels.tolist() == [1]


def test_files_without_a_label_and_labels_without_a_file(tmp_path, warnings):
    make_flat(tmp_path, count=200, pattern="{}.jpg")
    rows = [f"{i}.jpg,n0{1 + i % 3}\n" for i in range(1, 203) if i != 7]
    (tmp_path / "val.csv").write_text("".join(rows))
    dataset = folder.load(str(tmp_path))
    assert dataset.skipped == {"val/7.jpg": "no label in val.csv"}
    assert len(dataset.test) == 199
    assert warnings == [f"{tmp_path}/val.csv has labels of 2 files that are not there, such as 201.jpg"]
    (tmp_path / "val.csv").write_text("".join(rows[:150]))
    with pytest.raises(
        ValueError, match=r"50 of the 200 files in .*val have no label, more than 1%.*no label in val\.csv"
    ):
        folder.load(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "1.jpg,n01\n2.jpg,n07\n",
            ValueError,
            r"line 2 gives 2\.jpg the class 'n07', which train lacks.*such as n01, n02",
        ),
        ("1.jpg,0\n", ValueError, "the class '0', which train lacks"),
        ("1.jpg\n", ValueError, r"line 1 is '1\.jpg': expected a file name and a class"),
        ("1.jpg,n01\n1.jpg,n02\n", ValueError, r"line 2 gives 1\.jpg a second class, 'n02'"),
        ("a.jpg,n01\n", ValueError, r"labels none of the 2 files: it names a\.jpg, they are named 1\.jpg, 2\.jpg"),
        ("", ValueError, "labels none of the 2 files"),
    ],
)
def test_bad_csv(tmp_path, text, error, message):
    make_flat(tmp_path, count=2, pattern="{}.jpg")
    (tmp_path / "val.csv").write_text(text)
    with pytest.raises(error, match=message):
        folder.load(str(tmp_path))


def test_a_flat_folder_without_labels_says_what_was_looked_for(tmp_path):
    make_flat(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        folder.load(str(tmp_path))
    for part in (
        "val.csv",
        "LOC_val_solution.csv",
        "ILSVRC2012_validation_ground_truth.txt",
        str(tmp_path / "devkit" / "data"),
    ):
        assert part in str(caught.value)


# What is no image, and folders that are one level off.

PNG = b"\x89PNG\r\n\x1a\n and so on"


def test_what_is_no_image_is_left_aside_and_counted(tmp_path):
    """Found beside images: what systems, archives and labelling tools leave there."""
    make_folder(tmp_path)
    ant = tmp_path / "train" / "ant"
    for name, content in {
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "desktop.ini": b"[.ShellClassInfo]",
        "0.txt": b"0 0.5 0.5 0.1 0.1",
        "1.txt": b"P3 is no picture",
        "images.zip": b"PK\x03\x04",
        "README": b"BM is how a bitmap begins, and this text",
        "empty": b"",
        "figure.eps": b"%!PS-Adobe-3.0 EPSF-3.0",
    }.items():
        (ant / name).write_bytes(content)
    (tmp_path / "test" / "bee" / "list.TXT").write_text("")
    os.mkfifo(ant / "pipe")
    dataset = folder.load(str(tmp_path))
    assert [dataset.train.name(i) for i in range(4)] == [*(f"train/ant/{i}.jpg" for i in range(3)), "train/bee/0.jpg"]
    assert (len(dataset.train), len(dataset.test)) == (6, 6)
    assert dataset.left_aside == {".txt": 3, ".db": 1, ".ini": 1, ".zip": 1, "no ending": 3, ".eps": 1}
    assert dataset.skipped == {}
    assert splits.left_aside(dataset.left_aside).startswith(
        "10 files that are no images are left aside (3 .txt, 3 no ending, 1 "
    )
    assert dataset.thinned(0.5).left_aside == dataset.left_aside


def test_images_of_another_name_or_none_are_images(tmp_path):
    make_folder(tmp_path)
    ant = tmp_path / "train" / "ant"
    beginnings = {
        "photo": b"\xff\xd8\xff\xe0\x00\x10JFIF",
        "photo.jpg.1": b"\xff\xd8\xff\xe1",
        "cat.data": PNG,
        "dog.bak": b"RIFF\x24\x00\x00\x00WEBPVP8 ",
        "scan.1": b"II*\x00\x08\x00\x00\x00",
        "map": b"P5\n# comment\n3 3\n",
        "bitmap": b"BM" + (70).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + b"\x28\0\0\0",
        "phone": b"\x00\x00\x00\x18ftypheic",
    }
    for name, content in beginnings.items():
        (ant / name).write_bytes(content)
    (ant / "broken.PNG").write_text("an image by its name, and a broken one")
    dataset = folder.load(str(tmp_path))
    listed = {dataset.train.name(i).removeprefix("train/ant/") for i in range(len(dataset.train))}
    assert listed >= {*beginnings, "broken.PNG"}
    assert dataset.left_aside == {}


def test_images_by_their_ending_are_not_opened(tmp_path, monkeypatch):
    """A listing of a million files would take minutes."""
    make_folder(tmp_path)
    monkeypatch.setattr(formats, "begins_like_one", lambda data: pytest.fail("it was opened"))
    assert len(folder.load(str(tmp_path)).train) == 6


def test_a_flat_test_folder_with_other_files_in_it(tmp_path):
    make_flat(tmp_path)
    make_devkit(tmp_path / "val", [1, 2, 3, 3, 1])
    make(tmp_path, ["val/Thumbs.db", "val/readme.md"])
    dataset = folder.load(str(tmp_path))
    assert dataset.test.labels.tolist() == [2, 0, 1, 1, 2]
    assert dataset.left_aside == {".db": 1, ".md": 1}  # and not the labels


def test_one_class_is_refused(tmp_path):
    make_folder(tmp_path, classes=("ant",))
    with pytest.raises(
        ValueError, match=r"the class folders of .*train: ant; expected at least two, for a network that"
    ):
        folder.load(str(tmp_path))


def test_classes_one_level_too_deep(tmp_path):
    make(tmp_path, [f"{split}/images/{name}/{i}.jpg" for split in ("train", "test") for name in "abcde" for i in "12"])
    make(tmp_path, ["train/images/labels.txt"])
    with pytest.raises(ValueError, match="expected at least two") as caught:
        folder.load(str(tmp_path))
    train = tmp_path / "train"
    assert f"{train / 'images'} holds a, b, c, d and more" in str(caught.value)
    assert f"move them to {train}/<class>" in str(caught.value)
    make(tmp_path, ["train/images/train/a/1.jpg"])
    with pytest.raises(ValueError, match=rf"did you mean --config\.data\.dir={train}/images\?"):
        folder.load(str(tmp_path))


def test_class_folders_of_folders_are_pointed_out(tmp_path, warnings):
    """They may be meant so; a folder images within each class, as of Tiny ImageNet, says nothing."""
    names = [f"{c}/images/{i}.jpg" for c in ("ant", "bee") for i in "12"]
    make(tmp_path, [f"{split}/{name}" for split in ("train", "test") for name in names])
    make(tmp_path, ["train/ant/boxes.txt"])
    assert len(folder.load(str(tmp_path)).train) == 4
    assert warnings == []
    make(tmp_path, [f"{split}/cat/{kind}/1.jpg" for split in ("train", "test") for kind in ("tom", "felix")])
    assert folder.load(str(tmp_path)).train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(warnings) == 1
    assert warnings[0].startswith("1 of 3 class folders hold only folders, whose images count as one class: ")
    assert f"{tmp_path}/train/cat holds felix, tom." in warnings[0]
    make(tmp_path, ["train/cat/3.jpg"])
    folder.load(str(tmp_path))
    assert len(warnings) == 1


@pytest.mark.parametrize("given", ["..", "train", "test"])
def test_a_directory_one_level_off_is_named(tmp_path, given):
    make_folder(tmp_path / "set")
    wrong = (tmp_path / "set" / given).resolve()
    with pytest.raises(FileNotFoundError, match=rf"did you mean --config\.data\.dir={tmp_path}/set\?"):
        folder.load(str(wrong))


def test_the_fingerprint_sees_files_made_anew_with_the_same_size_and_time(tmp_path):
    make_folder(tmp_path)
    file = tmp_path / "test" / "bee" / "2.jpg"
    before, status = folder.load(str(tmp_path)).fingerprint(), file.stat()
    file.write_bytes(bytes(len(file.read_bytes())))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert folder.load(str(tmp_path)).fingerprint() != before
