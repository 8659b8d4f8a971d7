"""Rewrite a PyTorch network that exists into a hyperspherical one, and train it further.

    from sphereify import sphereify
    model = sphereify(timm.create_model("resnet18"), operator="cosine", skip_shortcuts=True)

Names are loaded when they are first used, so that `import sphereify` costs nothing.
"""

from typing import TYPE_CHECKING

from sphereify.lazy import lazy_names

if TYPE_CHECKING:
    from sphereify.artifact import load, save
    from sphereify.calibration.least_squares import calibrate
    from sphereify.calibration.suggestion import suggest
    from sphereify.conversion import sphereify
    from sphereify.convert.options import ConversionOptions
    from sphereify.convert.plan import ConversionPlan, Decision
    from sphereify.convert.planner import plan_conversion
    from sphereify.convert.rewrite import apply_plan
    from sphereify.deployment.exporting import export
    from sphereify.deployment.folding import fold
    from sphereify.nn import AngularLoss, HypersphericalEnergy, OrthogonalityPenalty
    from sphereify.prediction.predicting import predict
    from sphereify.sharing.pushing import push_to_hub
    from sphereify.training.comparison import compare
    from sphereify.training.evaluation import evaluate
    from sphereify.training.optim import param_groups
    from sphereify.training.run import finetune
    from sphereify.training.settings import Settings

__version__ = "0.1.0"

_HOMES = {
    "AngularLoss": "sphereify.nn",
    "ConversionOptions": "sphereify.convert.options",
    "ConversionPlan": "sphereify.convert.plan",
    "Decision": "sphereify.convert.plan",
    "HypersphericalEnergy": "sphereify.nn",
    "OrthogonalityPenalty": "sphereify.nn",
    "Settings": "sphereify.training.settings",
    "apply_plan": "sphereify.convert.rewrite",
    "calibrate": "sphereify.calibration.least_squares",
    "compare": "sphereify.training.comparison",
    "evaluate": "sphereify.training.evaluation",
    "export": "sphereify.deployment.exporting",
    "finetune": "sphereify.training.run",
    "fold": "sphereify.deployment.folding",
    "load": "sphereify.artifact",
    "param_groups": "sphereify.training.optim",
    "plan_conversion": "sphereify.convert.planner",
    "predict": "sphereify.prediction.predicting",
    "push_to_hub": "sphereify.sharing.pushing",
    "save": "sphereify.artifact",
    "sphereify": "sphereify.conversion",
    "suggest": "sphereify.calibration.suggestion",
}

__all__ = [
    "AngularLoss",
    "ConversionOptions",
    "ConversionPlan",
    "Decision",
    "HypersphericalEnergy",
    "OrthogonalityPenalty",
    "Settings",
    "apply_plan",
    "calibrate",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "fold",
    "load",
    "param_groups",
    "plan_conversion",
    "predict",
    "push_to_hub",
    "save",
    "sphereify",
    "suggest",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
