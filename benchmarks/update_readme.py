"""Puts the tables of results/ into the README, between `<!-- results/NAME.md -->` and `<!-- end -->`.

python benchmarks/update_readme.py
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    readme = ROOT / "README.md"
    marked = re.compile(r"(<!-- (results/\S+) -->\n).*?(<!-- end -->)", re.S)
    readme.write_text(marked.sub(lambda m: m[1] + (ROOT / m[2]).read_text().strip() + "\n" + m[3], readme.read_text()))


if __name__ == "__main__":
    main()
