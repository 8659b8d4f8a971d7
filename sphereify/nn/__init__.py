"""The parts of a hyperspherical network: operators, layers, heads, losses and regularizers. They need torch alone."""

from sphereify.nn.annealing import MarginAnnealing
from sphereify.nn.heads import AngularHead
from sphereify.nn.layers import SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from sphereify.nn.losses import AngularLoss
from sphereify.nn.magnitudes import Magnitude
from sphereify.nn.metric_loss import as_metric_loss
from sphereify.nn.operators import (
    AngularOperator,
    CosineOperator,
    LearnableSigmoidOperator,
    LinearOperator,
    SigmoidOperator,
)
from sphereify.nn.orthogonality import OrthogonalityPenalty
from sphereify.nn.outputs import AngularOutput
from sphereify.nn.regularizers import HypersphericalEnergy

__all__ = [
    "AngularHead",
    "AngularLoss",
    "AngularOperator",
    "AngularOutput",
    "CosineOperator",
    "HypersphericalEnergy",
    "LearnableSigmoidOperator",
    "LinearOperator",
    "Magnitude",
    "MarginAnnealing",
    "OrthogonalityPenalty",
    "SigmoidOperator",
    "SphereConv1d",
    "SphereConv2d",
    "SphereConv3d",
    "SphereLinear",
    "as_metric_loss",
]
