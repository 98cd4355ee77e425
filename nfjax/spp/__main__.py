"""python -m nfjax.spp: the same as `nfjax spp`."""

from nfjax import cli

if __name__ == "__main__":
    cli.main("spp")
