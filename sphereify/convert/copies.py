"""Copies of a model: a whole one, and a skeleton that can run without a trace in the original."""

import copy
from typing import Any

import torch
from torch import nn

from sphereify.errors import UnsupportedModelError, option
from sphereify.nn.functional_calls import make_plain


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of a model, computed tensors included.

    Raises:
        UnsupportedModelError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, _computed_tensors(model))
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Convert it with "
            f"{option('inplace', True)}."
        ) from error


def skeleton(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters and nothing else, makes plain calls, and runs none of the user's hooks."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    shared.update(_computed_tensors(model))
    bones = copy.deepcopy(model, shared)
    for module in bones.modules():
        make_plain(module)
        _drop_hooks(module)
    return bones


def _computed_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Detached copies, by id, of the tensors that modules keep from a computation, which deepcopy refuses.

    Old weight norms keep such tensors.
    """
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(t): t.detach().clone() for t in values if isinstance(t, torch.Tensor) and not t.is_leaf}


def _drop_hooks(module: nn.Module) -> None:
    """Remove all hooks but those with which torch computes a weight."""
    for name, hooks in vars(module).items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            for key in [k for k, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
                del hooks[key]
