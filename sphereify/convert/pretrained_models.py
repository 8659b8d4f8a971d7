"""Configurations and methods of Transformers models, and of others with the same methods, that a conversion changes."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from sphereify.errors import SphereifyWarning, UnsupportedModelError
from sphereify.nn import AngularHead
from sphereify.nn.functional_calls import answers_calls
from sphereify.nn.layers import AngularLayer, is_folded_layer


def is_regression(model: nn.Module) -> bool:
    """True if the configuration of a model says that its outputs are numbers to regress, not scores of classes."""
    return getattr(getattr(model, "config", None), "problem_type", None) == "regression"


def guard_methods(model: nn.Module) -> None:
    """Let `save_pretrained` warn and `resize_token_embeddings` refuse what a conversion has changed, in place."""
    for name, guard in GUARDS.items():
        if callable(getattr(type(model), name, None)):
            setattr(model, name, functools.partial(guard, model))


def _save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    kind = _own_class(model).__name__
    warnings.warn(
        SphereifyWarning(
            f"save_pretrained: {kind}.from_pretrained builds the plain {kind}, without angular layers, and would load "
            f"these weights into it. Use sphereify.save(model, folder), and sphereify.load(folder, factory=…) with a "
            f"factory that builds the plain model"
        ),
        stacklevel=2,
    )
    return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[attr-defined]


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    asks = any(value is not None for value in (*args, *kwargs.values()))
    if asks and isinstance(output, nn.Module) and _is_angular(output):
        name = next((name for name, module in model.named_modules() if module is output), "the output layer")
        raise UnsupportedModelError(
            f"resize_token_embeddings: {name} is angular ({type(output).__name__}), and its number of tokens cannot "
            f"change any more. Resize the original, then convert it; or convert with {name} in exclude"
        )
    return type(model).resize_token_embeddings(model, *args, **kwargs)


GUARDS: dict[str, Callable] = {"save_pretrained": _save_pretrained, "resize_token_embeddings": _resize_token_embeddings}
"""The methods that are guarded, and what stands before each."""


def _is_angular(module: nn.Module) -> bool:
    return isinstance(module, (AngularLayer, AngularHead)) or answers_calls(module) or is_folded_layer(module)


def _own_class(model: nn.Module) -> type:
    """The class of a model, without the one that answers its functional calls."""
    return getattr(type(model), "_plain_class", type(model))
