"""What a trained network is good for: predictions, and how far they can be trusted."""
