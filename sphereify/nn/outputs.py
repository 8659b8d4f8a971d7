"""The output of a model with a margin head, and the scores in whatever a model returns."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sphereify.errors import UsageError

INSTEAD = (
    "use loss = AngularLoss(model), loss(output, targets), and call a model that computes a loss of its own without "
    "its labels="
)


class _Scores(NamedTuple):
    logits: Tensor | None
    """Logits without the margin, (*, num_classes), for accuracies. None if the head has `training_logits` off."""
    features: Tensor
    """The input of the head, of shape (*, in_features)."""


class AngularOutput(_Scores):
    """The output of a model with a margin head in training, for `AngularLoss`; in evaluation it is plain logits.

    Attributes:
        head: the head that made it, with the weights that it had then, so that a loss follows those of a copy, an
            average or `torch.func.functional_call`. None where a function took the tuple apart and made another, as
            `torch.vmap` and `DataParallel` do.
    """

    head: nn.Module | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        raise UsageError(
            f"{name}: got an AngularOutput, expected a tensor. A margin head returns it in training, since the margin "
            f"depends on the target: {INSTEAD}. Scores are output.logits."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"'AngularOutput' object has no attribute {name!r}")
        raise AttributeError(
            f"an AngularOutput is no tensor and has no {name!r}: scores are output.logits, the loss is "
            f"AngularLoss(model)(output, targets); call a model that computes a loss of its own without its labels="
        )


def made_by(head: nn.Module, logits: Tensor | None, features: Tensor) -> AngularOutput:
    """The output of a head that remembers which tensors it was made with."""
    output = AngularOutput(logits, features)
    if not torch.compiler.is_compiling():
        output.head = _snapshot(head)
    return output


def _snapshot(module: nn.Module) -> nn.Module:
    """The module with the tensors that it has now: it shares them, and keeps them when others take their place."""
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    children = {name: child if child is None else _snapshot(child) for name, child in module._modules.items()}
    vars(twin).update(_modules=children)
    return twin


def scores_of(output: Any) -> Any:
    """The scores in the output of a model: its `logits` or "logits", where it has some, as Transformers' outputs have.

    An output without them is returned as it is, and so is a tuple, whose other parts may be scores as well.
    """
    if isinstance(output, (Tensor, tuple)):
        return output
    scores = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return scores if isinstance(scores, (Tensor, AngularOutput)) else output
