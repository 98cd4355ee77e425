"""Labels of a flat folder of images, such as ImageNet's validation set as its authors publish it.

Looked for in DIR, DIR/<folder>, DIR/devkit and DIR/ILSVRC2012_devkit_t12, and in a subfolder data of each:

- a CSV file: <folder>.csv, <folder>_labels.csv, labels.csv or LOC_val_solution.csv (Kaggle's). Each row a file name,
  with or without its ending, and the name of a class; what follows the class behind a space is ignored, a header is
  optional.
- ILSVRC2012_validation_ground_truth.txt: line n is the number of the class of image n; with meta.mat, which says what
  class each number means.
"""

from __future__ import annotations

import csv
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from absl import logging

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
NUMBERED = re.compile(rb"ILSVRC2012_val_(\d{8})\.\w+")
HEADERS = (b"image", b"imageid", b"image_id", b"file", b"filename", b"file_name", b"name", b"id", b"path")


def of_flat_folder(
    root: pathlib.Path, folder: str, files: list[bytes], class_names: tuple[str, ...]
) -> tuple[dict[bytes, int], dict[str, str]]:
    """The labels of the files in a folder without class folders.

    Args:
        root: The data directory.
        folder: In it, such as "val".
        files: The names of the files.
        class_names: Of label 0, label 1 and so on.

    Returns:
        {file name: label}, and {path of a file without a label: why}.

    Raises:
        FileNotFoundError: No file says what they are.
        ValueError: A label is out of range or of an unknown class, or the labels are not those of these files.
    """
    places = _places(root, folder)
    *names, _ = file_names(folder)
    found = next((place / name for name in names for place in places if (place / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{root / folder} has no class folders, and no file says which class its {len(files)} files belong to: "
            f"looked for {', '.join(names)} in {', '.join(str(place) for place in places)}. A CSV file has rows of a "
            "file name and a class name; ImageNet's development kit has the last of these, and a meta.mat"
        )
    files = [name for name in files if os.fsdecode(name) not in file_names(folder)]
    if found.suffix == ".csv":
        labels = _of_csv(found, files, class_names)
    else:
        labels = _of_ground_truth(found, places, files, class_names)
    skipped = {
        f"{folder}/{name.decode('utf-8', 'backslashreplace')}": f"no label in {found.name}"
        for name in files
        if name not in labels
    }
    return labels, skipped


def file_names(folder: str) -> tuple[str, ...]:
    """Of the files that may say what is in a flat folder, in the order in which they are looked for; `META` the last,
    which says nothing alone.
    """
    return (*_own(folder), "labels.csv", "LOC_val_solution.csv", GROUND_TRUTH, META)


def has_its_own(root: pathlib.Path, folder: str) -> bool:
    """Whether a file of labels bears the name of this folder."""
    return any((place / name).is_file() for name in _own(folder) for place in _places(root, folder))


def _own(folder: str) -> tuple[str, str]:
    return f"{folder}.csv", f"{folder}_labels.csv"


def _places(root: pathlib.Path, folder: str) -> list[pathlib.Path]:
    places = [root, root / folder, root / "devkit", root / "ILSVRC2012_devkit_t12"]
    return places + [place / "data" for place in places]


def _of_csv(file: pathlib.Path, files: list[bytes], class_names: tuple[str, ...]) -> dict[bytes, int]:
    numbers = {name: label for label, name in enumerate(class_names)}
    known = {os.path.splitext(name)[0]: name for name in files} | {name: name for name in files}
    labels: dict[bytes, int] = {}
    absent = []
    with open(file, newline="", encoding="utf-8-sig") as stream:
        rows = csv.reader(stream)
        for row in _each(rows, file):
            if not row:
                continue
            if len(row) < 2:
                raise ValueError(f"{file} line {rows.line_num} is {','.join(row)!r}: expected a file name and a class")
            name, label = os.fsencode(os.path.basename(row[0].strip())), row[1].strip()
            if rows.line_num == 1 and name.lower() in HEADERS and name not in known:
                continue
            number = numbers.get(label, numbers.get(label.partition(" ")[0]))
            if number is None:
                raise ValueError(
                    f"{file} line {rows.line_num} gives {row[0]} the class {label!r}, which train lacks: "
                    f"expected one of its {len(class_names)} class folders, such as {', '.join(class_names[:3])}"
                )
            if name not in known:
                absent.append(row[0])
            elif labels.get(known[name], number) != number:
                raise ValueError(f"{file} line {rows.line_num} gives {row[0]} a second class, {label!r}")
            else:
                labels[known[name]] = number
    _check_present(file, labels, absent, files)
    return labels


def _each(rows: Any, file: pathlib.Path) -> Iterator[list[str]]:
    try:
        yield from rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} behind line {rows.line_num} is no CSV in UTF-8: {error}") from error


def _of_ground_truth(
    file: pathlib.Path, places: list[pathlib.Path], files: list[bytes], class_names: tuple[str, ...]
) -> dict[bytes, int]:
    meta = next((place / META for place in [file.parent, *places] if (place / META).is_file()), None)
    if meta is None:
        raise FileNotFoundError(
            f"{file} numbers the classes as the development kit does, and its {META}, which names them, is missing: "
            f"put it beside that file; looked in {', '.join(str(place) for place in places)}"
        )
    wnids = _wnids(meta)
    numbers = {name: label for label, name in enumerate(class_names)}
    by_line = []
    for line, text in enumerate(file.read_text().split(), 1):
        if not text.isdigit() or int(text) not in wnids:
            raise ValueError(f"{file} line {line} is {text!r}: expected one of the {len(wnids)} numbers in {meta}")
        by_line.append(wnids[int(text)])
    unknown = sorted(set(by_line) - set(class_names))
    if unknown:
        raise ValueError(
            f"{file} has images of {len(unknown)} classes that train lacks, such as {', '.join(unknown[:4])}; a "
            "network cannot predict a class it never sees: add them to train, or give the labels of the others as CSV"
        )
    matches = [NUMBERED.fullmatch(name) for name in files]
    if all(matches):  # the number is in the name: files may be missing
        lines = {name: int(match[1]) for name, match in zip(files, matches, strict=True) if match}
        beyond = [name for name, line in lines.items() if not 1 <= line <= len(by_line)]
        if beyond:
            raise ValueError(f"{os.fsdecode(beyond[0])} has no line in {file}, which has {len(by_line)} lines")
        if len(files) < len(by_line):
            logging.warning("%s has %d lines for %d files", file, len(by_line), len(files))
    elif len(files) == len(by_line):
        lines = {name: line for line, name in enumerate(sorted(files), 1)}
    else:
        raise ValueError(
            f"{file} has {len(by_line)} lines for {len(files)} files whose names are not ILSVRC2012_val_<number>: "
            "which belongs to which is unknown; give the labels as CSV"
        )
    return {name: numbers[by_line[line - 1]] for name, line in lines.items()}


def _wnids(meta: pathlib.Path) -> dict[int, str]:
    """{number: name of the class folder} of a development kit."""
    from scipy import io

    try:
        synsets = io.loadmat(str(meta), squeeze_me=True)["synsets"]
        return {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets if int(entry["num_children"]) == 0}
    except Exception as error:  # scipy raises nearly anything on what is no MATLAB file
        raise ValueError(f"{meta} is no meta.mat of ImageNet's development kit: {error!r}") from error


def _check_present(file: pathlib.Path, labels: dict[bytes, int], absent: list[str], files: list[bytes]) -> None:
    if not labels:
        raise ValueError(
            f"{file} labels none of the {len(files)} files: it names {', '.join(absent[:3]) or 'nothing'}, they are "
            f"named {', '.join(os.fsdecode(name) for name in files[:3])}"
        )
    if absent:
        logging.warning("%s has labels of %d files that are not there, such as %s", file, len(absent), absent[0])
