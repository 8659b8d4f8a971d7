"""Predictions for images in files by a network: an artifact, or a file that was exported from one."""
