"""scikit-learn: its handwritten digits, and its measures of verification and of nearest neighbours."""

from typing import Any

from sphereify.errors import DataError, UsageError, option

MEMORY = 256
"""Working memory in MiB of a search for neighbours."""


def check_installed(name: str) -> None:
    """Make sure that scikit-learn is installed, before work that ends in it begins.

    Args:
        name: the option that needs it.

    Raises:
        UsageError: it is not.
    """
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{option(name)} needs scikit-learn: pip install 'sphereify[verification]'") from error


def handwritten_digits() -> tuple[Any, Any, list[str], list[int], list[int]]:
    """The 1,797 images (0 to 16, 8×8) and classes as arrays, names of the classes, and rows to train and to test on.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("data 'digits' needs scikit-learn: pip install 'sphereify[digits]'") from error
    raw = load_digits()
    train, test = train_test_split(range(len(raw.target)), test_size=0.2, random_state=0, stratify=raw.target)
    return raw.images, raw.target, [str(name) for name in raw.target_names], train, test


def roc(same: Any, scores: Any) -> tuple[Any, Any]:
    """The ROC of scores at each of their values: false and true accept rates as arrays, both from 0 to 1.

    Args:
        same: 1 for pairs of one identity, 0 for others; both must occur.
        scores: the higher, the more alike.
    """
    from sklearn.metrics import roc_curve

    false_accepts, true_accepts, _ = roc_curve(same, scores, drop_intermediate=False)
    return false_accepts, true_accepts


def neighbour_accuracy(embeddings: Any, identities: Any, neighbours: int) -> float | None:
    """The share of embeddings whose nearest neighbours among all others vote for their identity.

    Embeddings without another one of their identity are neighbours only; None if all are.

    Args:
        embeddings: of unit length, so that the nearest one is that of the highest cosine; (images, features).
        identities: whole numbers, (images,).
        neighbours: number of neighbours that vote, ≥ 1, below the number of images.
    """
    import numpy as np
    from sklearn import config_context
    from sklearn.metrics import accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    _, places, counts = np.unique(identities, return_inverse=True, return_counts=True)
    has_others = counts[places] > 1
    if not has_others.any():
        return None
    with config_context(working_memory=MEMORY):
        votes = KNeighborsClassifier(neighbours, algorithm="brute").fit(embeddings, identities).predict(None)
    return float(accuracy_score(identities[has_others], votes[has_others]))
