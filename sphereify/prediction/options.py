"""Options of a prediction, each declared once. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import TypedDict

from sphereify.options import check_options, option_field


@dataclass(frozen=True)
class PredictOptions:
    """Options of a prediction: how many classes to name, and how a network runs over images.

    Raises:
        UsageError: a value that is not valid.
    """

    top: int = option_field(5, "Number of classes to name for each image, the likeliest first.", at_least=1)
    batch_size: int = option_field(32, "Images per batch.", at_least=1)
    device: str = option_field("auto", "cpu, cuda, cuda:1, …; auto: the GPU where there is one.")

    def __post_init__(self) -> None:
        check_options(self)


class PredictKeywords(TypedDict, total=False):
    """The fields of `PredictOptions` as keyword arguments, for type checkers."""

    top: int
    batch_size: int
    device: str
