"""A step of training: the gradients of its batches, and the update of the weights."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.errors import TrainingError, option
from sphereify.training.evaluation import autocast
from sphereify.training.freezing import new_parameters
from sphereify.training.objective import logits_of, margin_head
from sphereify.training.settings import Settings
from sphereify.training.state import RunState
from sphereify.training.teacher import distillation


class TrainingStep:
    """Steps of a run: batches are added until they make a step, and then the weights are updated.

    Args:
        state: the run's; its model is on the device.
        teacher: the network whose scores are followed besides the labels; it is moved to the device.
        frozen_layers: layers of the model that do not train.
    """

    def __init__(self, state: RunState, teacher: nn.Module | None, frozen_layers: list[nn.Module]):
        self.state, self.model, self.settings, self.processes = state, state.model, state.settings, state.processes
        self.device = self.processes.device
        self.teacher = None if teacher is None else teacher.to(self.device).eval()
        self.frozen_layers = frozen_layers
        self.mixup = _mixup(self.settings, len(state.data.classes))
        self.has_margin = margin_head(self.model) is not None
        self.trainable = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        self.only_new = False
        """True while only the parameters train that a conversion brings."""
        self.forward = self._wrapped()

    def _wrapped(self) -> nn.Module:
        """The model as it is called: copied over the processes, compiled."""
        forward: Any = self.model
        if self.processes.world > 1 and self.state.shards is None:
            device_ids = [self.device] if self.device.type == "cuda" else None
            forward = nn.parallel.DistributedDataParallel(forward, device_ids=device_ids)
        return torch.compile(forward) if self.settings.compile else forward  # type: ignore[return-value]

    def prepare_epoch(self) -> None:
        """Choose the parameters that train in the present epoch, and set the modes of the layers."""
        only_new = self.state.epoch < self.settings.warmup_head_epochs
        if only_new != self.only_new:
            new = new_parameters(self.model) & self.trainable or self.trainable  # all, if there is none
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in (new if only_new else self.trainable))
            self.only_new = only_new
            self.forward = self._wrapped()
        self.model.train()
        for layer in self.frozen_layers:
            layer.eval()  # the statistics of a frozen normalization stay, too

    def add_batch(self, images: Tensor, targets: Tensor, *, share: float, is_last: bool) -> None:
        """Add the gradient of a batch.

        Args:
            images, targets: of shape (B, C, H, W) and (B,), on the device.
            share: weight of the batch in its step.
            is_last: True for the last batch of a step, with which the gradients are summed over the processes.

        Raises:
            TrainingError: a batch of one image for a model that normalizes over the batch.
        """
        count = len(targets)
        if self.mixup is not None:
            even = count - count % 2
            images, targets = self._mixed(images[:even], targets[:even])
        with self._unsynchronized(not is_last):
            with autocast(self.device, self.settings.amp):
                loss = self._loss(images, targets)
            self.state.scaler.scale(loss * share).backward()
        self.state.meter.add(loss.detach(), count, self.state.step + 1)

    def _mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        """Images mixed in pairs, with what the loss takes as their targets: shares of the classes, or for a margin,
        which belongs to one class, the two classes and the share of the first."""
        mixed, shares = self.mixup(images, targets)
        if not self.has_margin:
            return mixed, shares
        other = targets.flip(0)  # timm mixes a batch with itself in reverse
        share = shares.gather(1, targets[:, None]).squeeze(1)
        return mixed, (targets, other, torch.where(targets == other, 1.0, share))

    def _unsynchronized(self, waits: bool) -> Any:
        """Keep the gradients of this process to itself for now, if it has a copy of the model."""
        copied = isinstance(self.forward, nn.parallel.DistributedDataParallel)
        return self.forward.no_sync() if waits and copied else nullcontext()  # type: ignore[operator]

    def _loss(self, images: Tensor, targets: Any) -> Tensor:
        try:
            output = self.forward(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                f"a normalization over the batch cannot train on a single image: take {option('batch_size', 2)} "
                f"or more, or convert with {option('norm', 'replace')}"
            ) from error
        loss: Tensor = self.state.objective(output, targets)
        if self.teacher is None:
            return loss
        share = self.settings.teacher_weight
        followed = distillation(logits_of(output), self.teacher, images, self.settings.teacher_temperature)
        return (1 - share) * loss + share * followed

    def update(self) -> None:
        """Update the weights by the gradients of the batches since the last step."""
        state = self.state
        # The rate of a step is that of its middle, so that neither the first nor the last step of a run has none.
        state.scheduler.step_update(state.step + 0.5)
        if self.settings.clip_grad is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema is not None:
            state.ema.update(self.model, state.step)
        state.morph.advance(state.step)


def _mixup(settings: Settings, classes: int) -> Any:
    """timm's mixing of images and targets; None where none is mixed."""
    from timm.data import Mixup

    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=classes)
