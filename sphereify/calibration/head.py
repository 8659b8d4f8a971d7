"""Sets an angular head from the features it receives and the original's class scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.calibration.layer import LayerFit
from sphereify.calibration.layer_pairs import Site
from sphereify.calibration.regression import regress
from sphereify.calibration.rows import HEAD_STEPS, Batch, precise
from sphereify.nn import AngularHead


def set_head(site: Site, batches: list[Batch]) -> LayerFit:
    """Class weights whose probabilities are the original's, up to a temperature: regression, then a descent."""
    head: AngularHead = site.layer
    flat = [batch.x.reshape(-1, batch.x.shape[-1]) for batch in batches]
    x = torch.cat([precise(f if b.drawn is None else f[b.drawn]) for f, b in zip(flat, batches, strict=True)])
    wanted = torch.cat([batch.wanted for batch in batches])
    before = _explained_scores(head, x, wanted)
    candidates = [_state(head)]
    if not site.tied:
        lengths = head.weight.norm(dim=1, keepdim=True)
        solved = regress(x, wanted, precise(head.weight))
        head.weight.copy_(solved * (lengths / solved.norm(dim=1, keepdim=True).clamp_min(1e-12)))
        candidates.append(_state(head))
    candidates.sort(key=lambda state: _divergence_with(head, state, x, wanted))
    _restore(head, candidates[0])
    fixed = {*(["weight"] if site.tied else []), *(["operator.p"] if site.shares_k else [])}
    candidates.insert(0, _descended(head, x, wanted, fixed))
    best = min(candidates, key=lambda state: _divergence_with(head, state, x, wanted))
    _restore(head, best)
    return LayerFit(site.name, before, _explained_scores(head, x, wanted), len(x), x.shape[1])


def _state(head: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in head.named_parameters()}


def _restore(head: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in head.named_parameters():
        parameter.copy_(state[name])


def centred(scores: Tensor) -> Tensor:
    """Class scores (n, classes) up to what adds the same to all of them; one score alone as it is."""
    return scores - scores.mean(1, keepdim=True) if scores.shape[1] > 1 else scores


def _best_scale(scores: Tensor, wanted: Tensor) -> Tensor:
    """The factor ≥ 0 that brings scores closest to the wanted ones, both up to a constant for each row."""
    scores, wanted = centred(scores), centred(wanted)
    return ((scores * wanted).sum() / scores.square().sum().clamp_min(1e-12)).clamp_min(1e-6)


def _explained_scores(head: nn.Module, x: Tensor, wanted: Tensor) -> float:
    scores = precise(head.forward(x))
    error = centred(wanted) - _best_scale(scores, wanted) * centred(scores)
    return 1 - float(error.square().sum() / centred(wanted).square().sum().clamp_min(1e-12))


def _divergence(head: nn.Module, x: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    scores = precise(head.forward(x)) * scale
    if wanted.shape[1] == 1:
        return F.mse_loss(scores, wanted)
    return F.kl_div(scores.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


def _divergence_with(head: nn.Module, state: dict[str, Tensor], x: Tensor, wanted: Tensor) -> float:
    """Of a head with other parameters, at its best temperature; infinite for what is no number."""
    before = _state(head)
    _restore(head, state)
    found = float(_divergence(head, x, wanted, _best_scale(head.forward(x), wanted)))
    _restore(head, before)
    return found if math.isfinite(found) else math.inf


def _descended(head: nn.Module, x: Tensor, wanted: Tensor, fixed: set[str]) -> dict[str, Tensor]:
    """The head's parameters after a descent on the divergence; the head itself gets them too."""
    flags = {parameter: parameter.requires_grad for parameter in head.parameters()}
    with torch.enable_grad():
        logarithm = _best_scale(head.forward(x), wanted).detach().log().requires_grad_()
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name not in fixed)
        free = [parameter for parameter in head.parameters() if parameter.requires_grad]
        optimizer = torch.optim.LBFGS([*free, logarithm], max_iter=HEAD_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = _divergence(head, x, wanted, logarithm.exp())
            value.backward()
            return value

        optimizer.step(loss)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
        parameter.grad = None
    return _state(head)
