"""Values that are not finite: where they first appear in a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_bad_weight(model: nn.Module) -> str | None:
    """The first parameter, or its part on this process, with a value that is not finite."""
    parameters = model.named_parameters()
    return next((name for name, p in parameters if not getattr(p, "_local_tensor", p).isfinite().all()), None)


def first_bad_layer(model: nn.Module, images: Tensor | None) -> str:
    """The first layer whose weights, or else whose output for `images`, are not finite, as a phrase."""
    if (name := first_bad_weight(model)) is not None:
        layer, _, parameter = name.rpartition(".")
        return f"{layer} (its {parameter})"
    if images is None:
        return "none: only the loss itself"
    if not images.isfinite().all():
        return "none: an image of the batch holds such a value"
    output = _first_bad_output(model, images)
    return "none: only the loss itself" if output is None else f"{output or 'the model itself'} (its output)"


@torch.no_grad()
def _first_bad_output(model: nn.Module, images: Tensor) -> str | None:
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
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else None
