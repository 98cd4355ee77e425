"""A run's network in use: it sees the pixels on which it was scored, takes images of every kind, and refuses what it
would misread; and `nfjax predict`.
"""

import csv
import io
import json
import logging
import os
import pathlib
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import nfjax
from nfjax import cli, evaluate, inference
from nfjax.cli import _predictions
from nfjax.cli.predict import Table, _cut, _padded, _width
from nfjax.data.decoding.decode import BadImageError
from nfjax.runs import files
from nfjax.training import deployment, loader, networks, sharding
from tests import photographs
from tests.photographs import SIZE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(its workdir, its folder of images)."""
    return photographs.train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def predictor(run):
    return nfjax.load(run[0], batch_size=8)


@pytest.fixture(scope="module")
def paths(run):
    return sorted((run[1] / "test").rglob("*.jpg"))


def arrays(count, height=SIZE, width=SIZE):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def noted(path):
    """The orientation in a file, as EXIF counts."""
    with Image.open(path) as image:
        return image.getexif().get(0x112, 1)


# ---------------------------------------------------------------- the same pixels, the same numbers


def test_the_pixels_are_those_on_which_the_run_was_scored(run, predictor, paths):
    config = files.read_config(run[0])
    scored = loader.open_data(config, config.data.dir).test
    seen = np.stack([prediction.pixels for prediction in predictor.stream(paths)])
    np.testing.assert_array_equal(seen, scored.images)
    assert {noted(path) for path in paths} == {1, 6}
    # From the disk, batch by batch, they are the same.
    config.data.keep, config.data.workers = "disk", 1
    batches = loader.build(config, loader.open_data(config, config.data.dir), "test", sharding.make(), None)
    from_disk = np.concatenate([np.asarray(batch.image) for batch in batches.evaluate()])
    batches.close()
    np.testing.assert_array_equal(seen, from_disk[: len(seen)])


def test_a_run_is_loaded_in_silence(run, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        nfjax.load(run[0])
    assert caplog.records == []


def test_its_accuracy_is_that_of_the_run(run, predictor, paths):
    labels = predictor(paths).labels
    accuracy = np.mean([label == path.parent.name for label, path in zip(labels, paths, strict=True)])
    assert accuracy == pytest.approx(evaluate.evaluate(str(run[0]))["accuracy"])
    assert predictor.origin.accuracy == pytest.approx(accuracy)
    assert (predictor.origin.test_images, predictor.class_names) == (24, ("ant", "bee"))


def test_running_statistics_are_used_and_grouping_changes_nothing(run, predictor):
    images = arrays(21)
    together = predictor(images).probabilities
    assert together.dtype == np.float32
    np.testing.assert_allclose(together.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(predictor(images).probabilities, together)
    alone = np.concatenate([predictor(image).probabilities for image in images[:3]])
    np.testing.assert_allclose(alone, together[:3], atol=1e-6)
    np.testing.assert_allclose(predictor(images[::-1]).probabilities[::-1], together, atol=1e-6)
    model = evaluate.load_model(str(run[0]))
    pixels = np.stack([prediction.pixels for prediction in predictor.stream(images[:4])])
    logits = model(predictor.preprocessing.normalize(jnp.asarray(pixels)))
    np.testing.assert_allclose(together[:4], jax.nn.softmax(logits), atol=1e-6)


def test_an_image_in_every_form_it_may_have(predictor, tmp_path):
    pixels = arrays(1, 31, 20)[0]
    image, stream = Image.fromarray(pixels), io.BytesIO()
    image.save(tmp_path / "a.png")
    image.save(stream, "PNG")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), stream.getvalue(), image, pixels, jnp.asarray(pixels)]
    expected = predictor(tmp_path / "a.png").probabilities
    for form in forms:
        np.testing.assert_array_equal(predictor(form).probabilities, expected)
    for several in (forms, iter(forms), tuple(forms)):
        np.testing.assert_allclose(predictor(several).probabilities, np.repeat(expected, 6, 0), atol=1e-6)
    np.testing.assert_array_equal(predictor(pixels[None]).probabilities, expected)
    grey = Image.fromarray(pixels[..., 0])
    np.testing.assert_array_equal(
        predictor(grey).probabilities, predictor(np.stack([pixels[..., 0]] * 3, -1)).probabilities
    )


def test_a_pillow_image_is_turned_as_the_run_turned_its_files(predictor, paths):
    turned = next(path for path in paths if noted(path) == 6)
    with Image.open(turned) as image:
        (from_file,), (from_pillow,) = (list(predictor.stream(form)) for form in (turned, image))
    # A JPEG more than twice too large is decoded at a reduced scale, which an image that is decoded was not.
    assert np.abs(from_file.pixels.astype(int) - from_pillow.pixels).mean() < 3


def test_names_and_probabilities(predictor):
    predictions = predictor(arrays(5))
    assert len(predictions) == 5
    for row, top, label in zip(predictions.probabilities, predictions.top(7), predictions.labels, strict=True):
        assert [name for name, _ in top] == sorted(("ant", "bee"), key=lambda name: -row[("ant", "bee").index(name)])
        assert label == top[0][0]
        assert top[0][1] == row.max()
    assert repr(predictions).startswith("Predictions of 5 images, 2 classes\n")
    with pytest.raises(ValueError, match="k=0: expected at least one class"):
        predictions.top(0)
    tied = inference.Predictions(np.full((1, 3), 1 / 3, np.float32), ("a", "b", "c"))
    assert [name for name, _ in tied.top(2)[0]] == ["a", "b"]


def test_thousands_of_images_are_never_in_memory_at_once(predictor):
    alive, most = 0, 0

    class Counted(bytes):
        def __new__(cls, data):
            nonlocal alive, most
            alive, most = alive + 1, max(most, alive + 1)
            return super().__new__(cls, data)

        def __del__(self):
            nonlocal alive
            alive -= 1

    stream = io.BytesIO()
    Image.fromarray(arrays(1)[0]).save(stream, "PNG")
    count = 0
    for prediction in predictor.stream(Counted(stream.getvalue()) for _ in range(300)):
        count += 1
        del prediction
    assert count == 300
    assert most <= 6 * predictor.batch_size


def test_few_programs_are_compiled(run):
    predictor = nfjax.load(run[0], batch_size=6)
    for count in (1, 2, 3, 4, 5, 6, 7, 13):
        predictor(arrays(count))
    assert {predictor._size_for(count) for count in range(1, 30)} == {1, 2, 4, 6}
    assert predictor._program._cache_size() == 4


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (arrays(2).astype(np.float32) / 255, ValueError, r"dtype float32: .*\(255 \* images\).round"),
        (arrays(2).astype(np.float32), ValueError, r"dtype float32: expected uint8, levels .*images.astype\('uint8'\)"),
        (arrays(2).astype(np.float32) / 64 - 2, ValueError, "have they been normalised"),
        (np.full((2, 8, 8, 3), np.nan), ValueError, r"dtype float64: .*images.astype\('uint8'\)"),
        ([arrays(1)[0] / 255.0], ValueError, r"image 0 has the dtype float64: .*\(255 \* images\).round"),
        (arrays(2).astype(np.int64), ValueError, r"dtype int64: .*images.astype\('uint8'\)"),
        (arrays(2) > 9, ValueError, "dtype bool: expected uint8, levels from 0 to 255$"),
        (arrays(2).transpose(0, 3, 1, 2), ValueError, r"\[2, 3, 8, 8\]: .*images.transpose\(0, 2, 3, 1\)"),
        ([arrays(1)[0].transpose(2, 0, 1)], ValueError, r"image 0 .*\[3, 8, 8\]: .*images.transpose\(1, 2, 0\)"),
        (arrays(2)[..., :1], ValueError, r"\[2, 8, 8, 1\]: .*repeat\(3, axis=-1\)"),
        (arrays(2)[..., 0], ValueError, r"\[2, 8, 8\]: .*numpy.stack\(\[images\] \* 3, axis=-1\)"),
        (arrays(1)[0, ..., 0], ValueError, r"\[8, 8\]: .*numpy.stack\(\[image\] \* 3, axis=-1\)"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"transparency is dropped by images\[..., :3\]"),
        ([arrays(2)], ValueError, r"image 0 has the shape \[2, 8, 8, 3\]: expected \[H, W, 3\]; several images"),
        (arrays(0), ValueError, "there are no pixels in it"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "there are no pixels in it"),
        (np.array(["a.jpg"]), ValueError, "a list of paths is given as a list"),
        ([], ValueError, "there are no images: expected a path, the bytes of an image file"),
        (iter([]), ValueError, "there are no images"),
        (3, TypeError, "images of type int: expected a path"),
        ([None], TypeError, "image 0 is of type NoneType"),
        (b"GIF89a or not", BadImageError, "no image: image 0"),
        (b"", BadImageError, "empty file: image 0"),
        ("/nowhere/a.jpg", FileNotFoundError, "/nowhere/a.jpg cannot be read: No such file"),
        (pathlib.Path("/"), IsADirectoryError, "/ is a folder: give its files"),
    ],
)
def test_what_would_be_misread_is_refused(predictor, images, error, message):
    with pytest.raises(error, match=message):
        predictor(images)


def huge():
    """A PNG that says it has 30 000 x 30 000 pixels, and has none."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_a_bad_image_is_named_or_skipped(predictor, tmp_path):
    (tmp_path / "huge.png").write_bytes(huge())
    Image.fromarray(arrays(1)[0]).save(tmp_path / "good.png")
    with pytest.raises(BadImageError, match=r"too many pixels: .*huge.png"):
        predictor([tmp_path / "good.png", tmp_path / "huge.png"])
    with pytest.raises(BadImageError, match="too many pixels"):
        predictor(Image.new("1", (30_000, 30_000)))
    skipped = []
    given = [tmp_path / "huge.png", tmp_path / "good.png", tmp_path / "none.png", b"no"]
    found = list(predictor.stream(given, lambda *told: skipped.append(told[:2])))
    assert [prediction.image for prediction in found] == [tmp_path / "good.png"]
    expected = [(str(tmp_path / "huge.png"), "too many pixels"), (str(tmp_path / "none.png"), "missing")]
    assert skipped == [*expected, ("image 3", "no image")]


# ---------------------------------------------------------------- which network


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.ones((1, SIZE, SIZE, 3)) / 2, "dtype float64: expected uint8.*round"),
        (np.full((1, SIZE, SIZE, 3), 300), "dtype int64: expected uint8"),
        (np.zeros((1, 64, 64, 3), np.uint8), rf"\[1, 64, 64, 3\]: expected \[B, {SIZE}, {SIZE}, 3\]"),
        (np.zeros((1, 3, SIZE, SIZE), np.uint8), r"expected .*; channels come last: images.transpose\(0, 2, 3, 1\)"),
        (np.zeros((9, SIZE, SIZE, 3), np.uint8), "batch_size=8 images at most; a call of the predictor takes any"),
        (np.zeros((SIZE, SIZE, 3), np.uint8), rf"expected \[B, {SIZE}, {SIZE}, 3\]"),
    ],
)
def test_pixels_that_would_be_misread(predictor, pixels, message):
    with pytest.raises(ValueError, match=message):
        predictor.of_pixels(pixels)


def test_preprocessing_takes_what_it_says(predictor, paths):
    data = paths[0].read_bytes()
    expected = predictor.preprocessing.of_file(data)
    for same in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(predictor.preprocessing.of_file(same), expected)
    for other in (str(paths[0]), paths[0], arrays(1)[0], None):
        with pytest.raises(TypeError, match="expected the bytes of an image file"):
            predictor.preprocessing.of_file(other)
    for wrong in (arrays(1)[0] / 255, arrays(1), arrays(1)[0, :, :, 0]):
        with pytest.raises(ValueError, match=r"the image has the (dtype|shape)"):
            predictor.preprocessing.of_pixels(wrong)


def test_what_comes_before_an_error_is_predicted(predictor, paths, tmp_path, monkeypatch):
    def broken():
        yield from paths[:10]
        raise RuntimeError("the camera is gone")

    found = []
    with pytest.raises(RuntimeError, match="the camera is gone"):
        found.extend(prediction.image for prediction in predictor.stream(broken()))
    assert found == paths[:10]
    for bad, error in ((tmp_path / "no.jpg", FileNotFoundError), (5, TypeError)):
        found.clear()
        with pytest.raises(error):
            found.extend(prediction.image for prediction in predictor.stream([*paths[:10], bad, *paths[10:]]))
        assert found == paths[:10]


def test_a_home_directory_and_things_that_only_look_like_images(predictor, paths, monkeypatch):
    monkeypatch.setenv("HOME", str(paths[0].parent))
    assert predictor(f"~/{paths[0].name}").top(2) == predictor(paths[0]).top(2)
    with open(paths[0], "rb") as file, pytest.raises(TypeError, match=r"BufferedReader: expected a path, the bytes"):
        predictor(file)
    with pytest.raises(TypeError, match="dict: expected a path"):
        predictor({paths[0]: 1})


def test_step_average_and_dtype(run, predictor):
    images = arrays(4)
    averaged = nfjax.load(run[0], ema=True)
    assert averaged.origin.ema
    assert np.abs(averaged(images).probabilities - predictor(images).probabilities).max() > 1e-6
    half = nfjax.load(run[0], dtype="bfloat16")
    assert half.architecture.dtype == "bfloat16"
    difference = np.abs(half(images).probabilities - predictor(images).probabilities).max()
    assert 1e-7 < difference < 0.02
    with pytest.raises(ValueError, match="unknown dtype 'float16': expected one of float32, bfloat16"):
        nfjax.load(run[0], dtype="float16")
    with pytest.raises(FileNotFoundError, match="no checkpoint at step 5: expected one of"):
        nfjax.load(run[0], step=5)
    with pytest.raises(ValueError, match="batch_size=0: expected at least one image"):
        nfjax.load(run[0], batch_size=0)
    for size in (1.5, True, "64", None):
        with pytest.raises(ValueError, match=rf"batch_size={size!r}: expected at least one image"):
            nfjax.load(run[0], batch_size=size)


def test_what_is_no_model(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there does not exist: expected the workdir of a run, or a folder"):
        nfjax.load(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match=r"is no model: it has no config.json"):
        nfjax.load(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file: expected the workdir"):
        nfjax.load(tmp_path / "a.safetensors")
    for name in ("config.json", "data.json"):
        (tmp_path / name).write_bytes((run[0] / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="has no checkpoints: the run was stopped before its first one"):
        nfjax.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json does not hold what it should"):
        nfjax.load(tmp_path)


def test_arrays_of_a_source_are_not_resized(tiny_config):
    """Their run scores them as they are, whatever data.resize says."""
    tiny_config.data.resize = 12
    dataset = loader.open_data(tiny_config, "")
    preprocessing = inference.Preprocessing(**deployment.pixels(tiny_config, dataset.identity()))
    np.testing.assert_array_equal(preprocessing.of_pixels(dataset.test.images[3]), dataset.test.images[3])
    assert deployment.pixels(tiny_config, {"test": {"contents": "0"}})["resize"] == 12


def test_code_of_the_user_is_run_only_when_it_is_trusted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "untrusted_network.py").write_text("raise SystemExit('it ran')")
    told = json.loads((run[0] / "config.json").read_text())
    for section, name, value in (
        ("model", "name", "untrusted_network:make"),
        ("model", "residual", "untrusted_network:x"),
    ):
        changed = json.loads(json.dumps(told))
        changed[section][name] = value
        (tmp_path / "config.json").write_text(json.dumps(changed))
        (tmp_path / "data.json").write_bytes((run[0] / "data.json").read_bytes())
        with pytest.raises(ValueError, match=f"names '{value}'.* to import that module.*trust=True"):
            nfjax.load(tmp_path)


class Doubled(nnx.Module):
    """A network of one's own, without an argument for its dtype."""

    def __init__(self, num_classes, rngs):
        self.head = nnx.Linear(3, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.head(images.mean((1, 2)))


def test_a_model_of_ones_own(predictor):
    made = inference.Predictor(Doubled(3, nnx.Rngs(0)), predictor.preprocessing, "abc")
    assert made(arrays(2)).probabilities.shape == (2, 3)
    with pytest.raises(ValueError, match=r"returns \[1, 3\] for one image: .* its 2 class names"):
        inference.Predictor(Doubled(3, nnx.Rngs(0)), predictor.preprocessing, "ab")
    with pytest.raises(ValueError, match="has no argument dtype"):
        networks.Architecture(f"{__name__}:Doubled", {}).check_dtype("bfloat16")
    broken = Doubled(3, nnx.Rngs(0))
    broken.head.bias[...] = jnp.full(3, jnp.nan)
    with pytest.raises(ValueError, match="numbers that are not finite for image 0"):
        inference.Predictor(broken, predictor.preprocessing, "abc")(arrays(1))


def test_several_devices_give_the_same(run, predictor, tmp_path):
    np.save(tmp_path / "images.npy", arrays(5))
    code = (
        "import sys, numpy as np, jax, nfjax\n"
        "predictor = nfjax.load(sys.argv[1], batch_size=6)\n"
        "print(jax.device_count(), predictor.batch_size)\n"
        "np.save(sys.argv[2], predictor(np.load(sys.argv[3])).probabilities)"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(run[0]), str(tmp_path / "out.npy"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["4", "8"], done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), predictor(arrays(5)).probabilities, atol=1e-6)


def test_load_is_imported_when_it_is_used():
    code = "import sys, nfjax; print('load' in dir(nfjax), 'jax' in sys.modules, callable(nfjax.load))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
    assert "load" not in nfjax.__all__  # `from nfjax import *` needs nothing of training


# ---------------------------------------------------------------- nfjax predict


def predict(run, *arguments):
    return cli.run(["predict", f"--model={run[0]}", "--batch-size=8", *map(str, arguments)])


def test_a_table_of_a_folder(run, paths, predictor, capsys):
    assert predict(run, run[1] / "test", "--top=2") == 0
    out, errors = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == len(paths)
    assert len({len(line) for line in lines}) == 1
    expected = predictor(paths)
    for line, path, ((name, share), _) in zip(lines, paths, expected.top(2), strict=True):
        assert str(path)[-40:] in line
        assert f"{name}  {share:5.1%}" in line
    assert errors == "24 images\n"


def test_files_of_all_kinds(run, paths, predictor, tmp_path, capsys):
    outs = [tmp_path / name for name in ("a.csv", "a.jsonl", "a.png")]
    assert predict(run, run[1] / "test", *[f"--out={out}" for out in outs]) == 0
    out, errors = capsys.readouterr()
    assert len(out.splitlines()) == 20
    assert errors.splitlines() == ["24 images", "the table has the first 20", *map(str, outs)]
    rows = list(csv.reader(outs[0].read_text().splitlines()))
    assert rows[0] == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    told = [json.loads(line) for line in outs[1].read_text().splitlines()]
    for row, line, path, top in zip(rows[1:], told, paths, predictor(paths).top(2), strict=True):
        assert row[0] == line["file"] == str(path)
        assert [row[1], row[3]] == [one["class"] for one in line["predictions"]] == [name for name, _ in top]
        shares = [float(row[2]), float(row[4])]
        assert shares == pytest.approx([share for _, share in top], abs=2e-6)
        assert shares == pytest.approx([one["probability"] for one in line["predictions"]], abs=2e-6)
    with Image.open(outs[2]) as image:
        assert image.size[0] > 500
    assert not list(tmp_path.glob(".*"))


def test_the_sheet_has_the_first_images_and_their_predictions(predictor, paths):
    found = list(predictor.stream(paths[:10]))
    figure = _predictions.draw(found, 2)
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 10
    for ax, prediction in zip(drawn, found, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), prediction.pixels)
        assert ax.get_title() == "\n".join(f"{name} {share:.0%}" for name, share in prediction.top(2))
        assert ax.texts[0].get_text() == os.path.basename(prediction.image)
    assert _predictions.told("a.png", 70) == "a.png shows the first 64 of 70"
    assert _predictions.told("a.csv", 70) == "a.csv"


def test_bad_files_are_named_skipped_and_counted(run, tmp_path, capsys):
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    Image.fromarray(arrays(1)[0]).save(folder / "below" / "a.png")
    (folder / "b.jpg").write_bytes(b"no image")
    (folder / "c.png").write_bytes(huge())
    (folder / "notes.txt").write_text("none")
    assert predict(run, folder, tmp_path / "none.jpg") == 0
    out, errors = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [str(folder / "below" / "a.png")[-48:]] or "…" in out
    assert f"nfjax: {folder}/b.jpg: no image\n" in errors
    assert f"nfjax: {folder}/c.png: too many pixels\n" in errors
    assert f"nfjax: {tmp_path}/none.jpg: missing\n" in errors
    assert "\n1 image, 3 skipped: 1 no image, 1 too many pixels, 1 missing: " in errors
    assert "1 .txt" in errors


def test_a_failure_leaves_no_files(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert predict(run, tmp_path / "images") == 1
    assert f"nfjax: there are no images in {tmp_path}/images\n" in capsys.readouterr().err
    (tmp_path / "images" / "a.txt").write_text("none")
    assert predict(run, tmp_path / "images") == 1
    assert "there are no images in " in (errors := capsys.readouterr().err)
    assert "1 .txt" in errors
    (tmp_path / "images" / "a.jpg").write_bytes(b"none")
    assert predict(run, tmp_path / "images", f"--out={tmp_path}/a.csv") == 1
    assert "none of the 1 files can be read: 1 no image: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jpg", "--out=a.xls"], "--out=a.xls: expected a file that ends with one of .csv, .jsonl, .png"),
        (["a.jpg", "--out=/nowhere/a.csv"], "--out=/nowhere/a.csv: expected a file in a folder that exists"),
        (["a.jpg", "--out=a.csv", "--out=a.csv"], "--out=a.csv is given twice"),
        (["a.jpg", "--top=0"], "--top: 0 is not positive"),
        ([], "FILE|DIR"),
    ],
)
def test_wrong_arguments_end_with_2(run, arguments, message, capsys):
    assert predict(run, *arguments) == 2
    assert message in capsys.readouterr().err


def test_odd_names_break_neither_terminal_nor_spreadsheet(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [b"=1+1.png", b"@a.png", b"c\x1b[31m.png", b"d\n.png", b"\xff.png", "猫.png".encode()]
    names += ["9.41\u202fAM.png".encode(), "می\u200cخواهم.png".encode(), "\u202egnp.ä".encode()]
    for name in names:
        with open(name, "wb") as file:
            Image.fromarray(arrays(1)[0]).save(file, "PNG")
    assert (
        predict(run, "--out=a.csv", "--out=a.jsonl", "--out=a.svg", "--", *[os.fsdecode(name) for name in names]) == 0
    )
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == len(names)
    assert _predictions.harmless("-b.png") == "'-b.png"
    cells = [row[0] for row in csv.reader(pathlib.Path("a.csv").read_text().splitlines())][1:]
    assert cells == [
        "'=1+1.png",
        "'@a.png",
        r"c\x1b[31m.png",
        r"d\n.png",
        r"\xff.png",
        *map(os.fsdecode, names[5:8]),
        r"\u202egnp.ä",
    ]
    lines = pathlib.Path("a.jsonl").read_text(encoding="utf-8").splitlines()
    assert not {"\x1b", "\u202e"} & set("".join(lines))
    assert "猫" in lines[5]
    assert [json.loads(line)["file"] for line in lines] == [os.fsdecode(name) for name in names]


def test_columns_are_as_wide_as_they_look():
    table = Table(["猫.png", "a" * 60], ["à", "犬"], 2, None)
    assert (table._file, table._class) == (48, 2)
    assert [_width(text) for text in ("猫.png", "à", "…")] == [6, 1, 1]
    assert _padded("猫", 4) == "猫  "
    assert (_cut("abcdef", 4), _cut("abcdef", 4, left=True), _cut("猫猫猫", 4)) == ("abc…", "…def", "猫…")
