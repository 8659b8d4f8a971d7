"""The parts of a hyperspherical network: operators, layers, heads, losses and regularizers. They need torch alone."""

from sphereify.nn.heads import AngularHead, AngularOutput
from sphereify.nn.layers import SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from sphereify.nn.losses import AngularLoss, MarginAnnealing, as_metric_loss
from sphereify.nn.operators import (
    AngularOperator,
    CosineOperator,
    LearnableSigmoidOperator,
    LinearOperator,
    SigmoidOperator,
)
from sphereify.nn.regularizers import HypersphericalEnergy, OrthogonalityPenalty

__all__ = [
    "AngularHead",
    "AngularLoss",
    "AngularOperator",
    "AngularOutput",
    "CosineOperator",
    "HypersphericalEnergy",
    "LearnableSigmoidOperator",
    "LinearOperator",
    "MarginAnnealing",
    "OrthogonalityPenalty",
    "SigmoidOperator",
    "SphereConv1d",
    "SphereConv2d",
    "SphereConv3d",
    "SphereLinear",
    "as_metric_loss",
]
