"""From a split to batches: the order of the examples, worker processes that decode them, and what could not be read."""
