"""Where images come from: one module for each source, listed in `nfjax.data.DATASETS` and `nfjax.data.COLLECTIONS`."""
