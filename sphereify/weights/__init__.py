"""Weights: the checkpoint files that they lie in, and how they fill a model."""
