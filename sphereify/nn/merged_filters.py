"""Refusal of tools that give an angular layer filters with which it cannot work.

A BatchNorm that is merged into filters changes their lengths, which have no effect. Quantized filters do not tell their
lengths.
"""

import sys
from typing import NoReturn

from torch import nn

from sphereify.errors import UnsupportedModelError
from sphereify.nn.quantized import is_quantized


class HasDirections(nn.Module):
    """A module whose filters have a direction and no length."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as assignment does; refuse quantized filters and those merged with another layer."""
        if name in self._parameters and param is not None:
            if name == "weight" and is_quantized(param):
                self._refuse_quantizing(param)
            # torch.nn.utils.fusion, or what does the same: a new weight, and then a bias that there was not.
            if _called_by_fusion() or (name == "bias" and self.bias is None and vars(self).get("_has_new_weight")):
                self._refuse_merging()
            if name == "weight" and param is not self._parameters["weight"]:
                vars(self)["_has_new_weight"] = True
        super().register_parameter(name, param)

    def _refuse_quantizing(self, weight: nn.Parameter) -> NoReturn:
        raise UnsupportedModelError(
            f"{type(self).__name__}: its weight is being quantized ({type(weight).__name__}), but an angular layer "
            f"computes the lengths of its filters from it in each pass. Fold the model first, which makes them "
            f"constants: quantize_(sphereify.fold(model), …)"
        )

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
