"""Options that losses and data sets share with training. Imports no torch, so that `--help` answers at once."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from sphereify.choices import ENERGIES, ENERGY_OPTIONS, FILTER_DISTANCES
from sphereify.options import check_belongs, check_options, option_field
from sphereify.wording import listed

DIMENSIONS = 30
"""Dimensions of a projection of the compressive energy where none are given, as in the authors' experiments."""


@dataclass(frozen=True)
class LossOptions:
    """Options of `sphereify.nn.AngularLoss` that training has, too.

    Raises:
        UsageError: a value that is not valid.
    """

    label_smoothing: float = option_field(
        0.0, "Share of the target that is spread over all classes.", at_least=0, at_most=1, usual="0.01 to 0.1"
    )
    sampled_classes: float | None = option_field(
        None,
        "Share of the classes, in (0, 1), whose scores a step computes, for very many classes: those of its images and "
        "others drawn at random. With a margin head.",
        above=0,
        below=1,
        usual="0.1 to 0.3",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class AugmentationOptions:
    """Random changes of training images.

    Raises:
        UsageError: a value that is not valid.
    """

    augment: str | None = option_field(
        None, "Automatic augmentation by timm of the training images, such as rand-m9-mstd0.5."
    )
    color_jitter: float | None = option_field(
        None,
        "Strength x of random changes of brightness, contrast and saturation of the training images, each by a factor "
        "from 1-x to 1+x; default: 0.4 for RGB images above 64 pixels without augment, else 0.",
        at_least=0,
        at_most=1,
        usual="0.2 to 0.8",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class EnergyOptions:
    """Kind of energy and what it takes; see `sphereify.nn.HypersphericalEnergy`.

    Raises:
        UsageError: a number out of range, an unknown word, or an option that the kind does not take.
    """

    energy: str = option_field(
        "mhe",
        f"Kind of energy: {listed(ENERGIES)}. compressive: of random projections; separation: of the closest pair "
        "alone; determinant: of the volume that the filters span.",
        choices=ENERGIES,
    )
    s: float = option_field(
        1.0, "Power s in the energy ‖ŵᵢ-ŵⱼ‖⁻ˢ of two filters; 0 is its logarithm.", at_least=0, usual="0, 1, 2"
    )
    half_space: bool = option_field(False, "Energy of directions: a filter and its opposite count as one.")
    self_pairs: bool = option_field(
        True, "With half_space, count the constant pairs of a filter and its own opposite in the mean."
    )
    distance: str = option_field(
        "euclidean",
        f"Distance between two filters in the energy: {', '.join(FILTER_DISTANCES)} (A-MHE).",
        choices=FILTER_DISTANCES,
    )
    dimensions: int | None = option_field(
        None,
        f"Dimensions of the random projections of a compressive energy; default: {DIMENSIONS}, and layers with no more "
        "inputs are not projected.",
        at_least=2,
        usual="20 to 40",
    )
    projections: int = option_field(
        20, "Number of random projections of a compressive energy.", at_least=1, usual="5 to 30"
    )
    gamma: float = option_field(
        1.0, "Sharpness γ of the kernel exp(-γ‖ŵᵢ-ŵⱼ‖²) of a determinant.", above=0, usual="0.5 to 4"
    )
    hidden_weight: float = option_field(1.0, "Factor of the hidden layers' energy; 0 leaves them out.", at_least=0)
    output_weight: float = option_field(
        1.0, "Factor of the output layer's energy.", at_least=0, usual="1, or 10 as in the authors' code"
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_kind((field.name for field in fields(self) if getattr(self, field.name) != field.default), self.energy)


def check_kind(given: Iterable[str], energy: str, prefix: str = "") -> None:
    """Make sure that each option that was given is one of this kind of energy.

    Args:
        given: names of fields of `EnergyOptions`.
        energy: the kind.
        prefix: what stands before these names where the options were given, for the error.

    Raises:
        NoEffectError: the kind does not take one of them.
    """
    for name in given:
        check_belongs(f"{prefix}{name}", ENERGY_OPTIONS.get(name, ENERGIES), f"{prefix}energy", energy)
