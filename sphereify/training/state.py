"""The state of a run: all that training changes, as it goes into a checkpoint and comes back from one."""

import functools
from typing import Any

import torch
from torch import nn

from sphereify.datasets import Data
from sphereify.options import from_json, to_json
from sphereify.training.distributed import Processes
from sphereify.training.loader import training_batches
from sphereify.training.meter import Meter
from sphereify.training.morph import Morph
from sphereify.training.objective import Objective
from sphereify.training.optim import make_optimizer, make_schedule
from sphereify.training.randomness import random_state, set_random_state
from sphereify.training.results import Epoch
from sphereify.training.same_data import identity_of
from sphereify.training.settings import Settings
from sphereify.training.sharding import Shards


class RunState:
    """The model with its optimizer, schedule, average, order of images, counts and measurements."""

    def __init__(self, model: nn.Module, data: Data, settings: Settings, processes: Processes, shards: Shards | None):
        from timm.utils import ModelEmaV3

        self.model, self.data, self.settings = model, data, settings
        self.processes, self.shards = processes, shards
        device = processes.device
        self.objective = Objective(model, settings.terms, settings.accumulate).to(device)
        self.batches = training_batches(data, settings, processes)
        self.steps_per_epoch = self.batches.steps(settings.accumulate)
        self.optimizer = make_optimizer(model, settings)
        self.scheduler = make_schedule(self.optimizer, settings, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.ema = ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema else None
        networks = [model] if self.ema is None else [model, self.ema.module]
        self.morph = Morph(networks, settings.morph * settings.epochs * self.steps_per_epoch)
        self.morph.at(0)
        self.meter = Meter(device)
        self.epoch = 0
        """Epochs that are complete."""
        self.step = 0
        """Optimizer steps so far."""
        self.history: list[Epoch] = []

    @property
    def tested(self) -> nn.Module:
        """The model that is tested and saved: the moving average of the weights, if there is one."""
        return self.model if self.ema is None else self.ema.module

    @functools.cached_property
    def data_identity(self) -> dict[str, Any]:
        """The facts that tell the data set from others."""
        return identity_of(self.data)

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return self.optimizer.param_groups[0]["lr"]  # type: ignore[no-any-return]

    def start_next_epoch(self) -> None:
        """Count the present epoch as complete."""
        self.epoch += 1
        self.batches.start = 0
        self.meter = Meter(self.processes.device)

    def capture(self) -> dict[str, Any]:
        """All of the state as nested plain values and tensors; every process must call it, as it gathers from all."""
        randoms = self.processes.gather(random_state())
        meters = self.processes.gather(self.meter.state())
        optimizer: dict[str, Any] | None
        if self.shards is None:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        else:
            # A sharded optimizer that is asked for its state before its first step makes that step.
            optimizer = self.shards.optimizer_state(self.optimizer) if self.step else None
            model = self.shards.state()
        return {
            "settings": self.settings.to_json(),
            "data": self.data.name,
            "data_identity": self.data_identity,
            "world": self.processes.world,
            "model": model,
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": optimizer,
            "scheduler": _json_part(self.scheduler.state_dict()),
            "scaler": self.scaler.state_dict(),
            "objective": self.objective.state_dict(),
            "random": randoms,
            "epoch": self.epoch,
            "batch": self.batches.start,
            "step": self.step,
            "meter": meters,
            "history": [to_json(epoch) for epoch in self.history],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take back all of what `capture` returned, the random generators included."""
        if self.shards is None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        else:
            self.shards.restore(self.optimizer, saved["model"], saved["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        self.objective.load_state_dict(saved["objective"])
        self.epoch, self.step, self.batches.start = saved["epoch"], saved["step"], saved["batch"]
        self.meter.restore(saved["meter"][self.processes.rank])
        self.morph.at(self.step)
        self.history = [from_json(Epoch, row) for row in saved["history"]]
        set_random_state(saved["random"][self.processes.rank])


def _json_part(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what JSON cannot hold."""
    return {key: value for key, value in state.items() if isinstance(value, (bool, int, float, str, list, type(None)))}
