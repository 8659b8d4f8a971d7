"""How a converted network is trained further."""

from sphereify.finetune.groups import param_groups
from sphereify.finetune.loop import Epoch, Settings, accuracy, finetune
from sphereify.finetune.objective import Objective, Terms

__all__ = ["Epoch", "Objective", "Settings", "Terms", "accuracy", "finetune", "param_groups"]
