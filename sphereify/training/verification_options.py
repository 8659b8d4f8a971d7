"""Options of a verification. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphereify.errors import no_effect, option
from sphereify.options import check_options, option_field

VERIFICATION = "Verification"


@dataclass(frozen=True)
class VerificationOptions:
    """Options of a verification: what is verified, and how; see `sphereify.training.verification`.

    Raises:
        UsageError: a value that is not valid, or one without effect.
    """

    verification: bool = option_field(
        False,
        "Test whether embeddings (the input of the classifier) tell images of one identity from others, instead of "
        "testing classes: ROC, true accept rates, equal error rate, nearest neighbours. Identities are the classes "
        "that were left out of training, or else all of the data.",
        panel=VERIFICATION,
    )
    pairs: Path | None = option_field(
        None,
        "List of the pairs to verify, a text or CSV file: two paths relative to the folder of the data, and 1 (same) "
        "or 0 (different); default: all pairs of images.",
        panel=VERIFICATION,
    )
    max_pairs: int = option_field(
        2_000_000,
        "Largest number of pairs of images; of more, a random choice is scored.",
        panel=VERIFICATION,
        at_least=2,
    )
    neighbours: int = option_field(
        1, "Nearest neighbours that vote for an identity.", panel=VERIFICATION, at_least=1, usual="1 to 10"
    )
    embedding_layer: str | None = option_field(
        None, "Name of the layer whose input is the embedding; default: the classifier.", panel=VERIFICATION
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("pairs", "embedding_layer"):
            if getattr(self, name) is not None and not self.verification:
                raise no_effect(name, f"without {option('verification')}")

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of `sphereify.training.verification.verification`, without the pairs."""
        return {name: getattr(self, name) for name in ("max_pairs", "neighbours", "embedding_layer")}
