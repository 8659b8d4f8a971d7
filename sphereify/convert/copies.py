"""Copies of a model: a whole one, and a skeleton that can run without a trace in the original."""

import copy
import functools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sphereify.convert.hooks import computes_weight, forward_hooks, hooks_of_forward, rebind_hooks
from sphereify.errors import UnsupportedModelError, option
from sphereify.nn.functional_calls import make_plain


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of a model: computed tensors are copied too, and hooks refer to the copy.

    Raises:
        UnsupportedModelError: the model cannot be copied.
    """
    memo: dict[int, Any] = dict(_computed_tensors(model))
    try:
        memo |= _compiled_parts(model)
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Convert it with "
            f"{option('inplace', True)}."
        ) from error
    rebind_hooks(copied, memo)
    return copied


def skeletons(model: nn.Module) -> Iterator[nn.Module]:
    """Skeletons of a model to try one after the other until one runs, which differ in the hooks that they keep.

    A hook that refers to the model is run from the start, since the forward may need what it collects. The rest are
    spectators of the user's; they are run where nothing else helps.
    """
    everything, own = set(forward_hooks(model)), hooks_of_forward(model)
    choices = [own, set(), everything]
    for position, kept in enumerate(choices):
        if kept not in choices[:position]:
            yield skeleton(model, kept)


def skeleton(model: nn.Module, hooks: set[int] | None = None) -> nn.Module:
    """A copy that shares the parameters and nothing else, makes plain calls, and runs none of the user's hooks.

    Args:
        hooks: ids of hooks of `model` that run all the same.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    memo |= _computed_tensors(model) | _compiled_parts(model)
    bones = copy.deepcopy(model, memo)
    for original, module in zip(model.modules(), bones.modules(), strict=True):
        make_plain(module)
        _drop_hooks(module, original, hooks or set())
    rebind_hooks(bones, memo)
    return bones


def _computed_tensors(model: nn.Module) -> dict[int, torch.Tensor]:
    """Detached copies, by id, of the tensors that modules and hooks keep from a computation, which deepcopy refuses.

    Old weight norms keep such tensors, and so do networks that collect features.
    """
    copies: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type, types.FunctionType, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                copies[id(value)] = value.detach().clone()
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, deque)):
            waiting += value
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif isinstance(value, functools.partial):
            waiting += [*value.args, *value.keywords.values()]
        elif isinstance(getattr(value, "__dict__", None), dict):
            waiting += vars(value).values()
    return copies


def _compiled_parts(model: nn.Module) -> dict[int, nn.Module]:
    """Copies, by id, of the parts that torch.jit has compiled. A plain deepcopy leaves them without leaf parameters."""
    copies: dict[int, nn.Module] = {}
    for part in model.modules():
        if isinstance(part, torch.jit.ScriptModule) and id(part) not in copies:
            with torch.no_grad():
                copied = copy.deepcopy(part)
            for parameter, original in zip(copied.parameters(), part.parameters(), strict=True):
                parameter.requires_grad_(original.requires_grad)
            inner = zip(part.modules(), copied.modules(), strict=True)
            copies |= {id(module): its_copy for module, its_copy in inner}
    return copies


def _drop_hooks(module: nn.Module, original: nn.Module, exempt: set[int]) -> None:
    """Remove all hooks but those with which torch computes a weight and those to keep, known by the original's."""
    for name, hooks in vars(module).items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            before = vars(original)[name]
            for key in [k for k, hook in hooks.items() if not computes_weight(hook) and id(before[k]) not in exempt]:
                del hooks[key]
