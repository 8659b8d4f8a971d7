"""Options of sharing a network, each declared once. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import TypedDict

from sphereify.errors import refused
from sphereify.options import check_options, option_field

CARD = "Model card"


@dataclass(frozen=True)
class PushOptions:
    """Options of a push: where a network goes on the hub, and what its model card says.

    Raises:
        UsageError: a value that is not valid.
    """

    license: str | None = option_field(
        None,
        "Licence of the network, such as apache-2.0, mit or cc-by-nc-4.0, which that of its base model must allow; "
        "default: the one that the base model's configuration names, and required where it names none.",
        panel=CARD,
    )
    base_model: str | None = option_field(
        None,
        "Repository on the hub of the model whose weights the network started from; default: the one that was built by "
        "name with pretrained weights.",
        panel=CARD,
    )
    accuracy: float | None = option_field(
        None,
        "Accuracy of the network on test images, in [0, 1], as `sphereify evaluate` measures it; default: that of its "
        "training.",
        panel=CARD,
        at_least=0,
        at_most=1,
    )
    original_accuracy: float | None = option_field(
        None,
        "Accuracy of the original network on the same test images, in [0, 1], to put beside that of the converted one.",
        panel=CARD,
        at_least=0,
        at_most=1,
    )
    replace_card: bool = option_field(
        False, "Replace the model card (README.md) that the repository has, which stays otherwise.", panel=CARD
    )
    private: bool = option_field(False, "Make a new repository private; one that exists stays as it is.")
    revision: str | None = option_field(None, "Branch to push to, which is made if it is missing; default: main.")
    commit_message: str | None = option_field(None, "Message of the commit; default: what is uploaded.")
    token: str | None = option_field(
        None, "Access token that may write; default: that in HF_TOKEN, or of `hf auth login`, which stay out of sight."
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("license", "base_model", "revision", "commit_message", "token"):
            value = getattr(self, name)
            if value is not None and not str(value).strip():
                raise refused(name, "is empty")


class PushKeywords(TypedDict, total=False):
    """The fields of `PushOptions` as keyword arguments, for type checkers."""

    license: str | None
    base_model: str | None
    accuracy: float | None
    original_accuracy: float | None
    replace_card: bool
    private: bool
    revision: str | None
    commit_message: str | None
    token: str | None
