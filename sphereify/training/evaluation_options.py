"""Options of an evaluation, each declared once. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path

from sphereify.errors import exclusive, no_effect, option
from sphereify.options import check_options, option_field
from sphereify.training.verification_options import VerificationOptions

ROBUSTNESS = "Robustness"


@dataclass(frozen=True)
class EvaluationOptions:
    """Tests of a network beside or instead of that on the images of its classes.

    Raises:
        UsageError: a value that is not valid, one without effect, or two of which one is expected.
    """

    corruptions: bool = option_field(
        False,
        "Test on corrupted images, too: contrast, brightness, darkness, gamma, fog, noise and blur at five strengths.",
        panel=ROBUSTNESS,
    )
    against: str | None = option_field(
        None,
        "Original to put beside the model, alone and behind contrast standardisation: a model, trained by its library "
        f"or with {option('against_weights')}, or an artifact.",
        panel=ROBUSTNESS,
    )
    against_weights: Path | None = option_field(None, "Checkpoint of the original.", panel=ROBUSTNESS)
    verified: VerificationOptions = field(default_factory=VerificationOptions)

    def __post_init__(self) -> None:
        check_options(self)
        if self.against is not None and not self.corruptions:
            raise no_effect("against", f"without {option('corruptions')}")
        if self.against_weights is not None and self.against is None:
            raise no_effect("against_weights", f"without {option('against')}")
        if self.verified.verification and self.corruptions:
            raise exclusive("verification", "corruptions")
