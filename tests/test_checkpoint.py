import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from nfjax.runs import checkpoint, checksums


def tree(value):
    return {
        "state": {"blocks": {0: jnp.full((64, 64), value), 10: jnp.full((3,), value), 2: jnp.float32(value)}},
        "sums": np.array(value / 3, np.float64),
    }


def saved(folder, accuracies, keep=2):
    checkpoints = checkpoint.Checkpoints(folder, keep)
    for step, accuracy in accuracies.items():
        checkpoints.save(step, tree(float(step)), accuracy)
    checkpoints.wait()
    return checkpoints


def test_round_trip_keeps_structure_types_and_digits(tmp_path):
    checkpoints = saved(tmp_path, {7: 0.5})
    restored = checkpoints.restore(checkpoint.template(tree(0.0)), 7)
    checkpoints.close()
    assert set(restored["state"]["blocks"]) == {0, 2, 10}
    np.testing.assert_array_equal(restored["state"]["blocks"][10], np.full(3, 7.0, np.float32))
    assert restored["sums"].dtype == np.float64
    assert float(restored["sums"]) == 7 / 3


def test_truth_values_and_complex_numbers_are_sealed():
    tree = {"a": jnp.array([True, False, True]), "b": jnp.array([1 + 2j, 3 - 4j], jnp.complex64)}
    seal = np.asarray(checksums.seal(tree))
    on_host = {name: np.asarray(leaf) for name, leaf in tree.items()}
    assert checksums.damage(tree, seal) is None
    assert checksums.damage(on_host, seal) is None
    for changed in ({"a": np.array([True, True, True])}, {"b": np.array([1 + 2j, 3 + 4j], np.complex64)}):
        assert "1 of its 2 arrays" in checksums.damage(on_host | changed, seal)


def test_newest_and_best_are_kept(tmp_path):
    checkpoints = saved(tmp_path, {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.6, 5: 0.4, 6: None})
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best_step() == 2
    checkpoints.close()
    reader = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert (reader.steps(), reader.best_step()) == ([2, 5, 6], 2)
    reader.close()


@pytest.mark.parametrize("gone", ["metrics", "metrics/metrics", "default", "_CHECKPOINT_METADATA", "*"])
def test_what_is_left_of_a_half_deleted_checkpoint_is_cleared_away(tmp_path, gone):
    saved(tmp_path, {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.6}, keep=3).close()
    for path in list((tmp_path / checkpoint.FOLDER / "1").glob(gone)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    assert checkpoints.restore_newest(checkpoint.template(tree(0.0)))[0] == 4
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()) == ["2", "3", "4"]


def test_nothing_saved(tmp_path):
    checkpoints = saved(tmp_path, {})
    assert checkpoints.restore_newest(checkpoint.template(tree(0.0))) is None
    assert checkpoints.best_step() is None
    checkpoints.close()


def truncate(folder, step, pattern="*"):
    """Cuts the files of a checkpoint in half."""
    files = [path for path in (folder / checkpoint.FOLDER / str(step)).rglob(pattern) if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("pattern", ["*", "d/*", "metrics", "manifest.ocdbt", "_METADATA"])
def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, pattern):
    saved(tmp_path, {1: 0.1, 2: 0.2}).close()
    truncate(tmp_path, 2, pattern)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    step, restored = checkpoints.restore_newest(checkpoint.template(tree(0.0)))
    assert step == 1
    assert float(restored["state"]["blocks"][2]) == 1.0
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
    assert "checkpoint 2 is damaged" in caplog.text
    checkpoints.save(2, tree(20.0), 0.3)  # the number is free again
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()

    truncate(tmp_path, 2, pattern)  # and once more
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    assert checkpoints.restore_newest(checkpoint.template(tree(0.0)))[0] == 1
    assert {path.name for path in (tmp_path / "damaged_checkpoints").iterdir()} == {"2", "2.1"}
    checkpoints.close()


def test_a_sound_checkpoint_of_another_network_is_left_alone(tmp_path):
    checkpoints = saved(tmp_path, {1: 0.1})
    other = tree(0.0)
    other["state"]["blocks"][0] = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=r"checkpoint 1 in .* is of another network"):
        checkpoints.restore_newest(checkpoint.template(other))
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_a_checkpoint_without_its_arrays_falls_back(tmp_path):
    saved(tmp_path, {1: 0.1, 2: 0.2}).close()
    shutil.rmtree(tmp_path / checkpoint.FOLDER / "2" / "default")
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    assert checkpoints.restore_newest(checkpoint.template(tree(0.0)))[0] == 1
    checkpoints.close()


def test_reading_a_folder_with_a_damaged_checkpoint_changes_nothing(tmp_path):
    saved(tmp_path, {1: 0.1, 2: 0.2}).close()
    truncate(tmp_path, 2, "metrics")
    with pytest.raises(ValueError, match=r"checkpoint 2 .* is damaged"):
        checkpoint.Checkpoints(tmp_path, read_only=True)
    assert (tmp_path / checkpoint.FOLDER / "2").is_dir()


def test_no_checkpoint_can_be_read(tmp_path):
    saved(tmp_path, {1: 0.1}).close()
    truncate(tmp_path, 1)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    with pytest.raises(ValueError, match=r"none of the checkpoints of .* can be read"):
        checkpoints.restore_newest(checkpoint.template(tree(0.0)))
    checkpoints.close()


def test_no_flipped_bit_is_restored(tmp_path):
    """Wherever in the stored numbers it is: what is read is what was saved, or the checkpoint is set aside."""
    checkpoints = saved(tmp_path, {1: None, 2: None})
    checkpoints.close()
    template = checkpoint.template(tree(0.0))
    data = max((tmp_path / checkpoint.FOLDER / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole, rng = data.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 12):
        shutil.rmtree(tmp_path / "damaged_checkpoints", ignore_errors=True)
        folder = tmp_path / f"copy{at}"
        shutil.copytree(tmp_path / checkpoint.FOLDER, folder / checkpoint.FOLDER)
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        (folder / data.relative_to(tmp_path)).write_bytes(bytes(flipped))
        reader = checkpoint.Checkpoints(folder)
        step, restored = reader.restore_newest(template)
        reader.close()
        np.testing.assert_array_equal(restored["state"]["blocks"][0], np.full((64, 64), float(step), np.float32))


def test_checksums_tell_arrays_apart():
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    (sum_,) = checksums.checksums([x])
    for other in (x.at[2, 1].set(jnp.nextafter(x[2, 1], jnp.float32(99))), x[::-1], x.T.reshape(3, 4), -x):
        assert int(checksums.checksums([other])[0]) != int(sum_)
    assert checksums.checksums([x, x.astype(jnp.bfloat16), jnp.int32(3)]).shape == (3,)
