"""Measurements of an epoch: its loss, speed and skipped images, and the layers' k, ρ and energies after it."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.errors import UsageError
from sphereify.nn import HypersphericalEnergy
from sphereify.nn.precision import gathered
from sphereify.nn.radius import HasRadius
from sphereify.training.distributed import Processes


class Meter:
    """Sums over the batches of an epoch. They stay on the device until they are read, so that no step waits for it."""

    def __init__(self, device: torch.device):
        # Losses are summed in double precision where the device has it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros((), dtype=dtype, device=device)
        self.newest = torch.zeros((), device=device)
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self.count = self.skipped = self.timed = 0
        self.began = time.monotonic()
        self.ended: float | None = None

    def start(self) -> None:
        """Start the clock."""
        self.began, self.ended = time.monotonic(), None

    def stop(self) -> None:
        """Stop the clock."""
        self.ended = time.monotonic()

    def add(self, loss: Tensor, count: int, step: int) -> None:
        """Add the loss of a batch of `count` images at an optimizer step."""
        self.total += loss * count
        self.newest = loss
        self.bad_step = torch.where((self.bad_step == 0) & ~loss.isfinite(), step, self.bad_step)
        self.count += count
        self.timed += count

    @property
    def last(self) -> float:
        """The loss of the last batch."""
        return float(self.newest)

    def first_bad_step(self) -> int | None:
        """The first step with a loss that is not finite."""
        return int(self.bad_step) or None

    def rate(self, world: int) -> float:
        """Images per second, over `world` processes of equal speed."""
        return self.timed * world / max((self.ended or time.monotonic()) - self.began, 1e-9)

    def means(self, processes: Processes) -> tuple[float, float, int]:
        """The mean loss, images per second and the number of skipped images, over all processes."""
        rate = self.rate(processes.world)
        sums = torch.stack([self.total, self.total.new_tensor(self.count), self.total.new_tensor(self.skipped)])
        total, count, skipped = processes.sum(sums).tolist()
        return total / max(count, 1), rate, int(skipped)

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"total": self.total.cpu(), "count": self.count, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the sums that `state` returned."""
        self.total += state["total"].to(self.total.device)
        self.count, self.skipped = state["count"], state["skipped"]


def learned_k(model: nn.Module) -> dict[str, float]:
    """The mean k of each layer whose operator learns one."""
    return {
        name: float(gathered(module.operator.k.detach()).mean())
        for name, module in model.named_modules()
        if isinstance(getattr(getattr(module, "operator", None), "k", None), Tensor)
    }


def learned_radii(model: nn.Module) -> dict[str, float]:
    """The radius ρ of each layer that learns one."""
    return {
        name: module.radius_value
        for name, module in model.named_modules()
        if isinstance(module, HasRadius) and module.log_radius is not None
    }


def energies(model: nn.Module) -> dict[str, float]:
    """The hyperspherical energy of each layer; of none where no layer has two filters."""
    try:
        return {row.layer: row.energy for row in HypersphericalEnergy().report(model).layers}
    except UsageError:
        return {}
