"""All image files below a folder as a split without labels, for benchmarks; importable by worker processes."""

from __future__ import annotations

import pathlib


def read(path: str) -> tuple[bytes, int]:
    with open(path, "rb") as file:
        return file.read(), 0


class Files:
    """All files below a folder, label 0, each `copies` times."""

    def __init__(self, folder: str, copies: int = 1):
        self.paths = sorted(str(path) for path in pathlib.Path(folder).rglob("*") if path.is_file()) * copies
        self.reader = read

    def __len__(self) -> int:
        return len(self.paths)

    def reference(self, index: int) -> str:
        return self.paths[index]

    def name(self, index: int) -> str:
        return self.paths[index]
