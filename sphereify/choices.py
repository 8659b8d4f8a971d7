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
HEADS = (
    "auto",
    "keep",
    "w-softmax",
    "ga-softmax",
    "a-softmax",
    "s-softmax",
    "arcface",
    "cosface",
    "sphereface2",
)
"""Values of `head`. "auto" and "keep" are policies, the others kinds of `AngularHead`."""

ENERGIES = ("mhe", "compressive", "separation", "determinant")
"""Kinds of hyperspherical energy."""
FILTER_DISTANCES = ("euclidean", "angular")
"""Measures of the distance between two filters in the hyperspherical energy."""
ENERGY_OPTIONS = {
    "s": ("mhe", "compressive"),
    "distance": ("mhe", "compressive", "separation"),
    "self_pairs": ("mhe", "compressive"),
    "dimensions": ("compressive",),
    "projections": ("compressive",),
    "gamma": ("determinant",),
}
"""Options that some kinds of energy take, with the kinds that do."""

EXPORT_FORMATS = ("onnx", "torch-export")

HEAD_KINDS = tuple(head for head in HEADS if head not in ("auto", "keep"))
MARGIN_HEADS = ("ga-softmax", "a-softmax", "arcface", "cosface", "sphereface2")
"""Kinds whose score of the target class, in training, bears a margin."""
ANNEALED_HEADS = ("ga-softmax", "a-softmax")
"""Kinds whose margin is a multiple of the angle, which SphereFace introduces step by step."""
MARGIN_GRADIENTS = ("true", "detached")
"""The gradient of a margin: its own, or that of the score without a margin."""
DEFAULT_EPS = 1e-4
"""ε of the authors' code, added to both squared norms."""


def canonical(word: str) -> str:
    """`Learnable_Sigmoid` and `learnable-sigmoid` are the same choice."""
    return word.strip().lower().replace("_", "-")
