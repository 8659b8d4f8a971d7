"""Training: a converted network is trained further, tested, and compared with what it was."""

from typing import TYPE_CHECKING

from sphereify.lazy import lazy_names

if TYPE_CHECKING:
    from sphereify.training.comparison import Comparison, Variant, compare, train_once, trained
    from sphereify.training.data_options import DataOptions
    from sphereify.training.evaluation import Evaluation, accuracy, evaluate
    from sphereify.training.objective import Objective
    from sphereify.training.optim import param_groups
    from sphereify.training.run import Epoch, Result, Step, finetune
    from sphereify.training.settings import Settings
    from sphereify.training.terms import Terms

_HOMES = {
    "Comparison": "sphereify.training.comparison",
    "DataOptions": "sphereify.training.data_options",
    "Epoch": "sphereify.training.run",
    "Evaluation": "sphereify.training.evaluation",
    "Objective": "sphereify.training.objective",
    "Result": "sphereify.training.run",
    "Settings": "sphereify.training.settings",
    "Step": "sphereify.training.run",
    "Terms": "sphereify.training.terms",
    "Variant": "sphereify.training.comparison",
    "accuracy": "sphereify.training.evaluation",
    "compare": "sphereify.training.comparison",
    "evaluate": "sphereify.training.evaluation",
    "finetune": "sphereify.training.run",
    "param_groups": "sphereify.training.optim",
    "train_once": "sphereify.training.comparison",
    "trained": "sphereify.training.comparison",
}

__all__ = [
    "Comparison",
    "DataOptions",
    "Epoch",
    "Evaluation",
    "Objective",
    "Result",
    "Settings",
    "Step",
    "Terms",
    "Variant",
    "accuracy",
    "compare",
    "evaluate",
    "finetune",
    "param_groups",
    "train_once",
    "trained",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
