"""Refusal of tools that merge a BatchNorm into the filters of an angular layer, where their lengths have no effect."""

import sys
from typing import NoReturn

from torch import nn

from sphereify.errors import UnsupportedModelError


class HasDirections(nn.Module):
    """A module whose filters have a direction and no length."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as assignment does; refuse the new weight and bias of a layer merged with another."""
        if name in self._parameters and param is not None:
            # torch.nn.utils.fusion, or what does the same: a new weight, and then a bias that there was not.
            if _called_by_fusion() or (name == "bias" and self.bias is None and vars(self).get("_has_new_weight")):
                self._refuse_merging()
            if name == "weight" and param is not self._parameters["weight"]:
                vars(self)["_has_new_weight"] = True
        super().register_parameter(name, param)

    def _refuse_merging(self) -> NoReturn:
        raise UnsupportedModelError(
            f"{type(self).__name__}: another layer, such as a BatchNorm, is being merged into its weight and bias, but "
            f"the length of an angular filter has no effect, and the result would compute something else. Merge the "
            f"original, then convert it; sphereify.fold prepares a converted model for inference"
        )


def _called_by_fusion() -> bool:
    """True if a function of torch.nn.utils.fusion assigns the parameter."""
    frame = sys._getframe(2)  # of whoever registers: nn.Module.__setattr__ below the assignment
    caller = frame.f_back
    return any(f is not None and f.f_globals.get("__name__") == "torch.nn.utils.fusion" for f in (frame, caller))
