"""Calibration of an angular head from the features that it receives and the original's class scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.calibration.regression import regress
from sphereify.calibration.results import LayerFit
from sphereify.calibration.rows import Batch
from sphereify.nn import AngularHead
from sphereify.nn.precision import accumulated

DESCENT_STEPS = 60


def set_head(pair: LayerPair, batches: list[Batch]) -> LayerFit:
    """Set the class weights so that the class probabilities are the original's, up to a temperature.

    A regression on the scores, or the copied weights, start a descent on the divergence of the probabilities.
    """
    head: AngularHead = pair.layer
    features = [batch.x.reshape(-1, batch.x.shape[-1]) for batch in batches]
    x = torch.cat(
        [accumulated(f if b.positions is None else f[b.positions]) for f, b in zip(features, batches, strict=True)]
    )
    target = torch.cat([batch.target for batch in batches])
    before = _explained_scores(head, x, target)
    candidates = [_parameters(head)]
    if not pair.tied:
        lengths = head.weight.norm(dim=1, keepdim=True)
        solved = regress(x, target, accumulated(head.weight))
        size = solved.norm(dim=1, keepdim=True)
        head.weight.copy_(torch.where(size > 1e-12, solved * (lengths / size.clamp_min(1e-12)), head.weight))
        candidates.append(_parameters(head))
    candidates.sort(key=lambda parameters: _divergence_with(head, parameters, x, target))
    _set_parameters(head, candidates[0])
    fixed = {*(["weight"] if pair.tied else []), *(["operator.p"] if pair.shares_k else [])}
    candidates.insert(0, _descended(head, x, target, fixed))
    best = min(candidates, key=lambda parameters: _divergence_with(head, parameters, x, target))
    _set_parameters(head, best)
    return LayerFit(pair.name, before, _explained_scores(head, x, target), len(x), x.shape[1])


def centred(scores: Tensor) -> Tensor:
    """Class scores (n, classes) without the part that all classes share; one score alone as it is."""
    return scores - scores.mean(1, keepdim=True) if scores.shape[1] > 1 else scores


def _parameters(head: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in head.named_parameters()}


def _set_parameters(head: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in head.named_parameters():
        parameter.copy_(values[name])


def _explained_scores(head: nn.Module, x: Tensor, target: Tensor) -> float:
    """R² of the class scores, up to one factor and a constant for each row."""
    scores = accumulated(head.forward(x))
    error = centred(target) - _best_scale(scores, target) * centred(scores)
    return 1 - float(error.square().sum() / centred(target).square().sum().clamp_min(1e-12))


def _best_scale(scores: Tensor, target: Tensor) -> Tensor:
    """The factor ≥ 0 that brings scores closest to the target, both up to a constant for each row."""
    scores, target = centred(scores), centred(target)
    return ((scores * target).sum() / scores.square().sum().clamp_min(1e-12)).clamp_min(1e-6)


def _divergence_with(head: nn.Module, parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> float:
    """The divergence at other parameters, at its best temperature; infinite where it is not a number."""
    current = _parameters(head)
    _set_parameters(head, parameters)
    divergence = float(_divergence(head, x, target, _best_scale(head.forward(x), target)))
    _set_parameters(head, current)
    return divergence if math.isfinite(divergence) else math.inf


def _divergence(head: nn.Module, x: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities; for one score, the mean squared error."""
    scores = accumulated(head.forward(x)) * scale
    if target.shape[1] == 1:
        return F.mse_loss(scores, target)
    return F.kl_div(scores.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


def _descended(head: nn.Module, x: Tensor, target: Tensor, fixed: set[str]) -> dict[str, Tensor]:
    """The head's parameters after a descent on the divergence, all but the `fixed` ones; the head itself gets them."""
    flags = {parameter: parameter.requires_grad for parameter in head.parameters()}
    with torch.enable_grad():
        log_scale = _best_scale(head.forward(x), target).detach().log().requires_grad_()
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name not in fixed)
        free = [parameter for parameter in head.parameters() if parameter.requires_grad]
        optimizer = torch.optim.LBFGS([*free, log_scale], max_iter=DESCENT_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = _divergence(head, x, target, log_scale.exp())
            value.backward()
            return value

        optimizer.step(loss)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
        parameter.grad = None
    return _parameters(head)
