"""Training: a converted network is trained further, tested, and compared with what it was."""

from typing import TYPE_CHECKING

from sphereify.lazy import lazy_names

if TYPE_CHECKING:
    from sphereify.training.comparison import compare, variants
    from sphereify.training.comparison_results import Comparison
    from sphereify.training.data_options import DataOptions
    from sphereify.training.evaluation import Evaluation, accuracy, evaluate
    from sphereify.training.objective import Objective
    from sphereify.training.optim import param_groups
    from sphereify.training.recipe import with_recipe
    from sphereify.training.results import Epoch, Result, Step
    from sphereify.training.robustness import Robustness
    from sphereify.training.run import finetune
    from sphereify.training.run_folder import RunFolder
    from sphereify.training.settings import Settings
    from sphereify.training.teacher import Original, open_teacher
    from sphereify.training.terms import Terms
    from sphereify.training.variant import Variant
    from sphereify.training.variant_runs import train_once, trained
    from sphereify.training.verification import Verification

_HOMES = {
    "Comparison": "sphereify.training.comparison_results",
    "DataOptions": "sphereify.training.data_options",
    "Epoch": "sphereify.training.results",
    "Evaluation": "sphereify.training.evaluation",
    "Objective": "sphereify.training.objective",
    "Original": "sphereify.training.teacher",
    "Result": "sphereify.training.results",
    "Robustness": "sphereify.training.robustness",
    "RunFolder": "sphereify.training.run_folder",
    "Settings": "sphereify.training.settings",
    "Step": "sphereify.training.results",
    "Terms": "sphereify.training.terms",
    "Variant": "sphereify.training.variant",
    "Verification": "sphereify.training.verification",
    "accuracy": "sphereify.training.evaluation",
    "compare": "sphereify.training.comparison",
    "evaluate": "sphereify.training.evaluation",
    "finetune": "sphereify.training.run",
    "open_teacher": "sphereify.training.teacher",
    "param_groups": "sphereify.training.optim",
    "train_once": "sphereify.training.variant_runs",
    "trained": "sphereify.training.variant_runs",
    "variants": "sphereify.training.comparison",
    "with_recipe": "sphereify.training.recipe",
}

__all__ = [
    "Comparison",
    "DataOptions",
    "Epoch",
    "Evaluation",
    "Objective",
    "Original",
    "Result",
    "Robustness",
    "RunFolder",
    "Settings",
    "Step",
    "Terms",
    "Variant",
    "Verification",
    "accuracy",
    "compare",
    "evaluate",
    "finetune",
    "open_teacher",
    "param_groups",
    "train_once",
    "trained",
    "variants",
    "with_recipe",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
