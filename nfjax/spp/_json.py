"""What was measured, as JSON."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nfjax import storage


def write(content: Mapping[str, Any], path: str | pathlib.Path | None) -> str:
    """As JSON, where what is not finite stands as null, "inf" or "-inf".

    Args:
        content: Arrays, numbers and texts, in mappings and sequences.
        path: A file that is written, too.

    Returns:
        The text.

    Raises:
        OSError: The file cannot be written.
    """
    text = json.dumps(_plain(content), indent=1)
    if path is not None:
        storage.write_text(pathlib.Path(path), text + "\n")
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
