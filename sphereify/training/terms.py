"""The terms of the loss that training minimises. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass, fields

from sphereify.choices import ENERGIES, ENERGY_OPTIONS, FILTER_DISTANCES
from sphereify.errors import NoEffectError, option
from sphereify.options import check_belongs, check_options, option_field
from sphereify.wording import listed

LOSS = "Loss"


@dataclass(frozen=True)
class Terms:
    """The terms of the loss; a regularizer of weight 0 is left out.

    Raises:
        UsageError: a value that is not valid, or an option of the hyperspherical energy while its weight is 0.
    """

    label_smoothing: float = option_field(
        0.0,
        "Share of the target that is spread over all classes.",
        panel=LOSS,
        at_least=0,
        at_most=1,
        usual="0.01 to 0.1",
    )
    margin_anneal: bool = option_field(
        True,
        "Introduce the margin of ga-softmax and a-softmax as SphereFace did, with λ = max(5, 1000/(1+0.12·step)).",
        panel=LOSS,
    )
    sampled_classes: float | None = option_field(
        None,
        "Share of the classes, in (0, 1), whose scores a step computes, for very many classes: those of its images and "
        "others drawn at random. With a margin head.",
        panel=LOSS,
        above=0,
        below=1,
        usual="0.1 to 0.3",
    )
    mhe: float = option_field(
        0.0,
        "Weight of the hyperspherical energy, which spreads filters over the sphere.",
        panel=LOSS,
        at_least=0,
        usual="1, or 0.01 for a determinant",
    )
    mhe_energy: str = option_field(
        "mhe",
        f"Kind of energy: {listed(ENERGIES)}. compressive: of random projections; separation: of the closest pair "
        "alone; determinant: of the volume that the filters span.",
        panel=LOSS,
        choices=ENERGIES,
    )
    mhe_s: float = option_field(
        1.0,
        "Power s in the energy ‖ŵᵢ-ŵⱼ‖⁻ˢ of two filters; 0 is its logarithm.",
        panel=LOSS,
        at_least=0,
        usual="0, 1, 2",
    )
    mhe_half_space: bool = option_field(
        False,
        "Energy of directions: a filter and its opposite count as one.",
        panel=LOSS,
    )
    mhe_distance: str = option_field(
        "euclidean",
        f"Distance between two filters in the energy: {', '.join(FILTER_DISTANCES)} (A-MHE).",
        panel=LOSS,
        choices=FILTER_DISTANCES,
    )
    mhe_dimensions: int | None = option_field(
        None,
        "Dimensions of the random projections of a compressive energy; default: 30, and layers with no more inputs are "
        "not projected.",
        panel=LOSS,
        at_least=2,
        usual="20 to 40",
    )
    mhe_projections: int = option_field(
        20, "Number of random projections of a compressive energy.", panel=LOSS, at_least=1, usual="5 to 30"
    )
    mhe_gamma: float = option_field(
        1.0, "Sharpness γ of the kernel exp(-γ‖ŵᵢ-ŵⱼ‖²) of a determinant.", panel=LOSS, above=0, usual="0.5 to 4"
    )
    mhe_hidden: float = option_field(
        1.0,
        "Factor of the hidden layers' energy; 0 leaves them out.",
        panel=LOSS,
        at_least=0,
    )
    mhe_output: float = option_field(
        1.0,
        "Factor of the output layer's energy.",
        panel=LOSS,
        at_least=0,
        usual="1, or 10 as in the authors' code",
    )
    orthogonality: float = option_field(
        0.0,
        "Weight of the orthogonality penalty ‖ŴᵀŴ-I‖² over the normalized filters of each hidden layer.",
        panel=LOSS,
        at_least=0,
        usual="1e-4",
    )

    def __post_init__(self) -> None:
        check_options(self)
        changed = [f.name for f in fields(self) if f.name.startswith("mhe_") and getattr(self, f.name) != f.default]
        if changed and not self.mhe:
            names = ", ".join(map(option, changed))
            raise NoEffectError(
                f"{names}: no effect without {option('mhe')}, whose usual weight is 1",
                option=changed[0],
                value=getattr(self, changed[0]),
            )
        for name in changed:
            kinds = ENERGY_OPTIONS.get(name.removeprefix("mhe_"), ENERGIES)
            check_belongs(name, kinds, "mhe_energy", self.mhe_energy)
