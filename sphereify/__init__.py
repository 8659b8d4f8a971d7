"""Rewrite a PyTorch network that exists into a hyperspherical one, and train it further.

    from sphereify import sphereify
    model = sphereify(timm.create_model("resnet18"), operator="cosine", skip_shortcuts=True)

Names are loaded when they are first used, so that `import sphereify` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphereify.artifact import load, save
    from sphereify.convert import ConversionPlan, Decision, apply_plan, plan_conversion, sphereify
    from sphereify.convert.calibrate import calibrate
    from sphereify.convert.fold import fold
    from sphereify.convert.suggest import suggest
    from sphereify.finetune.groups import param_groups
    from sphereify.nn import AngularLoss, HypersphericalEnergy, OrthogonalityPenalty

__version__ = "0.1.0"

_HOMES = {
    "AngularLoss": "sphereify.nn",
    "ConversionPlan": "sphereify.convert",
    "Decision": "sphereify.convert",
    "HypersphericalEnergy": "sphereify.nn",
    "OrthogonalityPenalty": "sphereify.nn",
    "apply_plan": "sphereify.convert",
    "calibrate": "sphereify.convert.calibrate",
    "fold": "sphereify.convert.fold",
    "load": "sphereify.artifact",
    "param_groups": "sphereify.finetune.groups",
    "plan_conversion": "sphereify.convert",
    "save": "sphereify.artifact",
    "sphereify": "sphereify.convert",
    "suggest": "sphereify.convert.suggest",
}

__all__ = [
    "AngularLoss",
    "ConversionPlan",
    "Decision",
    "HypersphericalEnergy",
    "OrthogonalityPenalty",
    "apply_plan",
    "calibrate",
    "fold",
    "load",
    "param_groups",
    "plan_conversion",
    "save",
    "sphereify",
    "suggest",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sphereify' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
