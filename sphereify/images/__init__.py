"""Images: the folders and the files that they lie in, and the transforms that prepare them for a model."""
