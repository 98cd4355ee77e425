"""python -m nfjax.data: the same as `nfjax data`."""

from nfjax import cli

if __name__ == "__main__":
    cli.main("data")
