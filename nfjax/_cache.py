"""Where copies are kept that can be made again: of data sets, of decoded images, and of compiled programs."""

from __future__ import annotations

import os
import pathlib


def cache_directory() -> pathlib.Path:
    """Where copies are kept: $NFJAX_CACHE, or nfjax in the user's cache directory.

    Raises OSError where this user has no home directory and nothing else is said.
    """
    try:
        if chosen := os.environ.get("NFJAX_CACHE"):
            return pathlib.Path(chosen).expanduser()
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "nfjax"
    except RuntimeError as error:
        raise OSError(f"there is no place for copies ({error}); set NFJAX_CACHE to a directory for them") from error


def cache_folder(*names: str) -> pathlib.Path:
    """A folder below `cache_directory()`, made where it was not there. Raises OSError where it cannot be."""
    folder = cache_directory().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder}, for copies, cannot be made ({error.strerror}); set NFJAX_CACHE to another directory",
        ) from error
    return folder
