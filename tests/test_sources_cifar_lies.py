"""Archives of CIFAR that lie, as if their checksums could be forged: nothing is built, written or kept but images."""

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
from test_sources_cifar import contents_of, md5, pickled, with_contents

from nfjax.data.sources import cifar

ARCHIVE, CONTENTS = cifar.CIFAR10, contents_of(cifar.CIFAR10, 10)
FIRST = ARCHIVE.train[0]


class State:
    """What pickles as an array whose state is whatever is given."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


class Dtype:
    """What pickles as a dtype with a state of its own."""

    def __init__(self, name, *state):
        self.name, self.state = name, state

    def __reduce__(self):
        return np.dtype, (self.name, False, True), self.state


BYTES = Dtype("u1", 3, "|", None, None, None, -1, -1, 0)
# An array of pointers that says that it holds none, over bytes: NumPy's own reader takes them for objects.
POINTERS = Dtype("O8", 3, "|", None, None, None, -1, -1, 0)


def loaded(tmp_path, contents):
    return cifar.load(with_contents(ARCHIVE, CONTENTS | contents, tmp_path / "data"), str(tmp_path / "data"))


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_what_its_bytes_say(tmp_path, order):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 3072), np.uint8)
    content = {b"data": np.asarray(pixels, order=order), b"labels": [0] * 6}
    images = loaded(tmp_path, {FIRST: pickled(content)}).train.images[:6]
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(6, 3072), pixels)


@pytest.mark.parametrize(
    "array",
    [
        State(1, (6, 3072), POINTERS, False, b"\x41" * (6 * 3072 * 8)),
        State(1, (6, 3072), Dtype("O8", 3, "|", None, None, None, -1, -1, 63), False, [None] * (6 * 3072)),
        State(1, (6, 3072), Dtype("f4", 3, "<", None, None, None, -1, -1, 0), False, b"\0" * (6 * 3072 * 4)),
        State(1, (6, 3072), BYTES, False, b"\0" * (6 * 3072 - 1)),
        State(1, (1 << 40, 3072), BYTES, False, b""),
        State(1, (-6, -3072), BYTES, False, b"\0" * (6 * 3072)),
        State(1, (6.0, 3072), BYTES, False, b"\0" * (6 * 3072)),
        State(1, (6, 3072), "u1", False, b"\0" * (6 * 3072)),
        State(1, (6, 3072), BYTES, False, [0] * (6 * 3072)),
        State(1, (18432,), BYTES, False, b"\0" * (6 * 3072)),
    ],
)
def test_an_array_whose_state_lies_is_not_built(tmp_path, array):
    with pytest.raises(ValueError, match=rf"{FIRST} holds no images \[N, 3072\] with N labels"):
        loaded(tmp_path, {FIRST: pickle.dumps({b"data": array, b"labels": [0] * 6}, protocol=3)})


@pytest.mark.parametrize("state", [State(), State(1, 5, BYTES, False, b""), State(1, (6,), BYTES)])
def test_an_array_without_a_state_is_damage(tmp_path, state):
    with pytest.raises(ValueError, match=rf"{FIRST} (cannot be read|holds no images)"):
        loaded(tmp_path, {FIRST: pickle.dumps({b"data": state, b"labels": []}, protocol=2)})


@pytest.mark.parametrize("label", [True, 1.0, None, "1", 10])
def test_labels_are_numbers_of_classes(tmp_path, label):
    content = pickle.loads(CONTENTS[FIRST], encoding="bytes") | {b"labels": [0, 0, 0, 0, 0, label]}
    with pytest.raises(ValueError, match=rf"{FIRST} has the label .*: expected 0 to 9"):
        loaded(tmp_path, {FIRST: pickled(content)})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "names no classes"),
        ([b"a", b""], "names no classes"),
        ([b"a", 5], "names no classes"),
        (b"abcdefghij", "names no classes"),
        ([b"a"] * 10, "names a class twice"),
        (5, "names no classes"),
    ],
)
def test_class_names_are_names(tmp_path, names, message):
    with pytest.raises(ValueError, match=rf"batches\.meta {message}\. By hand"):
        loaded(tmp_path, {ARCHIVE.names: pickle.dumps({b"label_names": names}, protocol=3)})


def test_class_names_in_another_encoding_are_shown_as_they_are(tmp_path):
    names = [b"\xe4", *(str(i).encode() for i in range(9))]
    assert loaded(tmp_path, {ARCHIVE.names: pickled({b"label_names": names})}).class_names[:2] == (r"\xe4", "0")


# ---------------------------------------------------------------- tar


def tarred(tmp_path, members, mode="w:gz"):
    """An archive of these tar members, (TarInfo, data), before the good ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    good = [(tarfile.TarInfo(f"{ARCHIVE.folder}/{name}"), data) for name, data in CONTENTS.items()]
    with tarfile.open(folder / ARCHIVE.file, mode) as tar:
        for member, data in [*members, *good]:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return dataclasses.replace(ARCHIVE, md5=ARCHIVE.md5 | {ARCHIVE.file: md5((folder / ARCHIVE.file).read_bytes())})


def member(name, kind=tarfile.REGTYPE, link=""):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found, b""


def test_members_that_lead_elsewhere_are_not_looked_at(tmp_path):
    first = f"{ARCHIVE.folder}/{FIRST}"
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    members = [member("../../victim"), member("/victim"), *(member(first, kind, "/etc/passwd") for kind in kinds)]
    archive = tarred(tmp_path, members)
    before = sorted(tmp_path.rglob("*"))
    assert len(cifar.load(archive, str(tmp_path / "data")).train) == 30
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_of_any_number_of_zeros_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "LARGEST", 50_000)
    archive = tarred(tmp_path, [(tarfile.TarInfo(f"{ARCHIVE.folder}/{FIRST}"), b"\0" * 10**6)])
    assert (tmp_path / "data" / archive.file).stat().st_size < 10**6 / 5
    with pytest.raises(ValueError, match=rf"{FIRST} has 1,000,000 bytes, expected at most 50,000\. By hand"):
        cifar.load(archive, str(tmp_path / "data"))


def test_no_damage_of_an_archive_gives_a_traceback(tmp_path):
    archive = tarred(tmp_path, [])
    file = tmp_path / "data" / archive.file
    content = file.read_bytes()
    rng, passed = np.random.default_rng(0), []
    for at in [*range(20), *rng.integers(0, len(content), 60)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        damaged = bytes(damaged) if at % 3 else bytes(damaged[:at])
        file.write_bytes(damaged)
        forged = dataclasses.replace(archive, md5=archive.md5 | {archive.file: md5(damaged)})
        with contextlib.suppress(ValueError):  # and nothing else
            cifar.load(forged, str(tmp_path / "data"))
            passed.append(at)
    assert len(passed) < 40  # pixels, which only the checksum knows, and the date


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / ARCHIVE.file)
    with pytest.raises(ValueError, match=rf"{ARCHIVE.file} is a folder, a pipe or a device: expected an archive"):
        cifar.load(ARCHIVE, str(tmp_path))
    (tmp_path / ARCHIVE.folder).mkdir()
    os.mkfifo(tmp_path / ARCHIVE.folder / FIRST)
    with pytest.raises(ValueError, match=rf"{FIRST} is a pipe or a device, .* unpack {ARCHIVE.file} again"):
        cifar.load(ARCHIVE, str(tmp_path))


# ---------------------------------------------------------------- downloads


@pytest.mark.parametrize("length", ["1", None, "-5", "many"])
def test_a_download_without_end_does_not_fill_the_disk(tmp_path, monkeypatch, length):
    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if length:
                self.send_header("Content-Length", length)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"\0" * 65536)
            except ConnectionError:
                pass

        def log_message(self, *args):
            pass

    monkeypatch.setattr(cifar, "LARGEST", 10**6)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setattr(cifar, "PAGE", f"http://127.0.0.1:{server.server_port}/")
            with pytest.raises(OSError, match=r"CIFAR-10 cannot be downloaded from .* to .*\. By hand: fetch"):
                cifar.load(ARCHIVE, str(tmp_path / "data"))
        finally:
            server.shutdown()
            thread.join()
    assert os.listdir(tmp_path / "data") == []


def test_a_full_disk_leaves_no_half_of_a_download(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    content = b"an archive"
    monkeypatch.setattr(cifar.urllib.request, "urlopen", lambda url, timeout: Response(content))
    monkeypatch.setattr(os, "fsync", full)
    archive = dataclasses.replace(ARCHIVE, md5=ARCHIVE.md5 | {ARCHIVE.file: hashlib.md5(content).hexdigest()})
    with pytest.raises(OSError, match="No space left on device"):
        cifar.load(archive, str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data") == []


class Response(io.BytesIO):
    headers: dict[str, str] = {}  # noqa: RUF012
