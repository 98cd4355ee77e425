"""A bucket for tests: what is written to gs://bucket/… lies in a local directory."""

import os

import pytest
from etils.epath import backend, gpath

from nfjax.data import remote

METHODS = ("open", "exists", "isdir", "listdir", "glob", "walk", "makedirs", "mkdir", "remove", "rmtree", "stat")


class FakeBackend(backend._OsPathBackend):
    """etils's backend of local files, with gs://bucket mapped to a directory."""

    def __init__(self, root):
        self.root = root


def _mapped(name):
    method = getattr(backend._OsPathBackend, name)

    def call(self, path, *args, **kwargs):
        result = method(self, os.fspath(path).replace("gs://bucket", str(self.root), 1), *args, **kwargs)
        if name == "glob":
            return [found.replace(str(self.root), "gs://bucket", 1) for found in result]
        return result

    return call


for _name in METHODS:
    setattr(FakeBackend, _name, _mapped(_name))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The local directory behind gs://bucket; copies go to tmp_path / "cache"."""
    monkeypatch.setenv("NFJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EPATH_USE_TF", "false")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", FakeBackend(tmp_path / "bucket"))
    monkeypatch.setitem(remote.PACKAGES, "gs", "json")  # a package that is there, for gcsfs
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"
