"""Options of a comparison, each declared once. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import TypedDict

from sphereify.errors import option
from sphereify.options import check_options, option_field
from sphereify.training.evaluation_options import ROBUSTNESS


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of a comparison: how often each network is trained, and what is measured.

    Raises:
        UsageError: a value that is not valid.
    """

    seeds: int = option_field(
        1,
        f"Number of runs of each network, with seeds from {option('seed')} on.",
        at_least=1,
        python_help="Number of runs of each variant, with the seeds settings.seed, settings.seed + 1, …",
    )
    reach: float | None = option_field(
        None,
        "Accuracy in (0, 1] to count steps to; default: 95 % of the original's.",
        above=0,
        at_most=1,
        noun="an accuracy",
        usual="0.7 to 0.95",
        python_help="Accuracy in (0, 1] to which steps are counted; default: 95 % of the first variant's mean.",
    )
    corruptions: bool = option_field(
        False,
        "Test on corrupted images, too, and beside them the original behind contrast standardisation.",
        panel=ROBUSTNESS,
        python_help="Test the trained networks on corrupted images, too, and with them the first variant behind "
        "contrast standardisation, if it is no conversion; see `robustness`.",
    )

    def __post_init__(self) -> None:
        check_options(self)


class ComparisonKeywords(TypedDict, total=False):
    """The fields of `ComparisonOptions` as keyword arguments, for type checkers."""

    seeds: int
    reach: float | None
    corruptions: bool
