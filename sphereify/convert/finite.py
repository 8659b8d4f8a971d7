"""Values that are not finite: where they first appear in a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import Inputs, ModelArguments


def first_bad_weight(model: nn.Module) -> str | None:
    """The first parameter, or its part on this process, with a value that is not finite."""
    parameters = model.named_parameters()
    return next((name for name, p in parameters if not getattr(p, "_local_tensor", p).isfinite().all()), None)


def answers_of(logits: Tensor) -> Tensor:
    """The class of the highest score in each row of logits (B, classes), and −1 where that score is not finite.

    Scores of −∞ are those of classes that are masked out; a row with NaN has no highest score.
    """
    best = logits.max(1)
    return best.indices.where(best.values.isfinite(), -1)


def first_bad_layer(model: nn.Module, inputs: Inputs = None) -> str:
    """The first layer whose weights, or else whose output for these inputs, are not finite, as a phrase."""
    if (name := first_bad_weight(model)) is not None:
        layer, _, parameter = name.rpartition(".")
        return f"{layer or 'the model itself'} (its {parameter})"
    if inputs is None:
        return "none: only the loss itself"
    arguments = ModelArguments.of(inputs)
    numbers = [one for one in arguments.tensors() if one.is_floating_point()]
    if not all(one.isfinite().all() for one in numbers):
        return "none: an input holds such a value"
    output = _first_bad_output(model, arguments)
    return "none: only the loss itself" if output is None else f"{output or 'the model itself'} (its output)"


@torch.no_grad()
def _first_bad_output(model: nn.Module, arguments: ModelArguments) -> str | None:
    names: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
            if not all(t.isfinite().all() for t in tensors):
                names.append(name)

        return look

    modules = [(n, m) for n, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]  # takes no hooks
    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        arguments.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else None
