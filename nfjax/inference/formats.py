"""A folder that holds a trained network for other programs: weights, settings, a model card, and the network as a
program that needs no nfjax.

A format is a function `(predictor, path) -> probabilities(images)` that writes a file and reads it again, and one line
in `FORMATS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nfjax import _streams as streams
from nfjax._names import lookup
from nfjax.inference import _card, _folder, _onnx
from nfjax.inference._card import Compared
from nfjax.inference.loading import load
from nfjax.inference.predictor import Predictor
from nfjax.inference.preprocessing import Preprocessing

PLATFORMS = ("cpu", "cuda", "tpu")
SAMPLES = 8  # images on which an export is compared with its network

Probabilities = Callable[[np.ndarray], np.ndarray]  # uint8 [B, S, S, 3] -> float32 [B, classes]


@dataclasses.dataclass(frozen=True)
class Format:
    """A file of an export.

    Attributes:
        file: Its name.
        write: Writes it, and reads it again.
        bounds: On the difference of a probability to the network's, by the dtype in which that computes.
    """

    file: str
    write: Callable[[Predictor, pathlib.Path], Probabilities]
    bounds: dict[str, float]


def _as_safetensors(predictor: Predictor, path: pathlib.Path) -> Probabilities:
    """The weights by name, for nfjax and whoever knows the network."""
    _folder.write_weights(path.parent, predictor.params, predictor.batch_stats)

    def probabilities(images: np.ndarray) -> np.ndarray:
        again = load(path.parent, batch_size=predictor.batch_size, trust=True)  # what it was made from is running here
        before, after = (_folder.arrays_by_name(one.params, one.batch_stats) for one in (predictor, again))
        for name, array in before.items():
            if np.asarray(array).tobytes() != np.asarray(after[name]).tobytes():
                raise ValueError(f"{path.name}: {name} is not the same after it was read again")
        return again.of_pixels(images)

    return probabilities


def _as_stablehlo(predictor: Predictor, path: pathlib.Path) -> Probabilities:
    """The network as a program of JAX, for a batch of any size, with the weights inside."""
    program = jax.export.export(jax.jit(predictor.function()), platforms=PLATFORMS)(_batch(predictor))
    path.write_bytes(program.serialize())
    again = jax.export.deserialize(bytearray(path.read_bytes()))
    return lambda images: np.asarray(again.call(images))


def _batch(predictor: Predictor) -> jax.ShapeDtypeStruct:
    """uint8 images, any number of them."""
    side = predictor.preprocessing.image_size
    (batch,) = jax.export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)


def _as_onnx(predictor: Predictor, path: pathlib.Path) -> Probabilities:
    """The network in ONNX, for a batch of any size, with the weights inside."""
    if predictor.architecture.dtype != "float32":
        raise ValueError(
            f"the network computes in {predictor.architecture.dtype}, for which onnxruntime has no convolutions: "
            "load it with dtype='float32' (--dtype=float32)"
        )
    session = _onnx.write(predictor.function(), _batch(predictor), path)
    (taken,) = session.get_inputs()
    return lambda images: session.run(None, {taken.name: images})[0]


FORMATS: dict[str, Format] = {
    "safetensors": Format(_folder.WEIGHTS, _as_safetensors, {"float32": 0.0, "bfloat16": 0.0}),
    "stablehlo": Format("model.stablehlo", _as_stablehlo, {"float32": 1e-4, "bfloat16": 2e-2}),
    "onnx": Format("model.onnx", _as_onnx, {"float32": 1e-4}),
}
USUAL = ("safetensors", "stablehlo")


def export(
    predictor: Predictor,
    out: str | os.PathLike[str],
    formats: Sequence[str] = USUAL,
    *,
    licence: str | None = None,
    data_name: str | None = None,
    overwrite: bool = False,
) -> list[Compared]:
    """Writes a folder with a network in it, all of it or nothing, each file compared with the network.

    Args:
        predictor: The network.
        out: The folder, which is made.
        formats: Names in `FORMATS`.
        licence: Of the weights, for the card; None where it is not known.
        data_name: What the run's images are, for the card, such as "CIFAR-10"; likewise.
        overwrite: Whether an export that is there already is replaced, if nothing else lies in its folder.

    Returns:
        What the comparison of each file gave.

    Raises:
        ValueError: There is no such format; the network cannot be exported, or differs from what was written by more
            than the format's bound. Nothing is left behind.
        FileExistsError: There is a folder already, or one was made there meanwhile; that is left as it is.
        OSError: The folder cannot be written.
        ImportError: A package that a format needs is not installed.
    """
    chosen = check_export(out, formats, overwrite)
    if predictor.architecture is None:
        raise ValueError(
            "this predictor was made of a model, and does not say what that is built from: give Predictor an "
            "architecture, or export a run"
        )
    _folder.check_finite(predictor)
    with _replacing(pathlib.Path(os.path.expanduser(out)), overwrite) as part:
        written = {name: one.write(predictor, part / one.file) for name, one in chosen.items()}
        _folder.write(part, predictor)
        results = _compared(predictor, {name: (part / chosen[name].file, reads) for name, reads in written.items()})
        (part / _card.FILE).write_text(_card.text(predictor, results, licence, PLATFORMS, data_name), encoding="utf-8")
    return results


def _compared(predictor: Predictor, written: dict[str, tuple[pathlib.Path, Probabilities]]) -> list[Compared]:
    """What each file gives beside the network, for one image and for several at once."""
    images = photographs(predictor.preprocessing)

    def in_parts(probabilities: Probabilities) -> np.ndarray:
        return np.concatenate([probabilities(images[:1]), probabilities(images[1:])])

    expected = in_parts(predictor.of_pixels)
    results = []
    for name, (path, probabilities) in written.items():
        difference = float(np.abs(in_parts(probabilities) - expected).max())
        bound = FORMATS[name].bounds[predictor.architecture.dtype]
        if not difference <= bound:
            raise ValueError(
                f"{path.name} gives probabilities that differ from the network's by up to {difference:.1e}, more than "
                f"{bound:.0e}: nothing is exported"
            )
        results.append(Compared(name, path.name, path.stat().st_size, difference, bound, len(images)))
    return results


def photographs(preprocessing: Preprocessing) -> np.ndarray:
    """What a network sees of parts of the two photographs that come with scikit-learn, uint8 [SAMPLES, S, S, 3]."""
    from sklearn import datasets

    whole = datasets.load_sample_images().images
    parts = []
    for number in range(SAMPLES):
        photograph, side = whole[number % len(whole)], 400 // (1 + number // 2)
        top, left = ((extent - side) * number // SAMPLES for extent in photograph.shape[:2])
        parts.append(preprocessing.of_pixels(photograph[top : top + side, left : left + side]))
    return np.stack(parts)


def check_export(
    out: str | os.PathLike[str], formats: Sequence[str] = USUAL, overwrite: bool = False
) -> dict[str, Format]:
    """The formats of these names, where an export can be written; arguments and errors as of `export`. Nothing but an
    export is ever replaced.
    """
    chosen = {name: lookup("format", name, FORMATS, callables=False) for name in formats}
    if not chosen:
        raise ValueError(f"there are no formats: expected some of {', '.join(FORMATS)}")
    _check_free(pathlib.Path(os.path.expanduser(out)), overwrite)
    return chosen


def _check_free(out: pathlib.Path, overwrite: bool) -> None:
    here = os.path.realpath(out) == os.path.realpath(os.curdir)
    if here or os.path.ismount(out):
        what = "the one that you are in" if here else "a mount point"
        raise FileExistsError(
            f"the folder {str(out)!r} is {what}, which cannot be replaced: choose one in it, such as {out / 'exported'}"
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_export(out):
        raise FileExistsError(f"{out} exists, and is no export: choose another folder")
    if not overwrite:
        raise FileExistsError(f"{out} is an export already: choose another folder, or overwrite it (--overwrite)")
    ours = {_folder.SETTINGS, _card.FILE, *(one.file for one in FORMATS.values())}
    if others := sorted(path.name for path in out.iterdir() if path.name not in ours or path.is_dir()):
        named = ", ".join(map(streams.printable, others[:5])) + (f" and {len(others) - 5} more" if others[5:] else "")
        raise FileExistsError(
            f"{out} is an export, and holds what no export writes, which would be lost: {named}; move that elsewhere, "
            "or choose another folder"
        )


def _is_export(folder: pathlib.Path) -> bool:
    try:
        return _folder.is_export(folder)
    except (ValueError, OSError):
        return False


@contextlib.contextmanager
def _replacing(out: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """A temporary folder, which takes the place of `out` when the block has ended and all of it is on the disk."""
    place = pathlib.Path(os.path.realpath(out))  # a link stays, and leads to the new one
    with _named(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent))
    try:
        with _named(out, part):
            yield part
            for path in part.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            part.chmod(0o777 & ~_umask())
        _check_free(out, overwrite)  # again: it took a while
        with _named(out, part):
            _move(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(part: pathlib.Path, place: pathlib.Path) -> None:
    """Gives a folder the name `place`, from which an older export goes when that is done."""
    before = part.with_suffix(".before")
    if place.exists() and any(place.iterdir()):
        place.rename(before)
    try:
        part.rename(place)  # which fails where there is something again
    except BaseException:
        if before.exists():
            before.rename(place)
        raise
    shutil.rmtree(before, ignore_errors=True)


@contextlib.contextmanager
def _named(out: pathlib.Path, part: pathlib.Path | None = None) -> Iterator[None]:
    """Errors name the folder that was asked for, in place of the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{out} cannot be written ({os.strerror(error.errno)})") from error
    except ValueError as error:
        if str(part) not in str(error):
            raise
        raise ValueError(str(error).replace(str(part), str(out))) from error


def _umask() -> int:
    """Of this process, which tells it only when it is set."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
