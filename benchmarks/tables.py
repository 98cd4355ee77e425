"""Tables in Markdown, and where they are shown."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]

MARKED = re.compile(r"(<!-- (results/\S+) -->\n)(.*?)(<!-- end -->)", re.S)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are text, and the others numbers."""
    marks = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def device_name(record: Record) -> str:
    """What a record was measured on: its "device", or how many "cores" where that is the processor."""
    return f"{record['cores']} CPU cores" if record["device"] == "cpu" else record["device"]


def by_device(records: Sequence[Record], section: Callable[[list[Record]], str], command: str) -> str:
    """The sections of all devices; where none is an accelerator, the command that measures there."""
    names = dict.fromkeys(map(device_name, records))
    parts = [section([record for record in records if device_name(record) == name]) for name in names]
    if all(record["device"] == "cpu" for record in records):
        parts.append(f"On an accelerator: not measured yet, by `{command}`.")
    return "\n\n".join(parts) + "\n"


def busy(records: Sequence[Record]) -> str:
    """How many cores other programs took, in a sentence; empty where no record tells."""
    loads = [load for record in records for load in record.get("load", []) if load is not None]
    return f" Just before and after, other programs took up to {max(loads):.1f} cores." if loads else ""


def shown(path: pathlib.Path) -> str:
    """A result as a page shows it: Markdown as it is, other text in a block."""
    text = path.read_text().strip()
    return f"{text}\n" if path.suffix == ".md" else f"```\n{text}\n```\n"


def update(page: pathlib.Path, root: pathlib.Path) -> None:
    """Puts files of results/ into a page, between `<!-- results/NAME -->` and `<!-- end -->`."""
    text = page.read_text()
    page.write_text(MARKED.sub(lambda match: match[1] + shown(root / match[2]) + match[4], text))
