"""The two forms in which a source hands over a split: decoded arrays in memory, or encoded images read one by one.

Every example of a split has an index from 0, and the order in which training visits the indices is not the split's
concern.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging


@dataclasses.dataclass(frozen=True)
class Images:
    """A split in memory.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int32 [N].

    Raises:
        ValueError: The arrays are of another type or shape, or there are not as many labels as images.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if (
            self.images.dtype != np.uint8
            or self.images.ndim != 4
            or self.images.shape[-1] != 3
            or len(self.images) != len(self.labels)
        ):
            raise ValueError(
                f"images {self.images.dtype} {self.images.shape} with {len(self.labels)} labels: "
                "expected uint8 [N, H, W, 3] and N labels"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of the examples at `indices` [B]: {"image": uint8 [B, H, W, 3], "label": int32 [B]}."""
        return {"image": self.images[indices], "label": self.labels[indices]}

    def part(self, indices: np.ndarray) -> Images:
        """The split of these examples only."""
        return Images(self.images[indices], self.labels[indices])


class Reader(Protocol):
    """Reads one encoded example. Small and picklable: every worker process gets its own copy, and opens files itself,
    when it first needs them.
    """

    def __call__(self, reference: Any) -> tuple[bytes, int]:
        """Reads an example.

        Args:
            reference: Of `Encoded.reference`.

        Returns:
            The bytes of an image file, and the label.

        Raises:
            OSError, ValueError: It cannot be read; the message says what is wrong with it.
        """


class NamingReader(Reader, Protocol):
    """A reader that can say where it finds an example."""

    def name(self, reference: Any) -> str:
        """How a person finds it."""


class Encoded(Protocol):
    """A split of images as their files hold them. The listing stays in the process that made it; what crosses to a
    worker is a reference per example.

    Attributes:
        reader: Reads an example.
    """

    reader: Reader

    def __len__(self) -> int: ...

    def reference(self, index: int) -> Any:
        """What the reader needs to find example `index`; small and picklable."""

    def name(self, index: int) -> str:
        """How a person finds example `index`: a path, or a record's number and file."""


class Part:
    """Those examples of a split of encoded images whose numbers are `indices`."""

    def __init__(self, whole: Encoded, indices: np.ndarray):
        self.reader, self._whole, self._indices = whole.reader, whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> np.ndarray | None:
        """Of its examples, int32 [N], where the whole knows them without reading; else None."""
        whole = getattr(self._whole, "labels", None)
        return None if whole is None else whole[self._indices]

    def reference(self, index: int) -> Any:
        return self._whole.reference(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._whole.name(int(self._indices[index]))


class Numbered:
    """A split of encoded images that its reader finds, and names, by their number."""

    def __init__(self, reader: NamingReader, size: int) -> None:
        """Takes a reader whose references are the numbers from 0 to `size - 1`."""
        self.reader, self._size = reader, size

    def __len__(self) -> int:
        return self._size

    def reference(self, index: int) -> int:
        return int(index)

    def name(self, index: int) -> str:
        return self.reader.name(index)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split with the names of their classes.

    Attributes:
        train: The examples to train with.
        test: Those to evaluate with.
        class_names: Of label 0, label 1 and so on.
        skipped: {what could not be read: why}.
        fingerprint: Called, it gives a text that changes when the data does, and so names a cache of decoded images; a
            function, because finding out may mean asking for the times and the size of a million files. None where
            nobody can tell: nothing is cached then.
        left_aside: {ending: number of files that are no images}.
        version: Of a packed or prepared data set, what it states of its contents, the same for every copy of it.
        identity: See `nfjax.data.identity`; None where nobody has asked for it.
    """

    train: Images | Encoded
    test: Images | Encoded
    class_names: tuple[str, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    fingerprint: Callable[[], str] | None = None
    left_aside: dict[str, int] = dataclasses.field(default_factory=dict)
    version: str | None = None
    identity: Callable[[], dict[str, dict[str, str]]] | None = None

    def thinned(self, share: float) -> Dataset:
        """A part of both splits, spread evenly: where a split is sorted by class, every class keeps its share.

        Args:
            share: More than 0, at most 1; of each split one example remains at least.
        """
        if share == 1:
            return self

        def part(split: Images | Encoded) -> Images | Encoded:
            count = max(1, round(share * len(split)))
            indices = ((np.arange(count) + 0.5) * len(split) / count).astype(np.int64)
            return split.part(indices) if isinstance(split, Images) else Part(split, indices)

        whole = self.fingerprint
        fingerprint = None if whole is None else lambda: f"{whole()} {share}"
        return dataclasses.replace(self, train=part(self.train), test=part(self.test), fingerprint=fingerprint)


def check_classes(class_names: Sequence[str], where: str, more: str = "") -> None:
    """Refuses a single class: whatever a network learns, it is right about one.

    Args:
        class_names: The classes.
        where: What has them, the beginning of a sentence.
        more: Its end.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(class_names) < 2:
        raise ValueError(
            f"{where}: {', '.join(class_names) or 'none'}; expected at least two, for a network that knows one answer "
            f"is always right{f'. {more}' if more else ''}"
        )


def left_aside(counts: Mapping[str, int]) -> str:
    """In words: "3 files that are no images are left aside (2 .txt, 1 .db)"."""
    total = sum(counts.values())
    each = ", ".join(f"{count:,} {ending}" for ending, count in sorted(counts.items(), key=lambda item: -item[1])[:8])
    return f"{total:,} file{'s that are no images are' if total > 1 else ' that is no image is'} left aside ({each})"


def warn_of_missing_classes(what: str, counts: Iterable[int], class_names: tuple[str, ...]) -> None:
    """Warns where a split has no example of some classes.

    Args:
        what: The split, for the message.
        counts: Examples of each class.
        class_names: Of the classes.
    """
    missing = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        named = ", ".join(name if name.isprintable() else ascii(name) for name in missing[:8])
        logging.warning("%s has no example of %d classes: %s%s", what, len(missing), named, more)
