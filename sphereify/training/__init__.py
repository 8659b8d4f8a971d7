"""How a converted network is trained further, tested, and compared with what it was."""

from sphereify.training.comparison import Comparison, Variant, compare, train_once, trained
from sphereify.training.evaluation import Evaluation, accuracy, evaluate
from sphereify.training.objective import Objective, Terms
from sphereify.training.optim import param_groups
from sphereify.training.run import Epoch, Result, Step, finetune
from sphereify.training.settings import Settings

__all__ = [
    "Comparison",
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
