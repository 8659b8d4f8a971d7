"""The second stage of a calibration: a few hundred optimizer steps towards the original's outputs, without labels."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.calibration.batches import batches_of, check_steps
from sphereify.calibration.head import centred
from sphereify.convert.model_inputs import evaluating, fresh, tensors_in
from sphereify.errors import UsageError

BATCH = 64
LEARNING_RATE = 1e-3
KEPT_BYTES = 256 * 2**20
"""The original's outputs are kept up to this size, and made anew at each step beyond."""
Piece = tuple[tuple[Any, ...], Callable[[], list[Tensor]]]
"""Arguments of the model, and what the original answers to them."""
WARMUP = 0.1
"""Share of the steps in which the rate rises."""


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Tensor | tuple[Any, ...]],
    *,
    steps: int,
    lr: float = LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[float, float]:
    """Train a converted network to give the original's outputs on the same inputs, in place. No labels are used.

    Args:
        model: converted, best calibrated before.
        original: the network before the conversion, trained. It is not changed.
        batches: as for `calibrate`. Where all arguments are tensors with one image a row, each step takes 64 rows.
        steps: ≥ 1; usual: 200 to 500.
        lr: peak learning rate of Adam, which then falls to 0 along a cosine.
        seed: of the order.
        on_step: called after each step with its number and loss.

    Returns:
        The loss on all inputs before and after: the mean squared difference of the outputs over the variance of the
        original's. Class scores count up to a constant for each input and one factor for all, as the classes that they
        name do; an angular head has no other scale.

    Raises:
        UsageError: steps below 1, or a rate that is not positive.

    Both networks run in eval mode: dropout is off, and BatchNorm keeps the statistics of the calibration. Only
    parameters that require a gradient move. If the loss did not fall, the weights are those from before.
    """
    check_steps(steps)
    if steps < 1:
        raise UsageError(f"calibration: got {steps} steps, expected at least 1; usual: 200 to 500")
    if not (lr > 0 and math.isfinite(lr)):
        raise UsageError(f"calibration: got the learning rate {lr!r}, expected a positive number; usual: 1e-3")
    inputs = batches_of(batches)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("calibration: no parameter of the model requires a gradient, so steps can change nothing")
    with evaluating(model, original), _untouched(original):
        scale = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
        with torch.no_grad():
            pieces = _answered(original, [piece for batch in inputs for piece in _pieces(batch)])
            scale.copy_(_first_scale(model, pieces).log())
        before = _total(model, pieces, scale)
        kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam([*trained, scale], lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for step, (arguments, answer) in enumerate(itertools.islice(_draws(pieces, generator), steps)):
                loss = _difference(_outputs(model, arguments), answer(), scale)
                if not loss.isfinite():
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                on_step(step + 1, float(loss.detach()))
        for parameter in trained:
            parameter.grad = None
        after = _total(model, pieces, scale)
        if not after < before:
            model.load_state_dict(kept)
            return before, before
    return before, after


@contextlib.contextmanager
def _untouched(network: nn.Module) -> Iterator[None]:
    """No gradients for the parameters of a network."""
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _rate(step: int, steps: int) -> float:
    """Up along a line, then down along a cosine."""
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _draws(pieces: list[Piece], generator: torch.Generator) -> Iterator[Piece]:
    """Batches without end, all of them once in each round."""
    while True:
        for number in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[number]


def _pieces(batch: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    lengths = {len(value) if isinstance(value, Tensor) and value.dim() else 0 for value in batch}
    if len(lengths) > 1 or lengths <= {0}:
        return [batch]
    return list(zip(*(value.split(BATCH) for value in batch), strict=True))


def _answered(original: nn.Module, pieces: list[tuple[Any, ...]]) -> list[Piece]:
    size = sum(tensor.numel() * tensor.element_size() for tensor in _outputs(original, pieces[0])) * len(pieces)
    if size > KEPT_BYTES:
        return [(piece, torch.no_grad()(functools.partial(_outputs, original, piece))) for piece in pieces]
    kept = [_outputs(original, piece) for piece in pieces]
    return [(piece, functools.partial(list, outputs)) for piece, outputs in zip(pieces, kept, strict=True)]


def _outputs(network: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of numbers that a network returns."""
    return [tensor.float() for tensor in tensors_in(network(*fresh(arguments))) if tensor.is_floating_point()]


def _is_scores(outputs: list[Tensor]) -> bool:
    return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1


def _first_scale(model: nn.Module, pieces: list[Piece]) -> Tensor:
    """The factor of class scores that brings them closest to the original's; 1 for outputs of other kinds."""
    product = square = torch.zeros(())
    for arguments, answer in pieces:
        wanted = answer()
        if not _is_scores(wanted):
            return torch.ones(())
        got = _outputs(model, arguments)
        x, y = centred(got[0]), centred(wanted[0])
        product, square = product.to(x.device) + (x * y).sum(), square.to(x.device) + x.square().sum()
    return (product / square.clamp_min(1e-12)).clamp_min(1e-6)


def _difference(got: list[Tensor], wanted: list[Tensor], scale: Tensor) -> Tensor:
    if _is_scores(wanted):
        got, wanted = [centred(got[0]) * scale.exp()], [centred(wanted[0])]
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if a.shape == b.shape and b.numel() > 1]
    if not pairs:
        raise UsageError("calibration: the network's outputs hold no tensors of one shape in both networks to compare")
    return torch.stack([F.mse_loss(a, b) / b.var().clamp_min(1e-12) for a, b in pairs]).mean()


@torch.no_grad()
def _total(model: nn.Module, pieces: list[Piece], scale: Tensor) -> float:
    losses = [_difference(_outputs(model, arguments), answer(), scale) for arguments, answer in pieces]
    return float(torch.stack(losses).mean())
