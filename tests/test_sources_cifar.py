"""CIFAR from archives of the published format, a few images each, made by the test."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest

from nfjax.data.sources import cifar


def batch(count, seed, labels_key, classes):
    rng = np.random.default_rng(seed)
    labels = [int(label) for label in rng.integers(0, classes, count)]
    return {b"data": rng.integers(0, 255, (count, 3072), np.uint8), labels_key: labels, b"batch_label": b"a batch"}


def pickled(content):
    """As Python 2 wrote the published files: protocol 2, and its texts are bytes here."""
    return pickle.dumps(content, protocol=2)


def contents_of(archive, classes):
    contents = {
        name: batch(6, i, archive.labels_key, classes) for i, name in enumerate((*archive.train, *archive.test))
    }
    contents[archive.names] = {archive.names_key: [f"class {i}".encode() for i in range(classes)]}
    return {name: pickled(content) for name, content in contents.items()}


def write_tar(archive, file, contents):
    with tarfile.open(file, "w:gz") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"{archive.folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def md5(data):
    return hashlib.md5(data).hexdigest()


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def made(request, tmp_path, monkeypatch):
    """(archive with the checksums of small files, their contents, a tar of them outside the data directory)."""
    original = getattr(cifar, request.param)
    contents = contents_of(original, 10 if request.param == "CIFAR10" else 100)
    tar = tmp_path / "published" / original.file
    tar.parent.mkdir()
    write_tar(original, tar, contents)
    sums = {name: md5(data) for name, data in contents.items()} | {original.file: md5(tar.read_bytes())}
    archive = dataclasses.replace(original, md5=sums)
    monkeypatch.setattr(cifar, request.param, archive)
    return archive, contents, tar


def with_contents(archive, contents, directory):
    """Another archive in `directory`, and the checksums that go with it."""
    directory.mkdir(exist_ok=True)
    write_tar(archive, directory / archive.file, contents)
    sums = {name: md5(data) for name, data in contents.items()}
    return dataclasses.replace(archive, md5=sums | {archive.file: md5((directory / archive.file).read_bytes())})


def check(dataset, archive, contents):
    first = pickle.loads(contents[archive.train[0]], encoding="bytes")
    assert len(dataset.train) == 6 * len(archive.train)
    assert dataset.train.images.shape[1:] == (32, 32, 3)
    np.testing.assert_array_equal(dataset.train.images[3, 5, 7], first[b"data"][3].reshape(3, 32, 32)[:, 5, 7])
    assert dataset.train.labels[:6].tolist() == first[archive.labels_key]
    assert len(dataset.test) == 6
    assert dataset.class_names[1] == "class 1"
    assert len(dataset.class_names) == (10 if archive.title == "CIFAR-10" else 100)


def test_from_the_archive(made, tmp_path):
    archive, contents, tar = made
    dataset = cifar.load(archive, str(tar.parent))
    check(dataset, archive, contents)
    assert os.listdir(tar.parent) == [archive.file]  # nothing is unpacked
    assert dataset.fingerprint() == cifar.load(archive, str(tar.parent)).fingerprint()


def test_from_the_unpacked_folder(made, tmp_path):
    archive, contents, tar = made
    with tarfile.open(tar) as stream:
        stream.extractall(tmp_path / "data", filter="data")
    check(cifar.load(archive, str(tmp_path / "data")), archive, contents)
    (tmp_path / "data" / archive.folder / archive.names).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the file {archive.names}: unpack {archive.file} again"):
        cifar.load(archive, str(tmp_path / "data"))


def test_found(made, tmp_path):
    archive, _, tar = made
    loader = cifar.found(str(tar.parent))
    assert loader is (cifar.load_cifar10 if archive.title == "CIFAR-10" else cifar.load_cifar100)
    assert len(loader(str(tar.parent)).test) == 6
    assert cifar.found(str(tmp_path)) is None


@contextlib.contextmanager
def served(directory):
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=str(directory))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_downloaded_once(made, tmp_path, monkeypatch):
    archive, contents, tar = made
    with served(tar.parent) as url:
        monkeypatch.setattr(cifar, "PAGE", url)
        check(cifar.load(archive, str(tmp_path / "data")), archive, contents)
    assert os.listdir(tmp_path / "data") == [archive.file]
    check(cifar.load(archive, str(tmp_path / "data")), archive, contents)  # from there


def test_a_download_of_something_else_leaves_nothing_behind(made, tmp_path, monkeypatch):
    archive, _, tar = made
    tar.write_bytes(tar.read_bytes()[:-1])
    with served(tar.parent) as url:
        monkeypatch.setattr(cifar, "PAGE", url)
        with pytest.raises(OSError, match=r"cannot be downloaded from http.*is not the published file.*By hand: fetch"):
            cifar.load(archive, str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data") == []


def test_no_network(made, tmp_path, monkeypatch):
    archive, _, _ = made
    monkeypatch.setattr(cifar, "PAGE", "http://127.0.0.1:9/")
    with pytest.raises(
        OSError, match=rf"cannot be downloaded.*By hand: fetch http://127.0.0.1:9/{archive.file} and put"
    ):
        cifar.load(archive, str(tmp_path / "data"))
    with pytest.raises(ValueError, match="no data directory given"):
        cifar.load(archive, "")


def test_a_file_that_is_not_the_published_one(made, tmp_path):
    archive, contents, tar = made
    content = tar.read_bytes()
    for damaged in (content[:-5], content[:100] + bytes([content[100] ^ 1]) + content[101:], b""):
        tar.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"is not the published file: its MD5 is .* Remove it to have it downloaded"
        ):
            cifar.load(archive, str(tar.parent))
    folder = tmp_path / "data" / archive.folder
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data[:-1] if name == archive.test[0] else data)
    with pytest.raises(ValueError, match=f"{archive.test[0]} is not the published file"):
        cifar.load(archive, str(tmp_path / "data"))


class Hostile:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (lambda at: Hostile(os.system, f"touch {at}"), "it asks for (posix|nt).system"),
        (lambda at: Hostile(eval, f"open({str(at)!r}, 'w')"), r"it asks for (__builtin__|builtins)\.eval"),
        (lambda at: Hostile(np.load, str(at)), "it asks for numpy.*load"),
        (lambda at: Hostile(open, str(at), "w"), r"it asks for (io|_io)\.open"),
    ],
)
def test_a_pickle_that_runs_code_is_refused(made, tmp_path, hostile, message, protocol):
    archive, contents, _ = made
    at = tmp_path / "harmed"
    contents = contents | {archive.train[0]: pickle.dumps({b"data": hostile(at)}, protocol=protocol)}
    archive = with_contents(archive, contents, tmp_path / "data")
    with pytest.raises(ValueError, match=rf"{archive.train[0]} cannot be read: {message}, which no data set needs"):
        cifar.load(archive, str(tmp_path / "data"))
    assert not at.exists()


def test_codecs_are_not_a_way_out(made, tmp_path):
    archive, contents, _ = made
    code = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    archive = with_contents(archive, contents | {archive.train[0]: code}, tmp_path / "data")
    with pytest.raises(ValueError, match="it asks for the encoding"):
        cifar.load(archive, str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, key: content | {b"data": content[b"data"][:, :100]}, "holds no images"),
        (lambda content, key: content | {b"data": content[b"data"].astype(np.float32)}, "holds no images"),
        (lambda content, key: content | {b"data": [1, 2]}, "holds no images"),
        (lambda content, key: content | {key: [0]}, "holds no images"),
        (lambda content, key: content | {key: [0, 1, 2, 3, 4, 100]}, "has the label 100: expected 0 to"),
        (lambda content, key: content | {key: [0, 1, 2, 3, 4, -1]}, "has the label -1: expected 0 to"),
        (lambda content, key: {}, "holds no images"),
        (lambda content, key: [1], "holds list, expected a dictionary"),
    ],
)
def test_contents_that_are_no_cifar(made, tmp_path, change, message):
    archive, contents, _ = made
    content = pickle.loads(contents[archive.test[0]], encoding="bytes")
    contents = contents | {archive.test[0]: pickled(change(content, archive.labels_key))}
    archive = with_contents(archive, contents, tmp_path / "data")
    with pytest.raises(ValueError, match=f"{archive.test[0]} {message}"):
        cifar.load(archive, str(tmp_path / "data"))


def test_an_archive_that_lacks_a_file_or_is_none(made, tmp_path):
    archive, contents, _ = made
    lacking = {name: data for name, data in contents.items() if name != archive.names}
    with pytest.raises(ValueError, match=f"lacks {archive.names}"):
        cifar.load(with_contents(archive, lacking, tmp_path / "data"), str(tmp_path / "data"))
    (tmp_path / "data" / archive.file).write_bytes(b"no archive")
    none = dataclasses.replace(archive, md5=archive.md5 | {archive.file: md5(b"no archive")})
    with pytest.raises(ValueError, match="cannot be read"):
        cifar.load(none, str(tmp_path / "data"))


def test_the_published_checksums():
    assert cifar.CIFAR10.md5["cifar-10-python.tar.gz"] == "c58f30108f718f92721af3b95e74349a"
    assert cifar.CIFAR100.md5["cifar-100-python.tar.gz"] == "eb9058c3a382ffc7106e4002c42a8d85"
