"""How good predictions are: counts against counting by hand, calibration against its definition, and the command."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from nfjax import cli, evaluate, inference
from nfjax.assessment import Assessment
from nfjax.cli import evaluate as evaluate_command
from nfjax.data.sources import folder
from nfjax.training import loop

CLASSES = ("ant", "bee", "cow")


def assessment(labels, probabilities, names=CLASSES):
    probabilities = np.asarray(probabilities, np.float32)
    return Assessment(names, np.asarray(labels, np.int32), probabilities.argmax(axis=1), np.log(probabilities))


SMALL = assessment(
    [0, 0, 1, 1, 1],
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [0.05, 0.05, 0.9], [0.3, 0.4, 0.3]],
)


def test_counts_by_hand():
    assert SMALL.images == 5
    assert SMALL.accuracy == 3 / 5
    assert SMALL.loss == pytest.approx(-np.log([0.7, 0.1, 0.5, 0.05, 0.4]).mean(), rel=1e-6)
    assert SMALL.top(1) == 3 / 5
    assert SMALL.top(2) == 1.0  # of the fourth image two classes share the second place
    assert SMALL.top(3) == 1.0
    np.testing.assert_array_equal(SMALL.confusion(), [[1, 1, 0], [0, 2, 1], [0, 0, 0]])
    ant, bee, cow = SMALL.by_class()
    assert (ant.name, ant.images, ant.predicted, ant.correct, ant.accuracy, ant.precision) == ("ant", 2, 1, 1, 0.5, 1.0)
    assert (bee.images, bee.predicted, bee.correct) == (3, 3, 2)
    assert (cow.images, cow.predicted, cow.correct, cow.precision) == (0, 1, 0, 0.0)
    assert np.isnan(cow.accuracy)
    np.testing.assert_array_equal(SMALL.confident_errors(5), [3, 1])
    np.testing.assert_array_equal(SMALL.confident_errors(1), [3])


def test_calibration_by_its_definition():
    found = SMALL.calibration(bins=3)  # confidences 0.7, 0.8, 0.5, 0.9, 0.4; right, wrong, right, wrong, right
    np.testing.assert_array_equal(found.images, [0, 2, 3])
    np.testing.assert_allclose(found.confidence, [np.nan, 0.45, 0.8], rtol=1e-6)
    np.testing.assert_allclose(found.accuracy, [np.nan, 1.0, 1 / 3])
    assert found.error == pytest.approx((2 * 0.55 + 3 * (0.8 - 1 / 3)) / 5, rel=1e-6)
    assert found.excess == pytest.approx(SMALL.confidence.mean() - SMALL.accuracy, rel=1e-6)
    sure = assessment([0, 1], [[1.0, 1e-9, 1e-9], [1e-9, 1.0, 1e-9]]).calibration()
    assert (sure.error, sure.images[-1]) == (0.0, 2)
    with pytest.raises(ValueError, match="bins=0"):
        SMALL.calibration(0)


def test_drawn_from_its_own_probabilities_it_is_calibrated():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([1.0, 1.0, 1.0], 20_000)
    labels = (probabilities.cumsum(axis=1) < generator.random((20_000, 1))).sum(axis=1)
    found = assessment(labels, probabilities).calibration()
    assert found.error < 0.02
    assert abs(found.excess) < 0.01


def test_a_table_and_numbers_for_a_machine():
    lines = str(SMALL).splitlines()
    assert lines[0] == "class  images  accuracy  precision  most often predicted instead"
    assert lines[1] == "ant         2     50.0%     100.0%  bee (1)"
    assert lines[2] == "bee         3     66.7%      66.7%  cow (1)"
    assert lines[3] == "cow         0         -       0.0%"
    assert lines[4].startswith("confidence: 66.0% on average, 6.0 points above the accuracy; expected calibration")
    found = json.loads(json.dumps(SMALL.to_dict(), allow_nan=False))
    assert found["classes"][2] == {
        "name": "cow", "images": 0, "predicted": 1, "correct": 0, "accuracy": None, "precision": 0.0,
    }  # fmt: skip
    assert found["top_3_accuracy"] == 1.0
    many = assessment(np.arange(30), np.eye(30) * 0.9 + 0.1 / 30, [f"class {i}" for i in range(30)])
    assert "and 10 classes that are recognized better" in str(many)


def test_a_name_moves_no_cursor_and_is_no_formula(tmp_path):
    found = assessment([0, 1], [[0.4, 0.6], [0.4, 0.6]], ["\x1b[2J", "=1+1"])
    assert "\x1b" not in str(found)
    assert "\\x1b[2J" in str(found)
    evaluate_command._write_csv(tmp_path / "found.csv", evaluate.Assessed(0, False, found, str, lambda i: None))
    header, *rows = csv.reader((tmp_path / "found.csv").read_text().splitlines())
    assert header == ["true / predicted", "\\x1b[2J", "'=1+1"]
    assert rows == [["\\x1b[2J", "0", "1"], ["'=1+1", "0", "1"]]


@pytest.mark.parametrize(
    ("labels", "predicted", "scores", "message"),
    [
        ([0], [0], np.zeros((1, 2)), r"log-probabilities \[1, 2\]: .* \[1, 3\]"),
        ([0, 1], [0], np.zeros((2, 3)), "2 labels, 1 predictions"),
        ([], [], np.zeros((0, 3)), "no image"),
        ([3], [0], np.zeros((1, 3)), "a label is of no class: expected 0 to 2"),
        ([0], [-1], np.zeros((1, 3)), "a prediction is of no class"),
    ],
)
def test_what_does_not_go_together_is_refused(labels, predicted, scores, message):
    with pytest.raises(ValueError, match=message):
        Assessment(CLASSES, np.asarray(labels, np.int32), np.asarray(predicted, np.int32), scores)


# ---------------------------------------------------------------- the command


def pictures(root, classes=CLASSES, per_class=6):
    """Grey images, the lighter the later their class."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            level = 40 + 80 * number + int(generator.integers(20))
            Image.new("RGB", (8, 8), (level, level, level)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, data) of a run on a folder of images."""
    from nfjax import config as configs

    root = tmp_path_factory.mktemp("assessed")
    for split in ("train", "test"):
        pictures(root / "data" / split)
    config = configs.base()
    config.update({"batch_size": 6, "epochs": 1})
    config.model.update({"depth": 10, "width": 2})
    config.data.update({"source": "folder", "dir": str(root / "data"), "image_size": 8})
    config.augment.update({"crop_padding": 1, "rand_operations": 0})
    config.train.onednn = False
    loop.train(config, str(root / "run"))
    return str(root / "run"), root / "data"


def test_the_command_tells_what_the_score_is_made_of(trained, tmp_path, capsys):
    workdir, _ = trained
    score = evaluate.evaluate(workdir)
    outs = [tmp_path / f"found{suffix}" for suffix in (".png", ".json", ".csv")]
    command = ["evaluate", f"--workdir={workdir}", *(f"--out={out}" for out in outs), f"--errors={tmp_path / 'e.png'}"]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"step {score['step']}: test accuracy {score['accuracy']:.2%}, loss {score['loss']:.4f}, of 18 images\n"
    )
    assert all(f"\n{name}  " in out for name in CLASSES)
    assert outs[0].read_bytes().startswith(b"\x89PNG")
    found = json.loads(outs[1].read_text())
    assert (found["step"], found["images"], found["accuracy"]) == (score["step"], 18, score["accuracy"])
    assert found["loss"] == pytest.approx(score["loss"], rel=1e-5)
    header, *rows = csv.reader(outs[2].read_text().splitlines())
    assert header == ["true / predicted", *CLASSES]
    assert [row[0] for row in rows] == list(CLASSES)
    counts = np.array([row[1:] for row in rows], np.int64)
    assert counts.sum() == 18
    assert np.trace(counts) == round(18 * score["accuracy"])
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_other_images_and_the_training_images(trained, tmp_path, capsys):
    workdir, data = trained
    test = evaluate.assess(workdir)
    assert [test.name(i) for i in (0, 17)] == ["test/ant/0.png", "test/cow/5.png"]
    assert test.image(0).shape == (8, 8, 3)
    assert test.image(0).min() == test.image(0).max() == np.asarray(Image.open(data / "test" / "ant" / "0.png")).max()
    same = evaluate.assess(workdir, images=str(data / "test"))
    np.testing.assert_array_equal(same.assessment.log_probabilities, test.assessment.log_probabilities)
    assert evaluate.assess(workdir, split="train").name(0) == "train/ant/0.png"
    pictures(tmp_path / "others", ("ant", "cow"), 2)
    (tmp_path / "others" / "cow" / "notes.txt").write_text("no image")
    (tmp_path / "others" / "cow" / "9.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match=r"1 of the 5 images"):  # as much as a run would refuse
        evaluate.assess(workdir, images=str(tmp_path / "others"))
    # The command names it, and scores the others.
    assert cli.run(["evaluate", f"--workdir={workdir}", f"--images={tmp_path / 'others'}"]) == 0
    out, errors = capsys.readouterr()
    assert "9.png: no image" in errors
    assert "on other images" in out.splitlines()[0]
    assert out.splitlines()[0].endswith("of 4 images")
    assert re.search(r"^bee +0 +-", out, re.M)


def test_an_export_is_assessed_like_its_run(trained, tmp_path, capsys):
    workdir, _ = trained
    inference.export(inference.load(workdir), tmp_path / "exported", ["safetensors"])
    pictures(tmp_path / "others", ("ant", "cow"), 2)
    run = evaluate.assess(workdir, images=str(tmp_path / "others"))
    found = inference.assess(inference.load(tmp_path / "exported"), tmp_path / "others")
    np.testing.assert_array_equal(found.assessment.labels, run.assessment.labels)
    np.testing.assert_allclose(found.assessment.log_probabilities, run.assessment.log_probabilities, atol=1e-5)
    assert [found.name(i) for i in range(4)] == [run.name(i) for i in range(4)] == [
        "ant/0.png", "ant/1.png", "cow/0.png", "cow/1.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(found.image(3), run.image(3))
    (tmp_path / "others" / "cow" / "9.png").write_bytes(b"\x89PNG and no more")
    command = ["evaluate", f"--model={tmp_path / 'exported'}", f"--images={tmp_path / 'others'}"]
    assert cli.run(command) == 0
    out, errors = capsys.readouterr()
    assert out.startswith("on these images ")
    assert "of 4 images\n" in out
    assert "9.png: no image" in errors
    for wrong, told in (
        (["--workdir=W"], "--model and --workdir: expected one of the two"),
        (["--split=test"], "--split is about the run's images"),
    ):
        assert cli.run([*command, *wrong]) == 2
        assert told in capsys.readouterr().err
    assert cli.run(command[:2]) == 2
    assert "--model needs --images=DIR" in capsys.readouterr().err


def test_wrong_input_is_explained(trained, tmp_path, capsys):
    workdir, data = trained

    def told(*arguments):
        code = cli.run(["evaluate", f"--workdir={workdir}", *arguments])
        return code, capsys.readouterr().err

    code, errors = told("--out=found.xlsx")
    assert code == 2
    assert "--out=found.xlsx: expected a file that ends with one of .png, .svg, .pdf, .json, .csv" in errors
    assert "--out=/nowhere/found.png: expected a file in a folder that exists" in told("--out=/nowhere/found.png")[1]
    assert "--errors=e.csv: expected a file that ends with one of .png" in told("--errors=e.csv")[1]
    assert "--count goes with --errors" in told("--count=3")[1]
    assert "--split is about the run's images; it does not go with --images" in told("--split=test", "--images=x")[1]
    assert f"did you mean {data / 'test'}?" in told(f"--images={data}")[1]
    code, errors = told(f"--images={tmp_path}")
    assert code == 1
    assert f"{tmp_path} has no images in folders of its classes; expected the layout {tmp_path}/<class>/*.jpg" in errors
    assert "nowhere does not exist" in told(f"--images={tmp_path / 'nowhere'}")[1]
    pictures(tmp_path / "unknown", ("ant", "dog"), 1)
    assert "folders of no class of the network: dog; it knows ant, bee, cow" in told(f"--images={tmp_path}/unknown")[1]
    assert "has no average of the weights" in told("--ema")[1]


def test_files_of_class_folders(tmp_path):
    pictures(tmp_path / "set", ("bee", "ant"), 2)
    shutil.copy(tmp_path / "set" / "bee" / "0.png", tmp_path / "set" / "beside.png")  # of no class
    files = folder.of_class_folders(str(tmp_path / "set"), CLASSES)
    assert [files.name(i) for i in range(len(files))] == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]
    assert files.labels.tolist() == [0, 0, 1, 1]
    assert files.reader(files.reference(2))[1] == 1
    with pytest.raises(NotADirectoryError, match="is a file"):
        folder.of_class_folders(str(tmp_path / "set" / "beside.png"), CLASSES)
