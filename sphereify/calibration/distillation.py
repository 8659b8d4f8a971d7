"""The second stage of a calibration: a few hundred optimizer steps towards the original's outputs, without labels."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.annotations import PLAN
from sphereify.calibration.batches import checked_batches
from sphereify.calibration.features import are_images, feature_modules, jittered, moved, recorded
from sphereify.calibration.head import centred
from sphereify.calibration.options import CalibrationOptions
from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.model_inputs import evaluating, tensors_in
from sphereify.errors import UsageError, invalid
from sphereify.nn.modules import check_module
from sphereify.options import checked_option

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WARMUP = 0.1
"""Share of the steps in which the rate rises."""
FEATURE_WEIGHT = 1.0
"""Weight of the error of the features next to that of the outputs."""
CACHE_BYTES = 256 * 2**20
"""Size up to which the original's outputs are cached; larger ones are computed again in each step."""

Example = tuple[ModelArguments, Callable[[], list[Tensor]]]
"""Arguments of the model, and a function that gives the original's outputs for them."""


def check_steps(steps: int, name: str = "steps") -> None:
    """Make sure that a number of optimizer steps is valid, 0 for none.

    Raises:
        UsageError: no whole number ≥ 0, or steps in inference mode, where there are no gradients.
    """
    checked_option(CalibrationOptions, "steps", steps, called=name)
    if torch.is_inference_mode_enabled():
        raise UsageError("calibration: cannot compute gradients inside torch.inference_mode; call it outside")


def distill(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Inputs],
    *,
    steps: int,
    lr: float = LEARNING_RATE,
    seed: int = 0,
    features: bool = False,
    augment: bool = True,
    contrast_jitter: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[float, float]:
    """Train a converted network to give the original's outputs on the same inputs, in place. No labels are used.

    Args:
        model: the converted network, best calibrated before.
        original: the network before the conversion, trained. It is not changed.
        batches: as for `calibrate`. Where all arguments are tensors with one image a row, each step takes 64 rows.
        steps: number of optimizer steps, ≥ 1; usual: 200 to 500.
        lr: peak learning rate of Adam, which then falls to 0 along a cosine.
        seed: random seed for the order and the variations of the inputs.
        features: True to compare, besides the outputs, features at one and two thirds of the depth. Measured, this kept
            a little less on clean images and as much on corrupted ones.
        augment: True to mirror and shift the inputs, for both networks alike, where they are images.
        contrast_jitter: True to lower the contrast of images for the converted network only, each by its own factor,
            so that it learns to give the same answer at any contrast.
        on_step: called after each step with its number and loss.

    Returns:
        The loss on all inputs before and after: the mean squared difference of the outputs over the variance of the
        original's. Class scores are compared up to a constant for each input and one factor for all inputs, which
        leave the predicted classes as they are; an angular head has no other scale.

    Raises:
        UsageError: steps below 1, a rate that is not positive, or a model without trainable parameters.
        ArgumentTypeError: a network that is no module.

    Both networks run in eval mode: dropout is off, and BatchNorm keeps the statistics of the calibration. Only
    parameters that require a gradient change. If the loss did not fall, the weights are those from before.
    """
    check_module(model)
    check_module(original, "original", "a torch.nn.Module, the plain network")
    check_steps(steps)
    if steps < 1:
        raise invalid("steps", steps, "at least 1", "Usual: 200 to 500")
    if not (lr > 0 and math.isfinite(lr)):
        raise invalid("lr", lr, "a positive number", "Usual: 1e-3")
    inputs = checked_batches(batches)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UsageError("calibration: no parameter of the model requires a gradient, so steps can change nothing")
    with evaluating(model, original), _frozen(original):
        log_scale = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)
        with torch.no_grad():
            examples = _examples(original, [piece for batch in inputs for piece in _split(batch)])
            log_scale.copy_(_best_scale(model, examples).log())
        before = _mean_loss(model, examples, log_scale)
        start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        lesson = _Lesson(model, original, examples, log_scale, features, augment, contrast_jitter, seed)
        with lesson:
            _train([*parameters, log_scale], lesson, steps, lr, on_step)
        for parameter in parameters:
            parameter.grad = None
        after = _mean_loss(model, examples, log_scale)
        if not after < before:
            model.load_state_dict(start)
            return before, before
    return before, after


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Compute no gradients for the parameters of a network."""
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    network.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _split(batch: ModelArguments) -> list[ModelArguments]:
    """A batch in pieces of at most 64 rows, if all arguments are tensors of one length."""
    lengths = {len(value) if isinstance(value, Tensor) and value.dim() else 0 for value in batch.values()}
    if len(lengths) > 1 or lengths <= {0}:
        return [batch]
    return batch.cut(lambda value: value.split(BATCH_SIZE))


def _examples(original: nn.Module, pieces: list[ModelArguments]) -> list[Example]:
    size = sum(tensor.numel() * tensor.element_size() for tensor in _outputs(original, pieces[0])) * len(pieces)
    if size > CACHE_BYTES:
        return [(piece, torch.no_grad()(functools.partial(_outputs, original, piece))) for piece in pieces]
    cached = [_outputs(original, piece) for piece in pieces]
    return [(piece, functools.partial(list, outputs)) for piece, outputs in zip(pieces, cached, strict=True)]


def _outputs(network: nn.Module, arguments: ModelArguments) -> list[Tensor]:
    """The floating-point tensors that a network returns, with 0 for classes that are masked out with −∞."""
    outputs = [tensor.float() for tensor in tensors_in(arguments.run(network)) if tensor.is_floating_point()]
    return [tensor.masked_fill(tensor == -torch.inf, 0) for tensor in outputs]


def _best_scale(model: nn.Module, examples: list[Example]) -> Tensor:
    """The factor that brings class scores closest to the original's; 1 for outputs of other kinds."""
    product = square = torch.zeros(())
    for arguments, original_outputs in examples:
        targets = original_outputs()
        if not _are_scores(targets):
            return torch.ones(())
        outputs = _outputs(model, arguments)
        x, y = centred(outputs[0]), centred(targets[0])
        product, square = product.to(x.device) + (x * y).sum(), square.to(x.device) + x.square().sum()
    return (product / square.clamp_min(1e-12)).clamp_min(1e-6)


def _are_scores(outputs: list[Tensor]) -> bool:
    return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1


class _Lesson:
    """The loss of each step: the error of the outputs, and of the features inside if asked, on inputs that vary.

    Its arguments are those of `distill`, and `examples`, the inputs with the original's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        examples: list[Example],
        log_scale: Tensor,
        features: bool,
        augment: bool,
        contrast_jitter: bool,
        seed: int,
    ):
        self.model = model
        self.original = original
        self.log_scale = log_scale
        self.names = feature_modules(PLAN.of(model), model, original) if features else []
        images = all(are_images(arguments) for arguments, _ in examples)
        self.augment = augment and images
        self.jitter = contrast_jitter and images
        self.generator = torch.Generator().manual_seed(seed)
        self.order = _shuffled(examples, torch.Generator().manual_seed(seed))
        self._recording = contextlib.ExitStack()

    def __enter__(self) -> None:
        self.features = self._recording.enter_context(recorded(self.model, self.names))
        self.original_features = self._recording.enter_context(recorded(self.original, self.names))

    def __exit__(self, *_: object) -> None:
        self._recording.close()

    def loss(self) -> Tensor:
        """The loss on the next inputs."""
        arguments, cached = next(self.order)
        if self.augment:
            arguments = moved(arguments, self.generator)
        if self.augment or self.names:
            with torch.no_grad():
                targets = _outputs(self.original, arguments)
        else:
            targets = cached()
        outputs = _outputs(self.model, jittered(arguments, self.generator) if self.jitter else arguments)
        loss = _loss(outputs, targets, self.log_scale)
        pairs = [(self.features.get(name), self.original_features.get(name)) for name in self.names]
        errors = [
            _error(a.float(), b.float()) for a, b in pairs if a is not None and b is not None and a.shape == b.shape
        ]
        return loss + FEATURE_WEIGHT * torch.stack(errors).mean() if errors else loss


def _train(
    trained: list[Tensor], lesson: _Lesson, steps: int, lr: float, on_step: Callable[[int, float], None]
) -> None:
    """Take optimizer steps; end early if the loss is not finite."""
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    with torch.enable_grad():
        for step in range(steps):
            loss = lesson.loss()
            if not loss.isfinite():
                return
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step(step + 1, float(loss.detach()))


def _rate(step: int, steps: int) -> float:
    """The share of the peak rate: up along a line, then down along a cosine."""
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _shuffled(examples: list[Example], generator: torch.Generator) -> Iterator[Example]:
    """Examples without end, all of them once in each round."""
    while True:
        for number in torch.randperm(len(examples), generator=generator).tolist():
            yield examples[number]


def _loss(outputs: list[Tensor], targets: list[Tensor], log_scale: Tensor) -> Tensor:
    """The mean squared difference over the variance of the targets."""
    if _are_scores(targets):
        outputs, targets = [centred(outputs[0]) * log_scale.exp()], [centred(targets[0])]
    pairs = [(a, b) for a, b in zip(outputs, targets, strict=True) if a.shape == b.shape and b.numel() > 1]
    if not pairs:
        raise UsageError("calibration: the network's outputs hold no tensors of one shape in both networks to compare")
    return torch.stack([_error(a, b) for a, b in pairs]).mean()


def _error(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference over the variance of the target."""
    return F.mse_loss(output, target) / target.var().clamp_min(1e-12)


@torch.no_grad()
def _mean_loss(model: nn.Module, examples: list[Example], log_scale: Tensor) -> float:
    losses = [_loss(_outputs(model, arguments), targets(), log_scale) for arguments, targets in examples]
    return float(torch.stack(losses).mean())
