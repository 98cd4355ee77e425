"""python -m nfjax.reproduce: the same as `nfjax reproduce`."""

from nfjax import cli

if __name__ == "__main__":
    cli.main("reproduce")
