"""python -m nfjax: the same as `nfjax`."""

from nfjax import cli

if __name__ == "__main__":
    cli.main()
