"""The contact sheet shows the pixels that training sees."""

import os

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from test_data import make_folder

from nfjax import cli, data
from nfjax.cli import show
from nfjax.training import loader, preprocessing


def shown(figure):
    """(titles, upper images, lower images) of a sheet, in order."""
    axes = [ax for ax in figure.axes if ax.images]
    upper = [ax for ax in axes if ax.get_title()]
    lower = [ax for ax in axes if not ax.get_title()]
    return [ax.get_title() for ax in upper], *(
        [np.asarray(ax.images[0].get_array()) for ax in part] for part in (upper, lower)
    )


def test_pairs_are_the_batch_before_and_after(tiny_config):
    dataset = loader.open_data(tiny_config, "")
    titles, plain, seen = shown(show.draw(tiny_config, count=10, step=3))
    (order,) = data.train_orders(tiny_config.seed, len(dataset.train), 64, 3, 4)
    batch = dataset.train.take(order.indices)
    np.testing.assert_array_equal(plain, batch["image"][:10])
    assert titles == [dataset.class_names[label] for label in batch["label"][:10]]
    _, augment_key = jax.random.split(jax.random.key(tiny_config.seed))
    augmented = preprocessing.make_augmentation(tiny_config)(
        jax.random.fold_in(augment_key, 3), jnp.asarray(batch["image"])
    )
    np.testing.assert_array_equal(seen, augmented[:10])


def test_what_is_mixed_is_shown_mixed_and_named(tiny_config):
    tiny_config.augment.mixup_alpha = 1.0
    titles, _, seen = shown(show.draw(tiny_config, count=4))
    tiny_config.augment.mixup_alpha = 0.0
    _, _, alone = shown(show.draw(tiny_config, count=4))
    assert all(title.count("%") == 2 for title in titles)
    assert all((a != b).any() for a, b in zip(seen, alone, strict=True))


def test_files_from_the_disk_with_one_that_cannot_be_read(tiny_config, tmp_path):
    make_folder(tmp_path / "set", per_class=4, size=(10, 14))
    (tmp_path / "set" / "train" / "ant" / "002.png").write_bytes(b"")
    tiny_config.data.source, tiny_config.data.dir, tiny_config.data.keep = "folder", str(tmp_path / "set"), "disk"
    tiny_config.data.workers, tiny_config.batch_size = 1, 8
    titles, plain, seen = shown(show.draw(tiny_config))
    assert sorted(titles) == ["ant", "ant", "ant", "bee", "bee", "bee", "bee", "empty file"]
    bad = titles.index("empty file")
    assert plain[bad].max() == 0
    assert all(image.shape == (8, 8, 3) for image in [*plain, *seen])


def test_class_names_that_no_font_and_no_formula_knows(tiny_config, tmp_path):
    names = [os.fsdecode(b"\xff"), "$a_{b", r"\frac$"]
    make_folder(tmp_path / "set", per_class=2, classes=names)
    tiny_config.data.source, tiny_config.data.dir, tiny_config.batch_size = "folder", str(tmp_path / "set"), 6
    figure = show.draw(tiny_config)
    titles, _, _ = shown(figure)
    assert sorted(titles) == ["$a_{b"] * 2 + [r"\frac$"] * 2 + [r"\xff"] * 2
    figure.savefig(tmp_path / "sheet.png", dpi=20)


def test_the_command(tmp_path, capsys):
    arguments = ["data", "show", "--config=configs/digits_convshort.py", f"--out={tmp_path}/sheet.png", "--count=3"]
    assert cli.run(arguments) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/sheet.png"
    assert matplotlib.image.imread(tmp_path / "sheet.png").std() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--config=configs/nothing.py"], "nothing.py", 2),
        (["--config=configs/digits_convshort.py", "--config.augment.flop=1"], "flop", 2),
        (["--config=configs/digits_convshort.py", "--count=0"], "--count=0", 2),
        (["--config=configs/cifar10.py", "--config.data.dir=/nowhere"], "/nowhere does not exist", 1),
    ],
)
def test_wrong_arguments_get_one_line(tmp_path, capsys, arguments, message, code):
    assert cli.run(["data", "show", f"--out={tmp_path}/sheet.png", *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "expected"),
    [("sheet.docx", "that ends with one of .png, .svg, .pdf"), ("/nowhere/sheet.png", "in a folder that exists")],
)
def test_a_picture_that_could_not_be_written_is_refused_at_once(out, expected, capsys):
    for command in (["data", "show"], ["train", "--find-learning-rate"]):
        assert cli.run([*command, "--config=digits_convshort", f"--out={out}"]) == 2
        assert f"--out={out}: expected a file {expected}" in capsys.readouterr().err
