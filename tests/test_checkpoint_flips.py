"""One flipped bit anywhere in a checkpoint: every reader gives exactly what was saved, or names the checkpoint."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_train import interrupt_at

from nfjax import evaluate, preemption
from nfjax.runs import checkpoint, checksums
from nfjax.training import loop as train
from tests.conftest import TINY

KINDS = (
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "_sharding",
    "commit_success.txt",
    "manifest.ocdbt",
    "metrics",
    "process_0",
)


def tree(step):
    rng = np.random.default_rng(step)
    kernels = {0: rng.normal(size=(24, 16)), 10: rng.normal(size=3), 2: rng.normal()}
    return {
        "state": {"params": {i: jnp.asarray(x, jnp.float32) for i, x in kernels.items()}, "step": jnp.int32(step)},
        "sums": {"epoch": {"loss": np.array(step / 3, np.float64), "count": np.float64(step)}},
    }


ACCURACIES = {1: 0.25, 2: 0.9375, 3: 0.5}
TEMPLATE = checkpoint.template(tree(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = checkpoint.Checkpoints(folder, 3)
    for step, accuracy in ACCURACIES.items():
        checkpoints.save(step, tree(step), accuracy)
    checkpoints.wait()
    checkpoints.close()
    return folder


def places(folder, step, count, rng):
    """(file below the folder, byte, bit): `count` of every file of a checkpoint, and every byte of its metrics."""
    for path in sorted((folder / checkpoint.FOLDER / str(step)).rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            chosen = range(size) if path.name == "metrics" else np.linspace(0, size - 1, min(count, size)).astype(int)
            for at in chosen:
                yield path.relative_to(folder), int(at), int(rng.integers(8))


def flipped(folder, copy, place):
    """A copy of the folder in which one bit is another."""
    file, at, bit = place
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    data = bytearray((copy / file).read_bytes())
    data[at] ^= 1 << bit
    (copy / file).write_bytes(data)


def assert_saved(found, step, place):
    """The names are compared as text: those that were numbers come back so."""
    assert checksums.described(found) == checksums.described(tree(step)), place
    for (name, a), (_, b) in zip(*(sorted(named(x).items()) for x in (found, tree(step))), strict=True):
        assert a.tobytes() == b.tobytes(), (name, place)


def named(x):
    leaves = jax.tree_util.tree_leaves_with_path(x)
    return {jax.tree_util.keystr(path, simple=True): np.asarray(leaf) for path, leaf in leaves}


def resume(folder):
    """(step, tree, best step, names of what was set aside)."""
    checkpoints = checkpoint.Checkpoints(folder, 3)
    try:
        step, restored = checkpoints.restore_newest(TEMPLATE)
        best = checkpoints.best_step()
    finally:
        checkpoints.close()
    aside = folder / "damaged_checkpoints"
    return step, restored, best, {path.name for path in aside.iterdir()} if aside.exists() else set()


def read(folder, step):
    checkpoints = checkpoint.Checkpoints(folder, read_only=True)
    try:
        return checkpoints.best_step(), checkpoints.restore_untyped(step)
    finally:
        checkpoints.close()


def named_or(reading, folder, step):
    """What it reads; None where it raises an error that names the checkpoint."""
    try:
        return reading()
    except ValueError as error:
        message = str(error)
    assert f"checkpoint {step} in {folder / checkpoint.FOLDER} is damaged: " in message
    return None


@pytest.mark.parametrize("step", [3, 2], ids=["the newest", "the best"])
def test_no_flipped_bit_is_taken_for_what_was_saved(saved, tmp_path, step):
    copy, noticed, seen = tmp_path / "copy", set(), set()
    for place in places(saved, step, 2 if step == 3 else 1, np.random.default_rng(step)):
        seen.add(place[0].name if place[0].name in KINDS else "data")
        flipped(saved, copy, place)
        if (answer := named_or(lambda step=step: read(copy, step), copy, step)) is None:
            noticed.add(place[0])
        else:
            assert answer[0] == 2, place
            assert_saved(answer[1], step, place)
        newest, restored, best, aside = resume(copy)
        assert aside in (set(), {str(step)}), place
        assert newest == (2 if aside == {"3"} else 3), place
        assert best == (3 if aside == {"2"} else 2), place
        assert_saved(restored, newest, place)
    assert seen == {*KINDS, "data"}
    assert {path.name for path in noticed} >= {"metrics"}
    assert len(noticed) >= (5 if step == 3 else 2)


def test_a_checkpoint_under_another_number_is_damaged(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    folder = tmp_path / "copy" / checkpoint.FOLDER
    (folder / "3").rename(folder / "4")
    with pytest.raises(checkpoint.DamagedError, match=r"checkpoint 4 .*not the one that was saved at step 4"):
        checkpoint.Checkpoints(tmp_path / "copy", read_only=True)
    assert resume(tmp_path / "copy")[0] == 2


def nudged(leaf):
    """The next number there is."""
    return np.nextafter(leaf, np.array(99, leaf.dtype)) if leaf.dtype.kind == "f" else leaf + np.ones_like(leaf)


def test_the_seal_covers_every_array_and_what_it_is_called():
    seal, host = np.asarray(checksums.seal(tree(1))), jax.tree.map(np.asarray, tree(1))
    leaves, structure = jax.tree.flatten(host)
    assert checksums.damage(tree(1), seal) is None
    assert checksums.damage(host, seal) is None
    for i in range(len(leaves)):
        changed = structure.unflatten([nudged(leaf) if j == i else leaf for j, leaf in enumerate(leaves)])
        assert checksums.damage(changed, seal) == "1 of its 6 arrays are not those that were saved"
    sums = {"epoch": {"loss": host["sums"]["epoch"]["loss"], "steps": host["sums"]["epoch"]["count"]}}
    assert "names, types or shapes" in checksums.damage({**host, "sums": sums}, seal)
    assert "names, types or shapes" in checksums.damage(jax.tree.map(lambda x: x.T, host), seal)
    assert "do not belong together" in checksums.damage(host, seal[:-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "float16"])
def test_checksums_are_the_same_on_the_host(dtype):
    rng = np.random.default_rng(0)
    arrays = [np.asarray(100 * rng.random(shape)).astype(jnp.dtype(dtype)) for shape in ((), (7, 5), (300, 300))]
    expected = np.asarray(checksums.checksums([jnp.asarray(array) for array in arrays]))
    np.testing.assert_array_equal(checksums.on_host(arrays), expected)


@pytest.fixture
def saved_before(tmp_path, monkeypatch):
    """Checkpoints as they were before names, sums and accuracies were sealed."""

    def arrays_only(tree):
        return checksums.checksums([leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)])

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "seal", arrays_only)
        patch.setattr(checkpoint, "_metrics", lambda step, accuracy: {"accuracy": accuracy})
        checkpoints = checkpoint.Checkpoints(tmp_path / "before", 2)
        for step in (1, 2):
            checkpoints.save(step, tree(step), ACCURACIES[step])
        checkpoints.wait()
        checkpoints.close()
    return tmp_path / "before"


def test_older_checkpoints_are_read_and_compared_as_far_as_they_go(saved_before, tmp_path):
    best, found = read(saved_before, 2)
    assert best == 2
    assert_saved(found, 2, "before")
    step, restored, best, aside = resume(saved_before)
    assert (step, best, aside) == (2, 2, set())
    assert_saved(restored, 2, "before")
    data = max((saved_before / checkpoint.FOLDER / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
    for at in (data.stat().st_size // 3, data.stat().st_size // 2):
        flipped(saved_before, tmp_path / "copy", (data.relative_to(saved_before), at, 3))
        with pytest.raises(checkpoint.DamagedError, match="checkpoint 2 in"):
            read(tmp_path / "copy", 2)
        assert resume(tmp_path / "copy")[0] == 1


@pytest.fixture
def run(tiny_config, tmp_path, monkeypatch):
    """A run that was stopped at step 3, of a network whose arrays lie in one file that is larger than all others."""
    tiny_config.model.update({"depth": TINY, "stage_sizes": None, "block": None})
    tiny_config.log.every_steps = 2
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(preemption.TrainingInterruptedError):
            train.train(tiny_config, str(tmp_path / "run"))
    return tmp_path / "run"


def test_scoring_and_loading_notice_what_resuming_notices(run, tmp_path):
    def parameters(workdir):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(evaluate.load_model(str(workdir)), nnx.Param))]

    expected, noticed = parameters(run), []
    for place in places(run, 3, 1, np.random.default_rng(0)):
        if place[0].name == "metrics" and place[1] % 5:
            continue
        file, at, bit = place
        size = (run / file).stat().st_size
        flipped(run, tmp_path / "copy", (file, at if file.name == "metrics" else size // 2, bit))
        if (found := named_or(lambda: parameters(tmp_path / "copy"), tmp_path / "copy", 3)) is None:
            noticed.append(file)
        else:
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    largest = max((run / checkpoint.FOLDER).rglob("d/*"), key=lambda path: path.stat().st_size)
    assert largest.relative_to(run) in noticed
    flipped(run, tmp_path / "copy", (largest.relative_to(run), largest.stat().st_size // 2, 0))
    with pytest.raises(ValueError, match=r"checkpoint 3 in .* is damaged: .*; choose another of \[\] by step"):
        evaluate.evaluate(str(tmp_path / "copy"))


def test_a_checkpoint_of_another_network_than_the_config_is_refused(run):
    config = run / "config.json"
    config.write_text(config.read_text().replace('"width": 4', '"width": 8'))
    with pytest.raises(ValueError, match=r"checkpoint 3 in .* is of another network than .*config\.json describes"):
        evaluate.load_model(str(run))
