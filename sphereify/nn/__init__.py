"""What a hyperspherical network is made of. Knows torch and nothing else."""

from sphereify.nn.heads import AngularHead
from sphereify.nn.layers import SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from sphereify.nn.operators import (
    AngularOperator,
    CosineOperator,
    LearnableSigmoidOperator,
    LinearOperator,
    SigmoidOperator,
)
from sphereify.nn.regularizers import param_groups

__all__ = [
    "AngularHead",
    "AngularOperator",
    "CosineOperator",
    "LearnableSigmoidOperator",
    "LinearOperator",
    "SigmoidOperator",
    "SphereConv1d",
    "SphereConv2d",
    "SphereConv3d",
    "SphereLinear",
    "param_groups",
]
