"""How a converted network is trained further."""

from sphereify.finetune.groups import param_groups
from sphereify.finetune.loop import Epoch, Settings, accuracy, finetune

__all__ = ["Epoch", "Settings", "accuracy", "finetune", "param_groups"]
