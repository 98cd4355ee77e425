"""The server of docs/guides/serving.md: many images at once, bad ones among them; what goes wrong goes no further."""

import asyncio
import io
import pathlib
import re
import sys
import types

import httpx2
import numpy as np
import pytest
from PIL import Image

import nfjax

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ROOT / "tests" / "exported" / "format1"


@pytest.fixture
def server(monkeypatch):
    """The module of the page, with a model of two classes; each test has its own."""
    monkeypatch.setenv("MODEL", str(MODEL))
    page = (ROOT / "docs" / "guides" / "serving.md").read_text()
    (code,) = re.findall(r"```\{code-block\} python\n:caption: serve\.py\n(.*?)```", page, re.S)
    module = types.ModuleType("serve")
    monkeypatch.setitem(sys.modules, "serve", module)
    exec(compile(code, "serve.py", "exec"), vars(module))
    return module


def files(count):
    """PNG files of several sizes, as bytes."""
    streams, draw = [io.BytesIO() for _ in range(count)], np.random.default_rng(0)
    for number, stream in enumerate(streams):
        Image.fromarray(draw.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).save(stream, "PNG")
    return [stream.getvalue() for stream in streams]


def post(server, contents, headers=None):
    """The responses to all of them, sent at once."""

    async def all_of_them():
        transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await asyncio.gather(*(client.post("/", content=data, headers=headers) for data in contents))

    return asyncio.run(all_of_them())


def counted(server, monkeypatch):
    """The sizes of the batches that are computed from now on."""
    sizes, of_pixels = [], server.predictor.of_pixels

    def count(pixels):
        sizes.append(len(pixels))
        return of_pixels(pixels)

    monkeypatch.setattr(server.predictor, "of_pixels", count)
    return sizes


def test_images_that_come_together_are_computed_together(server, monkeypatch):
    contents, sizes = files(100), counted(server, monkeypatch)
    responses = post(server, contents)
    expected = nfjax.load(MODEL)(contents)
    for response, row in zip(responses, expected.probabilities, strict=True):
        assert response.status_code == 200
        assert list(response.json()) == list(expected.class_names)
        np.testing.assert_allclose(list(response.json().values()), row, atol=1e-6)
    assert sum(sizes) == 100  # each of them once
    assert len(sizes) < 50
    assert max(sizes) <= server.predictor.batch_size == 64
    assert server.waiting == []


def test_a_bad_file_spoils_no_other(server):
    good = files(2)
    found = post(server, [good[0], b"no image", b"", good[1][:100], good[1]])
    assert [response.status_code for response in found] == [200, 400, 400, 400, 200]
    assert found[1].json()["error"].startswith("no image")
    assert found[2].json() == {"error": "empty file"}


def test_a_large_file_is_refused(server, monkeypatch):
    monkeypatch.setattr(server, "LARGEST", 1000)
    (response,) = post(server, [b"\0" * 1001])
    assert (response.status_code, response.json()) == (413, {"error": "expected a file of 1,000 bytes at most"})


def test_what_fails_once_is_computed_for_the_others(server, monkeypatch):
    of_pixels, calls = server.predictor.of_pixels, []

    def fail_first(pixels):
        calls.append(len(pixels))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return of_pixels(pixels)

    monkeypatch.setattr(server.predictor, "of_pixels", fail_first)
    codes = [response.status_code for response in post(server, files(20))]
    assert sorted(codes) == [200] * 19 + [500]
    assert server.waiting == []


def test_who_leaves_does_not_hold_up_the_others(server):
    pixels = [server.predictor.preprocessing.of_file(data) for data in files(5)]

    async def one_leaves():
        tasks = [asyncio.create_task(server.compute(server.Job(each))) for each in pixels]
        await asyncio.sleep(0)
        tasks[0].cancel()  # while it computes for all of them
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(one_leaves())
    assert isinstance(first, asyncio.CancelledError)
    assert [sum(found.values()) for found in others] == pytest.approx([1] * 4)
    assert server.waiting == []
