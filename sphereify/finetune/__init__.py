"""How a converted network is trained further, tested, and compared with what it was."""

from sphereify.finetune.comparison import Comparison, Variant, compare, train_once, trained
from sphereify.finetune.evaluation import Evaluation, accuracy, evaluate
from sphereify.finetune.groups import param_groups
from sphereify.finetune.loop import Epoch, Result, Step, finetune
from sphereify.finetune.objective import Objective, Terms
from sphereify.finetune.settings import Settings

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
