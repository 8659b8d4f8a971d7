"""The terms of the loss that training minimises. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass, fields

from sphereify.choices import FILTER_DISTANCES
from sphereify.errors import UsageError, option
from sphereify.options import check_options, option_field

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
    mhe: float = option_field(
        0.0,
        "Weight of the hyperspherical energy, which spreads filters over the sphere.",
        panel=LOSS,
        at_least=0,
        usual="1",
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
        unused = [f.name for f in fields(self) if f.name.startswith("mhe_") and getattr(self, f.name) != f.default]
        if unused and not self.mhe:
            names = ", ".join(map(option, unused))
            raise UsageError(f"{names}: no effect without {option('mhe')}, whose usual weight is 1")
