"""The terms of the loss that training minimises. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass, fields

from sphereify.errors import NoEffectError, option
from sphereify.options import check_options, option_field, same_option
from sphereify.shared_options import EnergyOptions, LossOptions, check_kind

LOSS = "Loss"


@dataclass(frozen=True)
class Terms:
    """The terms of the loss; a regularizer of weight 0 is left out.

    Raises:
        UsageError: a value that is not valid, or an option of the hyperspherical energy while its weight is 0.
    """

    label_smoothing: float = same_option(LossOptions, "label_smoothing", panel=LOSS)
    margin_anneal: bool = option_field(
        True,
        "Introduce the margin of ga-softmax and a-softmax as SphereFace did, with λ = max(5, 1000/(1+0.12·step)).",
        panel=LOSS,
    )
    sampled_classes: float | None = same_option(LossOptions, "sampled_classes", panel=LOSS)
    mhe: float = option_field(
        0.0,
        "Weight of the hyperspherical energy, which spreads filters over the sphere.",
        panel=LOSS,
        at_least=0,
        usual="1, or 0.01 for a determinant",
    )
    mhe_energy: str = same_option(EnergyOptions, "energy", panel=LOSS)
    mhe_s: float = same_option(EnergyOptions, "s", panel=LOSS)
    mhe_half_space: bool = same_option(EnergyOptions, "half_space", panel=LOSS)
    mhe_distance: str = same_option(EnergyOptions, "distance", panel=LOSS)
    mhe_dimensions: int | None = same_option(EnergyOptions, "dimensions", panel=LOSS)
    mhe_projections: int = same_option(EnergyOptions, "projections", panel=LOSS)
    mhe_gamma: float = same_option(EnergyOptions, "gamma", panel=LOSS)
    mhe_hidden: float = same_option(EnergyOptions, "hidden_weight", panel=LOSS)
    mhe_output: float = same_option(EnergyOptions, "output_weight", panel=LOSS)
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
        check_kind((name.removeprefix("mhe_") for name in changed), self.mhe_energy, "mhe_")
