"""A start for a converted network from what the original computes: its layers fitted one by one, without training."""
