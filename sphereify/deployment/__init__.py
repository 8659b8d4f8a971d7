"""Converted models in use: folded for inference, and exported to files for other runtimes."""
