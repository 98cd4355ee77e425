"""A folder of images, one subfolder per class: decoded once, in parallel, kept in memory, and cached.

    DIR/train/<class>/*.jpg
    DIR/test/<class>/*.jpg     (or DIR/val/<class>/*.jpg)

Any format that Pillow reads. A file that cannot be decoded is skipped and named; more than 1 % of a split is an error.
The decoded arrays are cached under `cache_directory()`, keyed by the names, sizes and times of all files and by the
image size.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import zipfile

import numpy as np
import tqdm
from absl import logging

from nfjax.data.arrays import Dataset, Images

TEST_NAMES = ("test", "val")
SKIPPED_SHARE = 0.01
File = tuple[str, int]  # path relative to the root, label


def cache_directory() -> pathlib.Path:
    """Where decoded images are kept: $NFJAX_CACHE, or nfjax in the user's cache directory."""
    if "NFJAX_CACHE" in os.environ:
        return pathlib.Path(os.environ["NFJAX_CACHE"])
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "nfjax"


def load(directory: str, image_size: int) -> Dataset:
    """Reads `directory/train` and `directory/test` (or `val`); class names are the folder names, sorted.

    Each image becomes RGB uint8 [image_size, image_size, 3]: the short side resized (antialiased, bilinear), the centre
    cut out. Raises FileNotFoundError, NotADirectoryError or ValueError that name the folder and the layout expected.
    """
    root = pathlib.Path(directory)
    expected = (
        f"expected the layout\n  {root}/train/<class>/*.jpg\n  {root}/test/<class>/*.jpg   "
        f"(or {root}/val/<class>/*.jpg)"
    )
    if not directory:
        raise ValueError(
            "no data directory given; set it with --config.data.dir=DIR, where DIR has the layout "
            "DIR/{train,test}/<class>/*.jpg"
        )
    if not root.exists():
        raise FileNotFoundError(f"the data directory {root} does not exist; {expected}")
    if not root.is_dir():
        raise NotADirectoryError(f"the data directory {root} is a file; {expected}")
    test_name = next((name for name in TEST_NAMES if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_name is None:
        missing = "train" if not (root / "train").is_dir() else "test (or val)"
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"the data directory {root} has no folder {missing}: it holds {found}; {expected}")

    class_names = _classes(root / "train", expected)
    unknown = [name for name in _classes(root / test_name, expected) if name not in class_names]
    if unknown:
        raise ValueError(
            f"{root / test_name} has class folders that {root / 'train'} lacks: {', '.join(unknown[:8])}"
            f"{' and more' if len(unknown) > 8 else ''}; a network cannot predict a class it never sees: add them to "
            "train, or remove them"
        )
    files = {split: _files(root, split, class_names) for split in ("train", test_name)}
    for split, listed in files.items():
        if not listed:
            raise FileNotFoundError(f"{root / split} has class folders but no files in them; {expected}")
    seen = {label for _, label in files["train"]}
    if len(seen) < len(class_names):
        empty = [name for label, name in enumerate(class_names) if label not in seen]
        raise ValueError(
            f"{root / 'train'} has class folders without files: {', '.join(empty[:8])}; fill or remove them"
        )
    _check_memory(sum(map(len, files.values())), image_size)

    cache = cache_directory() / f"folder-{_fingerprint(root, files, image_size)}.npz"
    arrays = _read_cache(cache)
    if arrays is None:
        arrays = _decode_all(root, files, test_name, image_size)
        _write_cache(cache, arrays)
    else:
        logging.info("decoded images read from %s", cache)
    train = Images(arrays["train_images"], arrays["train_labels"])
    test = Images(arrays["test_images"], arrays["test_labels"])
    return Dataset(train, test, class_names, tuple(map(str, arrays["skipped"])))


def _classes(split: pathlib.Path, expected: str) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise FileNotFoundError(f"{split} has no class folders; {expected}")
    return names


def _files(root: pathlib.Path, split: str, class_names: tuple[str, ...]) -> list[File]:
    listed = []
    for label, name in enumerate(class_names):
        visited: set[str] = set()
        for folder, subfolders, names in os.walk(root / split / name, followlinks=True):
            if os.path.realpath(folder) in visited:  # a link to where the walk has been
                subfolders.clear()
                continue
            visited.add(os.path.realpath(folder))
            subfolders.sort()
            here = os.path.relpath(folder, root)
            listed += [(os.path.join(here, file), label) for file in sorted(names) if not file.startswith(".")]
    return listed


def _check_memory(count: int, image_size: int) -> None:
    needed = count * image_size * image_size * 3
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if needed > limit:
        raise ValueError(
            f"{count} images of {image_size}x{image_size} pixels take {needed / 2**30:.1f} GiB, more than half of "
            "this machine's memory "
            f"({limit / 2**30:.1f} GiB); this loader keeps them in memory: use a smaller --config.data.image_size or "
            "fewer images"
        )


def _fingerprint(root: pathlib.Path, files: dict[str, list[File]], image_size: int) -> str:
    digest = hashlib.sha256(f"1 {image_size} {root.resolve()}".encode())
    for listed in files.values():
        for path, label in listed:
            try:
                status = os.stat(root / path)
                digest.update(os.fsencode(path) + f" {label} {status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:  # a link to nowhere: decoding will skip and name it
                digest.update(os.fsencode(path) + b" unreadable\n")
    return digest.hexdigest()[:16]


def decode(path: pathlib.Path, image_size: int) -> np.ndarray:
    """The middle square of an image file, resized, as uint8 [image_size, image_size, 3].

    Raises OSError or ValueError for what is no image of 8 bits per channel.
    """
    from PIL import Image

    if not path.is_file():
        raise OSError(f"{path} is no regular file")
    with Image.open(path) as image:
        if image.mode[0] in "IF":  # 16 bits and more: convert() would clip them to white
            raise ValueError(f"{path} has pixels of mode {image.mode}: expected 8 bits per channel")
        image = image.convert("RGB")
        if image.size != (image_size, image_size):
            scale = image_size / min(image.size)
            width, height = (max(image_size, round(n * scale)) for n in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - image_size) // 2, (height - image_size) // 2
            image = image.crop((left, top, left + image_size, top + image_size))
        return np.asarray(image)


def _decode_all(
    root: pathlib.Path, files: dict[str, list[File]], test_name: str, image_size: int
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    skipped: list[str] = []
    total = sum(map(len, files.values()))
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm.tqdm(total=total, desc=f"decoding {root.name}", unit=" images", mininterval=1) as bar,
    ):
        for split, listed in files.items():
            images = np.empty((len(listed), image_size, image_size, 3), np.uint8)
            good = np.ones(len(listed), bool)

            def decode_slice(start: int, listed=listed, images=images, good=good) -> None:
                stop = min(start + 64, len(listed))
                for i in range(start, stop):
                    try:
                        images[i] = decode(root / listed[i][0], image_size)
                    except Exception as error:  # decoders raise nearly anything on corrupt bytes
                        good[i] = False
                        logging.debug("cannot decode %s: %s", listed[i][0], error)
                bar.update(stop - start)

            list(pool.map(decode_slice, range(0, len(listed), 64)))
            bad = [_printable(path) for (path, _), ok in zip(listed, good, strict=True) if not ok]
            if len(bad) > SKIPPED_SHARE * len(listed):
                raise ValueError(
                    f"{len(bad)} of the {len(listed)} files in {root / split} cannot be read as images, more than "
                    f"{SKIPPED_SHARE:.0%}: "
                    f"{', '.join(bad[:10])}{' and more' if len(bad) > 10 else ''}; remove or repair them"
                )
            skipped += bad
            name = "test" if split == test_name else "train"
            arrays[f"{name}_images"] = images[good] if bad else images
            arrays[f"{name}_labels"] = np.array([label for _, label in listed], np.int32)[good]
    return arrays | {"skipped": np.array(skipped, dtype=np.str_)}


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def _read_cache(cache: pathlib.Path) -> dict[str, np.ndarray] | None:
    try:
        with open(cache, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            names = ("train_images", "train_labels", "test_images", "test_labels", "skipped")
            return {name: stored[name] for name in names}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("the cache %s cannot be read (%s) and is made again", cache, error)
        return None


def _write_cache(cache: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.savez(stream, **arrays)
        os.replace(temporary, cache)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        logging.warning(
            "the decoded images cannot be cached in %s (%s); the next run decodes them again", cache.parent, error
        )
