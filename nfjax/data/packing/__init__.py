"""From a data set to shards that are read fast: `python -m nfjax.data pack`."""
