"""Values for inputs of which only the shape is known."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import ModelArguments


def filled(arguments: ModelArguments, model: nn.Module) -> ModelArguments:
    """The arguments with values for the tensors that have none, on the device of the model.

    Numbers are normal noise. Whole numbers are random, and small enough for each table of the model; masks are ones,
    types and positions zeros, lengths those of the first sequence. The values are the same in each call.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    limit = max(1, min(tables, default=2))
    length = next((t.shape[1] for t in arguments.tensors() if t.dim() > 1), 1)

    def fill(name: str, value: Any) -> Any:
        def place(tensor: Tensor) -> Tensor:
            return (_values(name, tensor, limit, length) if tensor.is_meta else tensor).to(device)

        return torch.utils._pytree.tree_map_only(Tensor, place, value)

    return arguments.with_values(map(fill, _names(model, arguments), arguments.values()))


def noise(shape: Iterable[int]) -> Tensor:
    """Normal noise that is the same in each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _values(name: str, like: Tensor, limit: int, length: int) -> Tensor:
    if like.dtype == torch.bool or "mask" in name:
        return torch.ones(like.shape, dtype=like.dtype)
    if like.is_floating_point() or like.is_complex():
        return noise(like.shape).to(like.dtype)
    if "length" in name:
        return torch.full(like.shape, length, dtype=like.dtype)
    if re.search("type|position", name):
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.randint(limit, like.shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)


def _names(model: nn.Module, arguments: ModelArguments) -> list[str]:
    """The name of each argument; empty where the signature has none."""
    parameters = [p.name for p in named_parameters(model) if p.kind is not p.KEYWORD_ONLY]
    parameters += [""] * (len(arguments.args) - len(parameters))
    return [*parameters[: len(arguments.args)], *arguments.kwargs]


def named_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a model's forward that have names."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a compiled function
        return []
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
