"""Models that others wrote, before and after `nfjax.rescale`, beside AnyInit."""
