"""python -m nfjax.main --config=FILE --workdir=DIR: the same as `nfjax train`, as the paper's readers know it."""

from nfjax import cli

if __name__ == "__main__":
    cli.main("train")
