"""Puts files of results/ into the README, between `<!-- results/NAME -->` and `<!-- end -->`.

python benchmarks/update_readme.py
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- (results/\S+) -->\n)(.*?)(<!-- end -->)", re.S)


def shown(path: str) -> str:
    """A result as the README shows it: Markdown as it is, other text in a block."""
    text = (ROOT / path).read_text().strip()
    return f"{text}\n" if path.endswith(".md") else f"```\n{text}\n```\n"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(MARKED.sub(lambda match: match[1] + shown(match[2]) + match[4], readme.read_text()))


if __name__ == "__main__":
    main()
