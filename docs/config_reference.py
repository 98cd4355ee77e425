"""The page of all settings, made from `nfjax/config.py`: its values from `base()`, its words from the comments."""

from __future__ import annotations

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from nfjax import config

HEAD = """# Settings

Every setting of a run, with its default and its source, made from `nfjax/config.py`. "Paper" stands for Civitelli et
al., "ours" for what concerns only this program. On the command line a setting is `--config.<name>=<value>`, and `none`
empties one that may be empty. A config file starts from these values and changes what differs.

"""


def leaves(node: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("model.depth", 18), ...: every setting with its default."""
    for name in node:
        value = node[name]
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def comments(source: str) -> dict[str, str]:
    """What the comment behind or above each `config.x.y = ...` says. One above a blank line speaks of the group below
    it, and belongs to its first setting.
    """
    lines = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        name = ast.unparse(node.targets[0])
        if not name.startswith("config."):
            continue
        above, line = [], node.lineno - 1
        while line in lines and source.splitlines()[line - 1].lstrip().startswith("#"):
            above.insert(0, lines[line])
            line -= 1
        text = " ".join([*above, *([lines[node.end_lineno]] if node.end_lineno in lines else [])])
        found.setdefault(name.removeprefix("config."), text)
    return found


def markdown() -> str:
    """The whole page."""
    said = comments(pathlib.Path(config.__file__).read_text())
    defaults, sections = dict(leaves(config.base())), {}
    in_order = [name for name in said if name in defaults]  # that of the file; a ConfigDict sorts its fields
    for name in [*in_order, *(name for name in defaults if name not in said)]:
        value = defaults[name]
        shown = "none" if value is None else str(value) if not isinstance(value, str) else value or '""'
        text = _sentence(said.get(name, "")).replace("|", "\\|")
        sections.setdefault(name.rpartition(".")[0], []).append(f"| `{name}` | `{shown}` | {text} |")
    parts = [HEAD]
    for section, rows in sections.items():
        title = f"## `{section}`" if section else "## The run"
        parts.append("\n".join([title, "", "| setting | default | |", "|---|---|---|", *rows, ""]) + "\n")
    return "\n".join(parts)


def _sentence(text: str) -> str:
    """What a comment says, with a capital letter, and names of modules as code."""
    text = re.sub(r"\b(?:nfjax(?:\.\w+)+|\w+(?:\.\w+)?:\w+|tfds:NAME|huggingface:NAME)", r"`\g<0>`", text)
    return text[:1].upper() + text[1:]
