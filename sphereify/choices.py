"""The words a user may choose from, and defaults that several packages share, in one place that imports nothing.

The command line prints them without loading torch; the code that acts on them keys its tables by them.
"""

OPERATORS = ("linear", "cosine", "sigmoid", "learnable-sigmoid")
MAGNITUDES = ("sphere", "ball", "tanh", "linear", "segment", "log", "mix")
MAGNITUDE_MEANS = ("input", "data")
SHARE_K = ("filter", "layer", "network")
RESCALE = ("auto", "always", "never")
NORM = ("keep", "replace")
ATTENTION = ("keep", "convert")
HEADS = ("auto", "keep", "w-softmax", "ga-softmax", "a-softmax", "s-softmax")
"""Values of `head`. "auto" and "keep" are policies, the others kinds of `AngularHead`."""

FILTER_DISTANCES = ("euclidean", "angular")
"""Measures of the distance between two filters in the hyperspherical energy."""

EXPORT_FORMATS = ("onnx", "torch-export")

HEAD_KINDS = tuple(head for head in HEADS if head not in ("auto", "keep"))
MARGIN_HEADS = ("ga-softmax", "a-softmax")
"""Kinds whose score of the target class, in training, bears an angular margin."""

DEFAULT_EPS = 1e-4
"""ε of the authors' code, added to both squared norms."""


def canonical(word: str) -> str:
    """`Learnable_Sigmoid` and `learnable-sigmoid` are the same choice."""
    return word.strip().lower().replace("_", "-")
