"""python -m nfjax.reproduce table1 table2 figure2 figure6 [--out=results]

The paper's tables and figures: on the screen, and as CSV, Markdown and PNG files under --out.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from nfjax import compilation
from nfjax.reproduce import REPRODUCTIONS


def main() -> None:
    names = ", ".join(REPRODUCTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m nfjax.reproduce", description="The paper's tables and figures, measured here."
    )
    parser.add_argument("names", nargs="+", choices=REPRODUCTIONS, metavar="NAME", help=f"what to reproduce: {names}")
    parser.add_argument("--out", default="results", help="folder for what is written (default: results)")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(None, "no permission")
    except OSError as error:
        sys.exit(f"nfjax: cannot write to {out} ({error.strerror}); choose another folder with --out=DIR")
    compilation.keep()
    for name in arguments.names:
        result = REPRODUCTIONS[name]()
        written = result.write(out / name)
        print(f"{result.text()}\n{', '.join(map(str, written))}\n", flush=True)


if __name__ == "__main__":
    main()
